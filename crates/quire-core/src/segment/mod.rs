//! Segments: growable pages with one writer. The two stages and their transitions are in docs/design.md.

mod fresh;
mod frozen;
mod rewrite;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::forking::{self, ForkAware};
use crate::layout::{Layout, vma_budget};
use crate::pages::{MAX_PAGES, PAGE, PageRange, pages_for};
use crate::snapshot::{Snapshot, Stats};
use crate::sys::area::{Access, Area};
use crate::sys::tracking::Tracking;
use crate::{Error, Result};

use fresh::Fresh;
use frozen::Frozen;

/// Address space kept free behind a segment, so that it can grow without moving.
const RESERVE_FACTOR: u64 = 8;
const RESERVE_MORE_AT_LEAST: u64 = 1 << 30;
const RESERVE_MORE_AT_MOST: u64 = 1 << 40;

/// Which of the two stages a segment is in.
#[derive(Debug)]
enum Stage {
    Fresh(Fresh),
    Frozen(Frozen),
}

/// Everything about a segment that changes, under one lock.
#[derive(Debug)]
struct State {
    area: Area,
    size_bytes: u64,
    stage: Stage,
    forked: bool,
}

/// A segment. Every method may be called from any thread.
#[derive(Debug)]
pub struct Segment(Arc<Mutex<State>>);

/// What a segment's memory is made of, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    pub private_bytes: u64,
    pub duplicate_bytes: u64,
    pub layer_bytes: u64,
    pub live_bytes: u64,
}

fn check_size(size_bytes: u64) -> Result<u64> {
    if size_bytes == 0 {
        return Err(Error::Invalid("a segment has at least one byte".to_owned()));
    }
    if size_bytes > MAX_PAGES * PAGE {
        return Err(Error::Memory(format!(
            "a segment of {size_bytes} bytes: the address space has {}",
            MAX_PAGES * PAGE
        )));
    }
    Ok(pages_for(size_bytes))
}

/// Reserve room for a segment and its growth; less of it where address space is limited.
fn reserve(pages: u64) -> Result<Area> {
    let len = pages * PAGE;
    let generous = len + (len * (RESERVE_FACTOR - 1)).clamp(RESERVE_MORE_AT_LEAST, RESERVE_MORE_AT_MOST);
    Area::reserve(generous as usize).or_else(|_| Area::reserve(len as usize))
}

impl Segment {
    /// A segment that reads zero and takes no memory until it is touched.
    pub fn new(size_bytes: u64) -> Result<Self> {
        let pages = check_size(size_bytes)?;
        Self::enlisted(|| {
            let area = reserve(pages)?;
            let fresh = Fresh::new(&area, pages)?;
            Ok(State { area, size_bytes, stage: Stage::Fresh(fresh), forked: false })
        })
    }

    /// A segment that starts as a snapshot. One that rests on a file is copied to sealed memory first.
    pub fn start_as(snapshot: &Arc<Snapshot>) -> Result<Self> {
        let tip =
            if snapshot.is_sealed() { Arc::clone(snapshot) } else { Arc::new(crate::save::copy_to_memory(snapshot)?) };
        Self::enlisted(|| {
            let area = reserve(tip.pages())?;
            let frozen = Frozen::over(&area, tip)?;
            let size_bytes = frozen.tip().size_bytes();
            Ok(State { area, size_bytes, stage: Stage::Frozen(frozen), forked: false })
        })
    }

    fn enlisted(make: impl FnOnce() -> Result<State>) -> Result<Self> {
        Ok(Self(forking::enlist(make)?))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn address(&self) -> usize {
        self.lock().area.addr()
    }

    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.lock().size_bytes
    }

    #[must_use]
    pub fn is_forked(&self) -> bool {
        self.lock().forked
    }

    /// The current content as an immutable version.
    pub fn snapshot(&self) -> Result<(Arc<Snapshot>, Stats)> {
        let start = Instant::now();
        let mut state = self.lock();
        state.usable("snapshot()")?;
        let (snapshot, mut stats) = state.publish()?;
        stats.duration_ns = start.elapsed().as_nanos() as u64;
        Ok((snapshot, stats))
    }

    /// Hand the whole content over; afterwards the segment reads zero.
    pub fn sever(&self) -> Result<(Arc<Snapshot>, Stats)> {
        let start = Instant::now();
        let mut state = self.lock();
        state.usable("sever()")?;
        let (snapshot, mut stats) = state.sever()?;
        stats.duration_ns = start.elapsed().as_nanos() as u64;
        Ok((snapshot, stats))
    }

    /// Make the segment larger; new pages read zero. True if the address stayed.
    ///
    /// It moves only if `may_move`; without that, lack of room behind it is an error.
    pub fn grow(&self, size_bytes: u64, may_move: bool) -> Result<bool> {
        let mut state = self.lock();
        state.usable("grow()")?;
        if size_bytes < state.size_bytes {
            return Err(Error::Invalid(format!(
                "a segment of {} bytes cannot shrink to {size_bytes}",
                state.size_bytes
            )));
        }
        let pages = check_size(size_bytes)?;
        state.complete()?;
        let needed = (pages * PAGE) as usize;
        let mut stayed = true;
        if needed > state.area.len() && !state.area.extend(needed) {
            if !may_move {
                return Err(Error::Exported(format!(
                    "no address space is free behind the segment for {size_bytes} bytes, and views of it are exported"
                )));
            }
            state.relocate(pages)?;
            stayed = false;
        }
        let State { area, size_bytes: old_bytes, stage, .. } = &mut *state;
        let more = PageRange::between(pages_for(*old_bytes), pages);
        match stage {
            Stage::Fresh(fresh) => fresh.grow(area, more)?,
            Stage::Frozen(frozen) => frozen.grow(area, more)?,
        }
        state.size_bytes = size_bytes;
        Ok(stayed)
    }

    /// Copy bytes in through system calls where that turns a full memory into an error.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let state = self.lock();
        let fits = offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= state.size_bytes);
        if !fits {
            return Err(Error::Invalid(format!(
                "{} bytes at {offset} do not fit in a segment of {}",
                bytes.len(),
                state.size_bytes
            )));
        }
        if bytes.len() > 1 << 26 {
            crate::sys::memory::ensure(bytes.len() as u64, "the copy")?;
        }
        let (from, to) = (bytes.as_ptr() as usize, state.area.addr() + offset as usize);
        let mut apart = Vec::new();
        let bytes = if from < to + bytes.len() && to < from + bytes.len() {
            // The source is this very memory: the calls below copy piece by piece and would read what they wrote.
            apart.try_reserve_exact(bytes.len()).map_err(|error| Error::Memory(format!("the copy: {error}")))?;
            apart.extend_from_slice(bytes);
            &apart
        } else {
            bytes
        };
        match &state.stage {
            Stage::Fresh(fresh) if !state.forked && !fresh.is_partly_private() => fresh.write(offset, bytes),
            _ => {
                state.area.store(offset as usize, bytes);
                Ok(())
            }
        }
    }

    /// What the segment's memory is made of.
    pub fn memory(&self) -> Result<Memory> {
        let state = self.lock();
        match &state.stage {
            Stage::Fresh(fresh) => fresh.memory(),
            Stage::Frozen(frozen) => frozen.memory(&state.area, state.pages()),
        }
    }

    /// Raise if anything the segment believes of itself is not so.
    pub fn check_invariants(&self) -> Result<()> {
        let state = self.lock();
        match &state.stage {
            Stage::Fresh(fresh) => fresh.check(state.pages()),
            Stage::Frozen(frozen) => frozen.check(&state.area, state.pages()),
        }
    }
}

impl State {
    fn pages(&self) -> u64 {
        pages_for(self.size_bytes)
    }

    fn usable(&self, call: &'static str) -> Result<()> {
        if self.forked {
            return Err(Error::Forked(call));
        }
        Ok(())
    }

    fn publish(&mut self) -> Result<(Arc<Snapshot>, Stats)> {
        match &mut self.stage {
            Stage::Fresh(fresh) => {
                // Stores since an attempt that failed are private copies, of which the files know nothing.
                let resumed = fresh.is_partly_private();
                let (frozen, stats) = fresh.freeze(&self.area, self.size_bytes)?;
                let tip = Arc::clone(frozen.tip());
                self.stage = Stage::Frozen(frozen);
                if resumed { self.publish() } else { Ok((tip, stats)) }
            }
            Stage::Frozen(frozen) => frozen.publish(&self.area, self.size_bytes),
        }
    }

    /// Go on with a first version that failed half-way, if one did.
    fn complete(&mut self) -> Result<()> {
        match &self.stage {
            Stage::Fresh(fresh) if fresh.is_partly_private() => self.publish().map(drop),
            _ => Ok(()),
        }
    }

    /// By way of the second stage, whose failures lose nothing: the files of the first must be sealed before they can
    /// be handed over, and must not be mapped by then.
    fn sever(&mut self) -> Result<(Arc<Snapshot>, Stats)> {
        let pages = self.pages();
        loop {
            match &mut self.stage {
                Stage::Fresh(_) => drop(self.publish()?),
                Stage::Frozen(frozen) => {
                    let (snapshot, stats, fresh) = frozen.sever(&self.area, self.size_bytes, pages)?;
                    self.stage = Stage::Fresh(fresh);
                    return Ok((snapshot, stats));
                }
            }
        }
    }

    /// Move to a larger piece of address space. Nobody may hold a view.
    fn relocate(&mut self, pages: u64) -> Result<()> {
        let (tip, _) = self.publish()?;
        let area = reserve(pages)?;
        let frozen = Frozen::over(&area, tip)?;
        self.stage = Stage::Frozen(frozen);
        self.area = area;
        Ok(())
    }
}

impl ForkAware for State {
    fn before_fork(&mut self) {
        // A shared mapping would let the child write into the parent's memory. A failure leaves the stage as it is:
        // the child is then cut off from the segment, see below.
        if !self.forked && matches!(self.stage, Stage::Fresh(_)) {
            if let Err(error) = self.publish() {
                eprintln!("quire: a segment could not be made private before fork ({error}); the child cannot use it");
            }
        }
    }

    fn enter_child(&mut self) {
        self.forked = true;
        if let Stage::Fresh(fresh) = &self.stage {
            // Still shared with the parent: better unreachable than wrong.
            if !fresh.is_private(self.pages()) {
                if let Err(error) = self.area.map_none(0, self.area.len()) {
                    eprintln!("quire: {error}");
                    std::process::abort();
                }
            }
        }
    }
}

/// Lay a snapshot out writable and tracked; the pages that had to be copied are returned.
fn lay_out(area: &Area, tip: &Snapshot) -> Result<Layout> {
    Layout::build(area, tip, Access::ReadWrite, vma_budget())
}

fn tracking() -> Result<Arc<Tracking>> {
    Tracking::current()
}
