//! Received snapshots at the limits: as many layers as there may be, and layers that are mostly hole.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use quire_core::layer::{LayerId, Trailer};
use quire_core::pages::PAGE;
use quire_core::sys::memfd::{self, Piece};
use quire_core::table::Entry;
use quire_core::table::diff::diff;
use quire_core::{Segment, Snapshot};

struct Spec {
    id: u8,
    data_pages: u64,
    node_pages: u64,
    imports: Vec<u8>,
    size_bytes: u64,
    root: Entry,
}

/// A sealed layer whose only allocated pages are those given, by page number, and the trailer.
fn layer(spec: Spec, pages: &[(u64, Vec<u8>)]) -> OwnedFd {
    let trailer = Trailer {
        id: LayerId([spec.id; 16]),
        hashed: false,
        data_pages: spec.data_pages,
        node_pages: spec.node_pages,
        imports: spec.imports.iter().map(|id| LayerId([*id; 16])).collect(),
        size_bytes: spec.size_bytes,
        root: spec.root,
    };
    let fd = memfd::create(c"test").unwrap();
    for (at, bytes) in pages {
        memfd::write_pieces(fd.as_fd(), at * PAGE, &[Piece::of(bytes)]).unwrap();
    }
    let at = spec.data_pages + spec.node_pages;
    memfd::write_pieces(fd.as_fd(), at * PAGE, &[Piece::of(&trailer.encode()[..])]).unwrap();
    memfd::add_seals(fd.as_fd(), memfd::SEALS_IMMUTABLE).unwrap();
    fd
}

fn node(entries: impl IntoIterator<Item = (usize, Entry)>) -> Vec<u8> {
    let mut node = [0u64; 512];
    entries.into_iter().for_each(|(at, entry)| node[at] = entry.raw());
    node.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

fn allocated(fd: &OwnedFd) -> u64 {
    memfd::status(fd.as_fd()).unwrap().allocated_bytes
}

#[test]
fn a_snapshot_of_64_layers_can_be_gone_on_from() {
    let entries = (1..64).map(|i| (i, Entry::run(i as u8, 0)));
    let spec = Spec {
        id: 100,
        data_pages: 0,
        node_pages: 1,
        imports: (1..64).collect(),
        size_bytes: 64 * PAGE,
        root: Entry::node(0, 0),
    };
    let mut fds = vec![layer(spec, &[(0, node(entries))])];
    for id in 1..64 {
        let spec = Spec { id, data_pages: 1, node_pages: 0, imports: Vec::new(), size_bytes: 0, root: Entry::ZERO };
        fds.push(layer(spec, &[(0, vec![id; PAGE as usize])]));
    }
    let snapshot = Arc::new(Snapshot::receive(fds).unwrap());
    let segment = Segment::start_as(&snapshot).unwrap();
    segment.write(5, b"x").unwrap();
    let next = segment.snapshot().expect("a next version").0;
    assert_eq!(next.check().unwrap(), next.counts());
    assert_eq!(diff(&snapshot, &next).unwrap().len(), 1);
}

#[test]
fn receiving_fills_no_holes() {
    let holes = 4095;
    // Each layer has one node that is there, among thousands that are not.
    let top_entries = (0..64).map(|i| (i, Entry::node(i as u8, 0)));
    let mut fds = vec![];
    for i in 0..64u8 {
        let mine = node([(0, Entry::run(0, 0))]);
        let (imports, size_bytes, root, extra) = if i == 0 {
            ((1..64).collect(), 64 * 512 * PAGE, Entry::node(0, 1), vec![(2, node(top_entries.clone()))])
        } else {
            (Vec::new(), 0, Entry::ZERO, Vec::new())
        };
        let spec =
            Spec { id: if i == 0 { 100 } else { i }, data_pages: 1, node_pages: holes, imports, size_bytes, root };
        fds.push(layer(spec, &[vec![(1, mine)], extra].concat()));
    }
    let watch: Vec<OwnedFd> = fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
    let before: u64 = watch.iter().map(allocated).sum();
    let snapshot = Snapshot::receive(fds).unwrap();
    let after: u64 = watch.iter().map(allocated).sum();
    assert_eq!(snapshot.layers().len(), 64);
    assert!(after - before < 1 << 20, "receiving filled {} MiB", (after - before) >> 20);
}

#[test]
fn comparing_holes_takes_no_time() {
    let pages = 1 << 26;
    let huge = |id| {
        let spec = Spec {
            id,
            data_pages: pages,
            node_pages: 0,
            imports: Vec::new(),
            size_bytes: pages * PAGE,
            root: Entry::run(0, 0),
        };
        Snapshot::receive(vec![layer(spec, &[])]).unwrap()
    };
    let begin = std::time::Instant::now();
    assert!(diff(&huge(1), &huge(2)).unwrap().is_empty());
    assert!(begin.elapsed().as_secs() < 5, "{:?} for nothing", begin.elapsed());
}
