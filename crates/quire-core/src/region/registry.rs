//! Which region an address belongs to: once behind a lock, for threads, and once without, for signal handlers.
//! A region has the addresses of its own memory, and those of its views (`views`).
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{Backend, Region};
use crate::{Error, Result};

static REGIONS: Mutex<BTreeMap<usize, Span>> = Mutex::new(BTreeMap::new());

/// Addresses that show a part of a region; the key they are kept under is where they start.
pub struct Span {
    pub region: Weak<Region>,
    len: usize,
    /// Where in the region they start, in bytes.
    offset: usize,
    pub is_view: bool,
}

/// A region whose touches are served in a signal handler.
struct Entry {
    start: AtomicUsize,
    end: AtomicUsize,
    region: AtomicPtr<Region>,
}

const PLACES: usize = 4096;
static TABLE: [Entry; PLACES] = [const {
    Entry { start: AtomicUsize::new(0), end: AtomicUsize::new(0), region: AtomicPtr::new(std::ptr::null_mut()) }
}; PLACES];
/// Places from here on have never been used.
static USED: AtomicUsize = AtomicUsize::new(0);

pub fn lock() -> MutexGuard<'static, BTreeMap<usize, Span>> {
    REGIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn add(region: &Arc<Region>) -> Result<()> {
    let mut regions = lock();
    let (start, end) = (region.address(), region.address() + region.memory.view().len());
    if matches!(region.backend(), Backend::Signal | Backend::Sigsegv) {
        let Some(place) = TABLE.iter().position(|entry| entry.end.load(Ordering::Acquire) == 0) else {
            return Err(Error::Unsupported(format!("more than {PLACES} regions are served by signal handlers")));
        };
        let entry = &TABLE[place];
        entry.start.store(start, Ordering::Release);
        entry.region.store(Arc::as_ptr(region).cast_mut(), Ordering::Release);
        entry.end.store(end, Ordering::Release);
        USED.fetch_max(place + 1, Ordering::AcqRel);
    }
    let len = region.memory.view().len();
    regions.insert(start, Span { region: Arc::downgrade(region), len, offset: 0, is_view: false });
    Ok(())
}

/// Make more addresses known that show a region from `offset` on.
pub fn add_view(region: &Arc<Region>, start: usize, len: usize, offset: usize) {
    lock().insert(start, Span { region: Arc::downgrade(region), len, offset, is_view: true });
}

pub fn remove_view(start: usize) {
    lock().remove(&start);
}

pub fn remove(start: usize) {
    let mut regions = lock();
    regions.remove(&start);
    for entry in &TABLE[..USED.load(Ordering::Acquire)] {
        if entry.start.load(Ordering::Acquire) == start && entry.end.load(Ordering::Acquire) != 0 {
            entry.end.store(0, Ordering::Release);
            entry.start.store(0, Ordering::Release);
            entry.region.store(std::ptr::null_mut(), Ordering::Release);
        }
    }
}

/// The region that an address shows, and which of its bytes.
pub fn find(address: usize) -> Option<(Arc<Region>, usize)> {
    let regions = lock();
    let (start, span) = regions.range(..=address).next_back()?;
    let inside = address - start;
    (inside < span.len).then(|| Some((span.region.upgrade()?, span.offset + inside)))?
}

/// Whether a range of addresses touches a region.
pub fn overlaps(address: usize, len: usize) -> bool {
    let regions = lock();
    regions.range(..address + len).next_back().is_some_and(|(start, span)| start + span.len > address)
}

pub fn all() -> Vec<Arc<Region>> {
    lock().values().filter(|span| !span.is_view).filter_map(|span| span.region.upgrade()).collect()
}

/// Find the region of an address in a signal handler. Takes no lock.
pub fn find_in_handler(address: usize) -> Option<&'static Region> {
    for entry in &TABLE[..USED.load(Ordering::Acquire)] {
        let bounds = || entry.start.load(Ordering::Acquire)..entry.end.load(Ordering::Acquire);
        let before = bounds();
        let region = entry.region.load(Ordering::Acquire);
        // Looked at twice: the place may be given to another region meanwhile. That of a region that is touched is not.
        if before.contains(&address) && !region.is_null() && bounds() == before {
            // SAFETY: a region stands in the table until it is closed, which is done by its owner and only when no views
            // of it are left; whoever touches its memory later has a dangling pointer of their own making. The reference
            // is used for the time of the handler only.
            return Some(unsafe { &*region });
        }
    }
    None
}
