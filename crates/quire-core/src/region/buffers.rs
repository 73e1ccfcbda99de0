//! Buffers that are used again, because making one costs a fault for each of its pages.

use std::sync::Mutex;

use super::lock;
use crate::sys::fork::PerProcess;

/// Kept at once, and the largest that is kept.
const MOST: usize = 8;
const LARGEST: usize = 1 << 20;

/// In a forked child the lock may be held by a thread that is not there.
static SPARE: PerProcess<Mutex<Vec<Vec<u8>>>> = PerProcess::new();

/// A buffer of this length, with any content.
pub fn take(len: usize) -> Vec<u8> {
    let kept = SPARE.get().and_then(|spare| lock(spare).pop());
    let mut buffer = kept.unwrap_or_default();
    buffer.resize(len, 0);
    buffer
}

/// Keep a buffer for the next who needs one.
pub fn give(buffer: Vec<u8>) {
    let Ok(spare) = SPARE.get_or_make(|| Ok(Mutex::default())) else { return };
    let mut spare = lock(spare);
    if spare.len() < MOST && buffer.capacity() <= LARGEST {
        spare.push(buffer);
    }
}

/// Give up all that are kept.
pub fn trim() {
    if let Some(spare) = SPARE.get() {
        lock(spare).clear();
    }
}

pub fn enter_child() {
    SPARE.forget();
}
