//! A set of layers from a peer: raw bytes, or honest layers bent step by step.
#![no_main]

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use quire_core::sys::memfd::{self, Piece};
use quire_core::{Error, Snapshot};
use quire_fuzz::honest::{self, Honest};
use quire_fuzz::model::Model;
use quire_fuzz::{PAGE, exercise, files, memory, recipe};

thread_local! {
    static HONEST: Vec<Honest> = honest::all();
}

/// Bytes cut into memfds of as many pages as the first bytes say; what is missing is a hole at the end.
fn raw(data: &[u8]) -> Vec<OwnedFd> {
    let Some((&count, data)) = data.split_first() else { return Vec::new() };
    let (lengths, mut rest) = data.split_at(usize::from(count % 4 + 1).min(data.len()));
    let mut out = Vec::new();
    for &len in lengths {
        let bytes = u64::from(len % 16) * PAGE;
        let (mine, others) = rest.split_at(rest.len().min(bytes as usize));
        rest = others;
        let fd = memfd::create(c"fuzz").expect("memfd_create");
        if !mine.is_empty() {
            memfd::write_pieces(fd.as_fd(), 0, &[Piece::of(mine)]).expect("pwritev");
        }
        memfd::truncate(fd.as_fd(), bytes).expect("ftruncate");
        memfd::add_seals(fd.as_fd(), memfd::SEALS_IMMUTABLE).expect("F_ADD_SEALS");
        out.push(fd);
    }
    out
}

/// Bytes that the files take, before or after the library looked at them.
fn allocated(fds: &[OwnedFd]) -> u64 {
    fds.iter().map(|fd| memfd::status(fd.as_fd()).expect("fstat").allocated_bytes).sum()
}

fn receive(set: &[Rc<files::File>], fds: Vec<OwnedFd>) -> Option<(Arc<Snapshot>, Model)> {
    let watch: Vec<OwnedFd> = fds.iter().map(|fd| fd.try_clone().expect("dup")).collect();
    let before = allocated(&watch);
    let judged = Model::read(set, true);
    let received = Snapshot::receive(fds);
    let grown = allocated(&watch).saturating_sub(before);
    assert!(grown <= memory::MOST_BYTES as u64, "receiving filled {grown} bytes of holes");
    match (received, judged) {
        (Ok(snapshot), Ok(model)) => Some((Arc::new(snapshot), model)),
        (Err(_), Err(_)) => None,
        (Ok(_), Err(why)) => panic!("accepted, though: {why}"),
        // Address space may be too small for what a layer claims to be.
        (Err(Error::Os { .. }), Ok(_)) => None,
        (Err(error), Ok(_)) => panic!("refused, though it is right: {error:?}"),
    }
}

fuzz_target!(|data: &[u8]| {
    HONEST.with(|honest| {
        memory::bounded(|| {
            let Some((&mode, data)) = data.split_first() else { return };
            if mode % 8 == 7 {
                let snapshot = Snapshot::receive(raw(data));
                if let Ok(snapshot) = snapshot {
                    drop(snapshot.extents().expect("extents"));
                }
                return;
            }
            let made = recipe::follow(honest, data);
            let mut descriptors = files::Descriptors::default();
            let honest = &honest[made.base];
            let model = Model::read(&honest.files, true).expect("an honest snapshot");
            let first = descriptors.of(&made.first).and_then(|fds| receive(&made.first, fds));
            let second = descriptors.of(&made.second).and_then(|fds| receive(&made.second, fds));
            let found: Vec<_> = first.iter().chain(&second).collect();
            for (snapshot, judged) in &found {
                exercise::walk(snapshot, judged);
                exercise::map(snapshot, judged);
                exercise::compare(snapshot, judged, snapshot, judged);
                exercise::compare(snapshot, judged, &honest.snapshot, &model);
                if made.choices & 3 == 1 {
                    exercise::keep(snapshot, judged);
                }
                if made.choices & 3 == 2 {
                    exercise::go_on(snapshot, judged, made.choices >> 2);
                }
            }
            if let [(a, judged_a), (b, judged_b)] = found[..] {
                exercise::compare(a, judged_a, b, judged_b);
            }
        });
    });
});
