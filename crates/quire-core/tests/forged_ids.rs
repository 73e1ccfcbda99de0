//! Two snapshots share a layer, but mean different files by the id that it imports.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use quire_core::layer::{LayerId, Trailer};
use quire_core::pages::{PAGE, PageRange};
use quire_core::sys::memfd::{self, Piece};
use quire_core::table::Entry;
use quire_core::table::diff::diff;
use quire_core::{Mapping, Snapshot};

fn layer(id: u8, fill: Option<u8>, node: Option<[u64; 512]>, imports: &[u8], size_bytes: u64, root: Entry) -> OwnedFd {
    let data: Vec<u8> = fill.map_or(Vec::new(), |fill| vec![fill; PAGE as usize]);
    let nodes: Vec<u8> = node.iter().flatten().flat_map(|entry| entry.to_le_bytes()).collect();
    let trailer = Trailer {
        id: LayerId([id; 16]),
        hashed: false,
        data_pages: data.len() as u64 / PAGE,
        node_pages: nodes.len() as u64 / PAGE,
        imports: imports.iter().map(|id| LayerId([*id; 16])).collect(),
        size_bytes,
        root,
    };
    let fd = memfd::create(c"test").unwrap();
    let content = [data, nodes, trailer.encode().to_vec()].concat();
    memfd::write_pieces(fd.as_fd(), 0, &[Piece::of(&content)]).unwrap();
    memfd::add_seals(fd.as_fd(), memfd::SEALS_IMMUTABLE).unwrap();
    fd
}

#[test]
fn a_forged_id_hides_no_difference() {
    let mut node = [0; 512];
    node[1] = Entry::run(1, 0).raw();
    let top = layer(1, None, Some(node), &[2], 4 * PAGE, Entry::node(0, 0));
    let receive = |fill| {
        let below = layer(2, Some(fill), None, &[], 0, Entry::ZERO);
        Arc::new(Snapshot::receive(vec![top.try_clone().unwrap(), below]).unwrap())
    };
    let (a, b) = (receive(3), receive(4));
    assert_eq!(diff(&a, &b).unwrap(), [PageRange::new(1, 1)]);
    let mut mapping = Mapping::new(Arc::clone(&a), false).unwrap();
    mapping.advance(&b).unwrap();
    // SAFETY: the mapping has four readable pages, and nothing writes to them.
    let byte = unsafe { std::ptr::read((mapping.address() + PAGE as usize) as *const u8) };
    assert_eq!(byte, 4);
}
