//! The first inputs of every target: honest ones, whole.

use std::os::fd::AsFd;
use std::path::Path;

use crate::{PAGE, exercise, honest};
use quire_core::save;
use quire_core::sys::memfd;

/// Raw inputs hold at most so many pages.
const MOST_PAGES: u64 = 12;

fn write(dir: &Path, name: &str, content: &[u8]) {
    std::fs::create_dir_all(dir).expect("create the directory");
    std::fs::write(dir.join(name), content).expect("write the seed");
}

/// If the environment names a directory, write the seeds there and end the process.
pub fn write_if_asked() {
    let Some(dir) = std::env::var_os("QUIRE_FUZZ_SEEDS") else { return };
    write_all(Path::new(&dir));
    std::process::exit(0);
}

fn write_all(dir: &Path) {
    for (i, honest) in honest::all().into_iter().enumerate() {
        // Recipes without a step, for each of the slower checks.
        for choices in 0..4u8 {
            write(&dir.join("snapshot"), &format!("honest-{i}-{choices}"), &[0, i as u8, choices, 0]);
            write(&dir.join("load"), &format!("honest-{i}-{choices}"), &[0, i as u8, choices]);
        }
        let trailer = honest.files[0].finished_trailer();
        write(&dir.join("trailer"), &format!("fields-{i}"), &trailer[..192]);
        let lens: Vec<u64> = honest.files.iter().map(|file| file.len().expect("a length") / PAGE).collect();
        if lens.len() <= 4 && lens.iter().sum::<u64>() <= MOST_PAGES {
            let mut raw = vec![7, lens.len() as u8 - 1];
            raw.extend(lens.iter().map(|len| *len as u8));
            for layer in honest.snapshot.layers() {
                raw.extend(whole(layer.fd()));
            }
            write(&dir.join("snapshot"), &format!("raw-{i}"), &raw);
        }
        if honest.snapshot.data_pages() <= MOST_PAGES {
            let path = exercise::scratch().join("seed");
            save::save(&honest.snapshot, &path).expect("save");
            let mut raw = vec![7];
            raw.extend(std::fs::read(&path).expect("read"));
            write(&dir.join("load"), &format!("raw-{i}"), &raw);
        }
    }
    std::fs::remove_dir_all(exercise::scratch()).expect("remove the scratch directory");
}

fn whole(fd: std::os::fd::BorrowedFd<'_>) -> Vec<u8> {
    let mut out = vec![0; memfd::status(fd.as_fd()).expect("fstat").size as usize];
    assert!(memfd::read_exact(fd, &mut out, 0).expect("pread"));
    out
}
