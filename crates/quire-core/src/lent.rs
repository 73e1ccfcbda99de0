//! Where memory that was lent is mapped: a touch of it that fails is explained on standard error, and then goes to
//! whichever handler there was before.
//!
//! A broker can cut memory off without a word to the process that has it, so all of it is entered when it is mapped. In
//! the process that it was lent to such a touch is SIGBUS. In a forked child, which has no part in it, it is SIGSEGV.

use std::fmt::Write;
use std::ops::Range;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::Result;
use crate::sys::signals::{self, Line};

/// A lease in the table that the handlers read.
struct Entry {
    taken: AtomicBool,
    /// Odd while the entry is being changed.
    changes: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    base: AtomicUsize,
    len: AtomicUsize,
    number: AtomicU64,
    process: AtomicU32,
    closed: AtomicBool,
    told: AtomicBool,
}

/// More leases than these have no message.
pub const PLACES: usize = 2048;
static TABLE: [Entry; PLACES] = [const {
    Entry {
        taken: AtomicBool::new(false),
        changes: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        base: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        number: AtomicU64::new(0),
        process: AtomicU32::new(0),
        closed: AtomicBool::new(false),
        told: AtomicBool::new(false),
    }
}; PLACES];

/// Addresses of a lease; they are forgotten with it.
#[derive(Debug)]
pub struct Lent {
    place: Option<usize>,
}

impl Lent {
    /// Have touches of a range of addresses that fail explained.
    ///
    /// `base` is where byte 0 of the lease lies, which has `len` bytes; `number` is what the broker calls it. With more
    /// than [`PLACES`] at once, those that come last have no message.
    pub fn new(addresses: Range<usize>, base: usize, len: usize, number: u64) -> Result<Self> {
        signals::BUS.claim(on_bus)?;
        signals::SEGV.claim(on_segv)?;
        let free = |entry: &Entry| !entry.taken.swap(true, Ordering::AcqRel);
        let Some(place) = TABLE.iter().position(free) else { return Ok(Self { place: None }) };
        TABLE[place].change(|entry| {
            entry.start.store(addresses.start, Ordering::Release);
            entry.end.store(addresses.end, Ordering::Release);
            entry.base.store(base, Ordering::Release);
            entry.len.store(len, Ordering::Release);
            entry.number.store(number, Ordering::Release);
            entry.process.store(process::id(), Ordering::Release);
            entry.closed.store(false, Ordering::Release);
            entry.told.store(false, Ordering::Release);
        });
        Ok(Self { place: Some(place) })
    }

    /// The lease was given back: from now on that is what a touch is told.
    pub fn close(&self) {
        if let Some(place) = self.place {
            TABLE[place].closed.store(true, Ordering::Release);
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            let entry = &TABLE[place];
            entry.change(|entry| entry.end.store(0, Ordering::Release));
            entry.taken.store(false, Ordering::Release);
        }
    }
}

impl Entry {
    fn change(&self, change: impl FnOnce(&Self)) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        change(self);
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Write the line, once, if the address is of this lease, and the lease is this process's or not, as `ours` says.
    fn explain(&self, address: usize, ours: bool) -> bool {
        let changes = self.changes.load(Ordering::Acquire);
        let covered = (self.start.load(Ordering::Acquire)..self.end.load(Ordering::Acquire)).contains(&address);
        if !covered || (self.process.load(Ordering::Acquire) == process::id()) != ours {
            return false;
        }
        let (base, len) = (self.base.load(Ordering::Acquire), self.len.load(Ordering::Acquire));
        let number = self.number.load(Ordering::Acquire);
        let why = match (ours, self.closed.load(Ordering::Acquire)) {
            (true, false) => "was taken back by the broker",
            (true, true) => "was given back by this process",
            (false, _) => "belongs to the process that this one was forked from, and is not mapped here",
        };
        if changes % 2 == 1 || self.changes.load(Ordering::Acquire) != changes {
            return false;
        }
        if !self.told.swap(true, Ordering::AcqRel) {
            let mut line = Line::default();
            // A lease is mapped by whole pages, so a touch may lie before its first byte.
            let (sign, offset) = if address < base { ("-", base - address) } else { ("", address - base) };
            // A line that is too long is cut; this one is not.
            let _fits = writeln!(line, "quire: lease {number} of {len} bytes {why}; touched at offset {sign}{offset}");
            signals::complain(line.text());
        }
        true
    }
}

fn explain(address: usize, ours: bool) -> bool {
    TABLE.iter().any(|entry| entry.explain(address, ours))
}

fn on_bus(address: usize) -> bool {
    // What was cut already when this process was forked is SIGBUS here too.
    let _told = explain(address, true) || explain(address, false);
    false
}

fn on_segv(address: usize) -> bool {
    // In the process itself it is a store to what is only readable, say, and not about lending.
    let _told = explain(address, false);
    false
}
