//! Holding writers: while a `Hold` lives, stores to its range wait; reads go on.
//!
//! Two ways. A second, synchronous userfaultfd registered for missing pages and write protection: the kernel
//! lets storing threads sleep until they are woken. Or mprotect to read-only and a SIGSEGV handler in which the
//! storing thread waits; every fault that is not ours goes to the handler installed before.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pages::{PageRange, push_merged};
use crate::sys::area::{Access, Area};
use crate::sys::signals;
use crate::sys::tracking::Tracking;
use crate::sys::uffd::{self, Uffd};
use crate::{Error, Result};

/// What is held, and so how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Every store. Pages without memory are marked one by one, so this is for ranges that have memory.
    Stores,
    /// Every store, and every touch of a page without memory, at no cost for those. The holder itself must not touch
    /// such a page: it would wait for itself.
    SparseStores,
    /// Only touches of pages without memory, so that holes stay holes.
    NewPages,
}

/// Writers of some ranges wait while this lives.
pub struct Hold<'a> {
    area: &'a Area,
    parts: Vec<(PageRange, How)>,
}

enum How {
    Userfault(Arc<Uffd>),
    Signal(usize),
}

/// The synchronous userfaultfds: one that marks unpopulated pages, one that reports them missing.
#[derive(Default)]
pub(crate) struct Synchronous {
    marking: Option<Arc<Uffd>>,
    missing: Option<Arc<Uffd>>,
}

static SYNCHRONOUS: Mutex<Synchronous> = Mutex::new(Synchronous { marking: None, missing: None });

pub(crate) fn lock() -> MutexGuard<'static, Synchronous> {
    SYNCHRONOUS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn synchronous(what: What) -> Result<Arc<Uffd>> {
    let mut guard = lock();
    let common = uffd::FEATURE_PAGEFAULT_FLAG_WP | uffd::FEATURE_WP_HUGETLBFS_SHMEM;
    let (place, features) = match what {
        What::Stores => (&mut guard.marking, common | uffd::FEATURE_WP_UNPOPULATED),
        What::SparseStores | What::NewPages => (&mut guard.missing, common | uffd::FEATURE_MISSING_SHMEM),
    };
    if let Some(uffd) = place {
        return Ok(Arc::clone(uffd));
    }
    let uffd = Arc::new(Uffd::open(features)?);
    *place = Some(Arc::clone(&uffd));
    Ok(uffd)
}

impl<'a> Hold<'a> {
    /// Hold the writers of ranges. Registration with the tracker is lost: register what is there after the drop.
    pub fn new(area: &'a Area, parts: &[(PageRange, What)], tracking: &Tracking) -> Result<Self> {
        let mut hold = Self { area, parts: Vec::with_capacity(parts.len()) };
        let Some(marks) = tracking.uffd() else {
            remember(area);
            let mut ranges = Vec::new();
            parts.iter().for_each(|&(range, _)| push_merged(&mut ranges, range));
            for range in ranges {
                let addr = area.addr() + range.byte_offset();
                hold.parts.push((range, How::Signal(announce(addr, addr + range.byte_len())?)));
                area.protect(range.byte_offset(), range.byte_len(), Access::Read)?;
            }
            return Ok(hold);
        };
        for &(range, what) in parts {
            let addr = area.addr() + range.byte_offset();
            let uffd = synchronous(what)?;
            marks.unregister(addr, range.byte_len())?;
            let mode = match what {
                What::Stores => uffd::MODE_WP,
                What::SparseStores => uffd::MODE_MISSING | uffd::MODE_WP,
                What::NewPages => uffd::MODE_MISSING,
            };
            uffd.register(addr, range.byte_len(), mode)?;
            hold.parts.push((range, How::Userfault(Arc::clone(&uffd))));
            if what != What::NewPages {
                uffd.write_protect(addr, range.byte_len())?;
            }
        }
        Ok(hold)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        for (range, how) in &self.parts {
            let (addr, len) = (self.area.addr() + range.byte_offset(), range.byte_len());
            match how {
                How::Userfault(uffd) => {
                    // Parts that were not replaced are released by unregistering; neither call can fail for a range
                    // that is mapped throughout, and a thread left waiting could not be helped otherwise.
                    let released = uffd.unregister(addr, len).and(uffd.wake(addr, len));
                    debug_assert!(released.is_ok(), "{released:?}");
                }
                How::Signal(slot) => {
                    let opened = self.area.protect(range.byte_offset(), len, Access::ReadWrite);
                    debug_assert!(opened.is_ok(), "{opened:?}");
                    HELD[*slot].state.store(RELEASED, Ordering::Release);
                }
            }
        }
    }
}

/// A range that is held by mprotect.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    state: AtomicUsize,
}

const RELEASED: usize = 0;
const CHANGING: usize = 1;
const ACTIVE: usize = 2;
const SLOTS: usize = 64;
static HELD: [Slot; SLOTS] =
    [const { Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), state: AtomicUsize::new(RELEASED) } }; SLOTS];
/// Areas in which something was ever held. A store may fault while its range is held and reach the handler when the
/// range, and even its slot, is long in other use: such a store must be repeated, not reported. Entries are never
/// removed, only overwritten by later ones when the table is full.
static AREAS: [(AtomicUsize, AtomicUsize); AREA_COUNT] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; AREA_COUNT];
const AREA_COUNT: usize = 1024;

fn remember(area: &Area) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let (start, end) = (area.addr(), area.addr() + area.len());
    let known = |entry: &(AtomicUsize, AtomicUsize)| {
        entry.0.load(Ordering::Acquire) == start && entry.1.load(Ordering::Acquire) == end
    };
    if !AREAS.iter().any(known) {
        let entry = &AREAS[NEXT.fetch_add(1, Ordering::AcqRel) % AREA_COUNT];
        entry.1.store(0, Ordering::Release);
        entry.0.store(start, Ordering::Release);
        entry.1.store(end, Ordering::Release);
    }
}

fn announce(start: usize, end: usize) -> Result<usize> {
    signals::SEGV.claim(on_fault)?;
    for (i, slot) in HELD.iter().enumerate() {
        if slot.state.compare_exchange(RELEASED, CHANGING, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            slot.start.store(start, Ordering::Release);
            slot.end.store(end, Ordering::Release);
            slot.state.store(ACTIVE, Ordering::Release);
            return Ok(i);
        }
    }
    Err(Error::Unsupported(format!("more than {SLOTS} segments are taking a snapshot at once")))
}

fn on_fault(addr: usize) -> bool {
    let is_ours =
        AREAS.iter().any(|(start, end)| (start.load(Ordering::Acquire)..end.load(Ordering::Acquire)).contains(&addr));
    if is_ours {
        for slot in &HELD {
            let inside = || (slot.start.load(Ordering::Acquire)..slot.end.load(Ordering::Acquire)).contains(&addr);
            while slot.state.load(Ordering::Acquire) == ACTIVE && inside() {
                signals::pause(50_000);
            }
        }
    }
    is_ours && signals::repeats_are_few(addr)
}
