//! A saved file: raw bytes, or an honest one bent step by step, with a right or a wrong hash.
#![no_main]

use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use quire_core::{Error, save};
use quire_fuzz::files::File;
use quire_fuzz::honest::{self, Honest};
use quire_fuzz::model::Model;
use quire_fuzz::{PAGE, exercise, memory, recipe};

/// Longer files are written only to be refused, never read whole.
const MOST_PAGES: u64 = 1 << 14;

fn saved() -> Vec<Honest> {
    let path = exercise::scratch().join("honest");
    let mut out = Vec::new();
    for honest in honest::all() {
        save::save(&honest.snapshot, &path).expect("save");
        let file = std::fs::File::open(&path).expect("open");
        let snapshot = Arc::new(save::load(&path, true, true).expect("load"));
        out.push(Honest { snapshot, files: vec![Rc::new(File::read(file.as_fd()))] });
        std::fs::remove_file(&path).expect("remove");
    }
    out
}

thread_local! {
    static HONEST: Vec<Honest> = saved();
}

fn bent(honest: &[Honest], data: &[u8]) {
    let (file, choices) = recipe::follow_one(honest, data);
    if file.len().is_none_or(|len| len > MOST_PAGES * PAGE) {
        return;
    }
    let path = exercise::scratch().join("loaded");
    let target = std::fs::OpenOptions::new().write(true).create(true).truncate(true).open(&path).expect("open");
    assert!(file.write(target.as_fd()), "the file could not be written");
    let (copy, check) = (choices & 1 == 1, choices & 2 == 0);
    let hashed = file.trailer[12] & 1 == 1 && !file.wrong_hash;
    let judged = Model::read(&[Rc::clone(&file)], false);
    let loaded = save::load(&path, copy, check);
    match (loaded, judged) {
        (Ok(snapshot), Ok(model)) => {
            assert!(hashed || !check, "loaded without a right hash");
            let snapshot = Arc::new(snapshot);
            exercise::walk(&snapshot, &model);
            exercise::map(&snapshot, &model);
            exercise::compare(&snapshot, &model, &snapshot, &model);
            if choices & 12 == 4 {
                exercise::keep(&snapshot, &model);
            }
        }
        (Ok(_), Err(why)) => panic!("loaded, though: {why}"),
        (Err(Error::Os { .. }), Ok(_)) | (Err(_), Err(_)) => {}
        (Err(error), Ok(_)) => assert!(check && !hashed, "refused, though it is right: {error:?}"),
    }
    std::fs::remove_file(&path).expect("remove");
}

fuzz_target!(|data: &[u8]| {
    HONEST.with(|honest| {
        memory::bounded(|| {
            let Some((&mode, data)) = data.split_first() else { return };
            if mode % 8 != 7 {
                return bent(honest, data);
            }
            let path = exercise::scratch().join("raw");
            std::fs::write(&path, data).expect("write");
            for choice in 0..4 {
                if let Ok(snapshot) = save::load(&path, choice & 1 == 1, choice & 2 == 0) {
                    drop(snapshot.extents().expect("extents"));
                }
            }
            std::fs::remove_file(&path).expect("remove");
        });
    });
});
