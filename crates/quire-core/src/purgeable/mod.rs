//! Memory that the kernel may take while it is unlocked, and that says truly whether it did.

mod runs;
mod store;

use std::sync::{Arc, Mutex};

use crate::forking::{self, ForkAware};
use crate::pages::{PAGE, PageRange, pages_for, push_merged};
use crate::sys::area::{Access, Area};
use crate::sys::lazyfree;
use crate::sys::pagemap::Pagemap;
use crate::{Error, Result};

pub use store::{Counters, Entry, Store};

/// No word of the page is needed to know its content: it is all zero, and reads so whether it was taken or not.
const ALL_ZERO: u16 = u16::MAX;

/// Pages found lost are given back in lots of this many, so that asking for lost memory does not allocate it.
const LOT: u64 = 64;

/// Zero-filled private memory with two states.
///
/// Locked, it is like any other memory. Unlocked, the kernel may take its pages one by one, and nobody may rely on what
/// it shows.
#[derive(Debug)]
pub struct Purgeable {
    area: Area,
    size_bytes: u64,
    /// While unlocked: for each page which of its words proves that it is there.
    proofs: Option<Vec<u16>>,
    /// Pages that the last `lock` found taken.
    lost: Vec<PageRange>,
}

impl Purgeable {
    /// Reserve memory, locked. It is shared as a mutex so that a fork waits for what runs.
    pub fn new(size_bytes: u64) -> Result<Arc<Mutex<Self>>> {
        if size_bytes == 0 || size_bytes > crate::pages::MAX_PAGES * PAGE {
            return Err(Error::Invalid(format!(
                "a size of {size_bytes} bytes is not 1 to {}",
                crate::pages::MAX_PAGES * PAGE
            )));
        }
        forking::enlist(|| {
            let area = Area::reserve((pages_for(size_bytes) * PAGE) as usize)?;
            area.map_zero(0, area.len(), Access::ReadWrite)?;
            Ok(Self { area, size_bytes, proofs: None, lost: Vec::new() })
        })
    }

    #[must_use]
    pub const fn address(&self) -> usize {
        self.area.addr()
    }

    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    #[must_use]
    pub const fn is_locked(&self) -> bool {
        self.proofs.is_none()
    }

    /// Pages that the last `lock` found taken, ascending and merged.
    #[must_use]
    pub fn lost(&self) -> &[PageRange] {
        &self.lost
    }

    /// Let the kernel take pages. Nobody may store to the memory until it is locked again.
    pub fn unlock(&mut self) -> Result<()> {
        if self.proofs.is_some() {
            return Ok(());
        }
        let mut proofs = vec![ALL_ZERO; pages_for(self.size_bytes) as usize];
        for range in self.populated() {
            for page in range.start..range.end() {
                if let Some(word) = lazyfree::first_word(&self.area, (page * PAGE) as usize) {
                    proofs[page as usize] = word;
                }
            }
        }
        let outcome = lazyfree::release(&self.area, 0, self.area.len());
        self.proofs = Some(proofs);
        if outcome.is_err() {
            // Part of it may have been released, so every page is taken back.
            self.lock();
        }
        outcome
    }

    /// Take the memory back; true if all of it survived. Pages that did not read zero.
    pub fn lock(&mut self) -> bool {
        let Some(proofs) = self.proofs.take() else { return true };
        self.lost.clear();
        let mut lot: Vec<PageRange> = Vec::new();
        let mut in_lot = 0;
        for (page, &word) in (0..).zip(&proofs) {
            if word == ALL_ZERO {
                continue;
            }
            if lazyfree::hold(&self.area, (page * PAGE) as usize + usize::from(word) * 8) == 0 {
                push_merged(&mut self.lost, PageRange::new(page, 1));
                push_merged(&mut lot, PageRange::new(page, 1));
                in_lot += 1;
                if in_lot == LOT {
                    self.give_back(&mut lot);
                    in_lot = 0;
                }
            }
        }
        self.give_back(&mut lot);
        self.lost.is_empty()
    }

    /// Holding a lost page allocated a zero one, which shows nothing else than none does.
    fn give_back(&self, lot: &mut Vec<PageRange>) {
        for range in lot.drain(..) {
            self.area.advise(range.byte_offset(), range.byte_len(), libc::MADV_DONTNEED);
        }
    }

    /// Pages that may hold data, in memory or swapped out. Without a page map that is all of them.
    fn populated(&self) -> Vec<PageRange> {
        let all = PageRange::new(0, pages_for(self.size_bytes));
        let mut found = Vec::new();
        if all.len > LOT {
            let asked = Pagemap::open().and_then(|map| map.private_pages(self.area.addr(), all, &mut found));
            if asked.is_ok() {
                return found;
            }
        }
        vec![all]
    }
}

/// A child has the same pages, copied on write, and the kernel takes those of each by themselves: nothing is to be done
/// but that no thread is in the middle of a call.
impl ForkAware for Purgeable {
    fn before_fork(&mut self) {}

    fn enter_child(&mut self) {}

    fn lives_on_in_child(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = PAGE as usize;

    fn purgeable(pages: u64) -> Arc<Mutex<Purgeable>> {
        Purgeable::new(pages * PAGE).expect("memory")
    }

    #[test]
    fn what_survives_is_there_and_what_does_not_is_named() {
        let shared = purgeable(200);
        let mut memory = shared.lock().expect("no panic");
        for page in 0..200 {
            memory.area.store(page * BYTES + page, &[1]);
        }
        memory.area.store(7 * BYTES, &[0; BYTES]);
        memory.unlock().expect("MADV_FREE");
        assert!(!memory.is_locked());
        // What the kernel does when memory is short, done by hand; page 7 is all zero and so cannot be lost.
        memory.area.drop_private(3 * BYTES, 5 * BYTES).expect("MADV_DONTNEED");
        memory.area.drop_private(100 * BYTES, 80 * BYTES).expect("MADV_DONTNEED");
        assert!(!memory.lock());
        assert_eq!(memory.lost(), [PageRange::new(3, 4), PageRange::new(100, 80)]);
        let there = lazyfree::resident(&memory.area, 0, memory.area.len()).expect("mincore");
        assert!(!there[100] && there[99], "a lost page costs nothing");
        assert!(memory.area.page_is_zero(3 * BYTES));
        assert!(!memory.area.page_is_zero(2 * BYTES));
        memory.unlock().expect("MADV_FREE");
        assert!(memory.lock());
        assert_eq!(memory.lost(), []);
    }

    #[test]
    fn locking_twice_and_unlocking_twice_do_nothing() {
        let shared = purgeable(2);
        let mut memory = shared.lock().expect("no panic");
        assert!(memory.lock());
        memory.unlock().expect("MADV_FREE");
        memory.unlock().expect("MADV_FREE");
        assert!(memory.lock());
        assert!(memory.is_locked());
    }
}
