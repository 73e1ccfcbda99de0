//! Honest snapshots of many shapes, made once by the library itself; everything else is bent from these.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use quire_core::{Segment, Snapshot};

use crate::files::File;
use crate::{PAGE, Page};

/// A snapshot and its files, top layer first.
pub struct Honest {
    pub snapshot: Arc<Snapshot>,
    pub files: Vec<Rc<File>>,
}

/// A page that says what it is.
pub fn page(seed: u64) -> Page {
    let mut out = [0; PAGE as usize];
    for (i, word) in out.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (i as u64 | 1)).to_le_bytes());
    }
    out
}

fn write(segment: &Segment, page_number: u64, seed: u64) {
    let offset = page_number * PAGE;
    let len = (segment.size_bytes() - offset).min(PAGE);
    segment.write(offset, &page(seed)[..len as usize]).expect("write");
}

fn of(snapshot: Arc<Snapshot>) -> Honest {
    let files = snapshot.layers().iter().map(|layer| Rc::new(File::read(layer.fd().as_fd()))).collect();
    Honest { snapshot, files }
}

/// `versions` snapshots of a segment; before each some pages are written.
fn versions(size_bytes: u64, versions: u64, pages: impl Fn(u64) -> Vec<u64>) -> Vec<Honest> {
    let segment = Segment::new(size_bytes).expect("segment");
    let mut out = Vec::new();
    for version in 0..versions {
        for number in pages(version) {
            write(&segment, number, version << 32 | number);
        }
        out.push(of(segment.snapshot().expect("snapshot").0));
    }
    out
}

/// All shapes. The order is part of what a saved input means: append only.
pub fn all() -> Vec<Honest> {
    let mut all = Vec::new();
    all.extend(versions(3 * PAGE, 1, |_| vec![0, 1, 2]));
    all.extend(versions(100, 1, |_| vec![0]));
    all.extend(versions(9 * PAGE + 5, 3, |v| if v == 0 { (0..10).collect() } else { vec![v, 9] }));
    all.extend(versions(600 * PAGE, 2, |v| if v == 0 { (0..600).collect() } else { vec![5, 511, 512] }));
    all.extend(versions(700 * PAGE, 3, |v| vec![v, 300 + v, 690 + v]));
    all.extend(versions(((1 << 18) + 700) * PAGE, 2, |v| vec![v, 1 << 17, (1 << 18) + 650 + v]));
    all.extend(versions(1 << 40, 2, |v| vec![v, 1 << 20, (1 << 28) - 1 - v]));
    all.extend(versions(64 * PAGE, 24, |v| if v == 0 { (0..64).collect() } else { vec![v] }).pop());
    all.extend(versions(200 * PAGE, 60, |v| if v == 0 { (0..200).collect() } else { vec![3 * v, 3 * v + 1] }).pop());
    all.extend(versions(50 * PAGE, 1, |_| Vec::new()));
    all
}
