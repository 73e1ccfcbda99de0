//! Filling windows: what is filled at a touch, and how.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::{
    Claim, Discard, Failure, MAX_WINDOW, Outcome, PAGE_BYTES, Region, RegionError, buffers, jobs, lock, pressure, stats,
};
use crate::Result;
use crate::sys::memfd::Piece;
use crate::sys::process::Blocked;
use crate::sys::signals;

/// Bytes asked of a source at once where it does not matter: enough to make calls cheap, and small enough for the
/// second-level cache.
const CHUNK: usize = 256 << 10;
/// Readahead fills at most so many bytes, for each fill that the source can have in flight.
const AHEAD: usize = 4 << 20;
/// Chunks of one region that wait to be put in place.
const MOST_PLACING: usize = 2;
/// What a source produces in one piece is filled in one piece up to this size.
const MAX_UNIT: usize = 4 << 20;

impl Region {
    pub(super) fn chunk_bytes(&self) -> usize {
        CHUNK.max(self.window)
    }

    /// Serve a touch of a missing page that shows the byte at `offset`, in a thread of the pager's.
    pub(super) fn serve(self: &Arc<Self>, offset: usize) {
        let started = Instant::now();
        let window = offset / self.window;
        let Ok(_inside) = self.inside() else { return };
        match self.windows.claim(window) {
            // Whoever fills it wakes the toucher.
            Claim::Busy => self.ahead.chase(window, self.most_ahead()),
            Claim::Failed => self.poison(window),
            Claim::Ours => {
                if let Some(ahead) = self.demand(window, started) {
                    self.go_ahead(ahead);
                }
            }
        }
    }

    /// Fill a claimed window because it was touched, with what its source produces at once. Returns the windows to fill
    /// next while the toucher goes on, or None if the window cannot be had.
    pub(super) fn demand(&self, window: usize, started: Instant) -> Option<Range<usize>> {
        self.note_touch(window);
        stats::add(&self.counters.faults, 1);
        let ahead = if self.sparse { 0 } else { self.ahead.observe(window, self.most_ahead()) };
        let (first, last) = self.around(window);
        let (first, last) = self.claim_around(window, first, last);
        let filled = self.fill_claimed(first, last).or_else(|failure| {
            if last - first == 1 {
                return Err(failure);
            }
            // What is wrong with a neighbour is none of the toucher's business.
            self.release_or_complain(first, window, Outcome::Unchanged);
            self.release_or_complain(window + 1, last, Outcome::Unchanged);
            self.fill_claimed(window, window + 1)
        });
        match filled {
            Ok(()) => self.counters.served(started.elapsed()),
            Err(RegionError::Page(failure)) => {
                self.fail(window, failure);
                return None;
            }
            Err(RegionError::Core(error)) => {
                let at = (window * self.window) as u64;
                self.fail(window, Failure::detailed("no memory", at, &error.to_string()));
                return None;
            }
        }
        let end = (window + ahead).max(last).min(self.windows.len());
        self.ahead.reached(end);
        Some(last..end)
    }

    /// How many windows are filled ahead of a touch, at most.
    pub(super) fn most_ahead(&self) -> usize {
        (AHEAD * self.source.parallel_fills().max(1) / self.window).max(1)
    }

    /// Fill windows ahead of the toucher.
    pub(super) fn go_ahead(self: &Arc<Self>, windows: Range<usize>) {
        if windows.is_empty() {
            return;
        }
        if self.source.parallel_fills() > 1 {
            self.fill_later(windows.start, windows.end);
        } else {
            self.fill_ahead(windows.start, windows.end, true);
        }
    }

    pub(super) fn note_touch(&self, window: usize) {
        if self.order[window].load(Ordering::Relaxed) == 0 {
            self.order[window].store(self.touched.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }

    /// The windows that lie wholly in what the source produces together with a window, or that window alone.
    fn around(&self, window: usize) -> (usize, usize) {
        if self.sparse {
            return (window, window + 1);
        }
        let unit = self.source.unit((window * self.window) as u64);
        let first = (unit.start as usize).div_ceil(self.window);
        let last = if unit.end == self.size { self.windows.len() } else { unit.end as usize / self.window };
        if (first..last).contains(&window) && unit.end - unit.start <= MAX_UNIT as u64 {
            (first, last)
        } else {
            (window, window + 1)
        }
    }

    /// Claim what can be claimed around a claimed window within bounds, in one piece, skipping what is resident.
    fn claim_around(&self, window: usize, first: usize, last: usize) -> (usize, usize) {
        let mut marks = [0; MAX_UNIT / PAGE_BYTES];
        let missing =
            |window: usize, marks: &mut [u8]| !self.is_resident(window, marks) && self.windows.try_claim(window);
        let mut from = window;
        while from > first && missing(from - 1, &mut marks) {
            from -= 1;
        }
        let mut to = window + 1;
        while to < last && missing(to, &mut marks) {
            to += 1;
        }
        (from, to)
    }

    /// Whether all pages of a window are in memory. Callable in a signal handler.
    pub(super) fn is_resident(&self, window: usize, marks: &mut [u8]) -> bool {
        if !self.windows.is_open(window) {
            return false;
        }
        let (at, len) = self.span(window, window + 1);
        (0..len).step_by(marks.len() * PAGE_BYTES).all(|part| {
            let step = (marks.len() * PAGE_BYTES).min(len - part);
            let marks = &mut marks[..step / PAGE_BYTES];
            self.memory.view().residency(at + part, step, marks).is_ok() && marks.iter().all(|mark| mark & 1 != 0)
        })
    }

    /// Fill windows that are claimed and release them; on failure they stay claimed.
    fn fill_claimed(&self, first: usize, last: usize) -> std::result::Result<(), RegionError> {
        let (at, len) = self.span(first, last);
        pressure::make_room(self, len as u64)?;
        if self.take_from_memory(first, last)? {
            return Ok(self.release(first, last, Outcome::Filled)?);
        }
        let mut buffer = buffers::take(len);
        let outcome = self.ask(at, &mut buffer).and_then(|()| self.place(first, last, &buffer));
        buffers::give(buffer);
        outcome?;
        self.release(first, last, Outcome::Filled)?;
        Ok(())
    }

    /// Fill windows that are claimed; another thread puts the bytes in place, so that the source can go on at once.
    fn fill_claimed_in_two(self: &Arc<Self>, first: usize, last: usize) -> std::result::Result<(), RegionError> {
        if self.placing.load(Ordering::Acquire) >= MOST_PLACING || self.source.is_signal_safe() {
            return self.fill_claimed(first, last);
        }
        let (at, len) = self.span(first, last);
        pressure::make_room(self, len as u64)?;
        let mut buffer = buffers::take(len);
        self.ask(at, &mut buffer)?;
        self.placing.fetch_add(1, Ordering::AcqRel);
        let region = Arc::clone(self);
        jobs::submit(
            jobs::Kind::Placing,
            Box::new(move || {
                // If the process forks or the region is closed, what was produced is dropped.
                let placed = region.gate.try_enter().is_some_and(|_inside| region.place(first, last, &buffer).is_ok());
                buffers::give(buffer);
                region.placing.fetch_sub(1, Ordering::AcqRel);
                let outcome = if placed { Outcome::Filled } else { Outcome::Unchanged };
                region.release_or_complain(first, last, outcome);
            }),
        );
        Ok(())
    }

    /// Put the bytes of claimed windows in place.
    fn place(&self, first: usize, last: usize, bytes: &[u8]) -> std::result::Result<(), RegionError> {
        self.count_fills(first, last);
        self.memory.install(self.span(first, last).0, bytes)?;
        self.after_produced(first, last)
    }

    /// Install windows straight from where their source has them in memory. False if it has not. Callable in a signal
    /// handler if the source is.
    pub(super) fn take_from_memory(&self, first: usize, last: usize) -> std::result::Result<bool, RegionError> {
        let (at, len) = self.span(first, last);
        if self.nested || (at + len) as u64 > self.size {
            return Ok(false);
        }
        let Some(addr) = self.source.address_of(at as u64, len) else { return Ok(false) };
        if !self.memory.can_install_from() {
            return Ok(false);
        }
        self.count_fills(first, last);
        self.memory.install_from(at, Piece { addr, len })?;
        stats::add(&self.counters.bytes, len as u64);
        self.after_produced(first, last)?;
        Ok(true)
    }

    /// Ask the source for whole pages of bytes and install them. Allocates nothing and takes no lock by itself, so it may
    /// be called in a signal handler if the source allows it.
    pub(super) fn produce_bytes(&self, at: usize, buffer: &mut [u8]) -> std::result::Result<(), RegionError> {
        self.ask(at, buffer)?;
        self.memory.install(at, buffer)?;
        Ok(())
    }

    /// Ask the source for whole pages of bytes; behind its end they are zero.
    fn ask(&self, at: usize, buffer: &mut [u8]) -> std::result::Result<(), RegionError> {
        let len = buffer.len();
        let useful = len.min((self.size - at as u64) as usize);
        let outcome = self.ask_source(at as u64, &mut buffer[..useful]);
        if let Err(failure) = outcome {
            stats::add(&self.counters.failures, 1);
            return Err(failure.into());
        }
        buffer[useful..len].fill(0);
        stats::add(&self.counters.bytes, useful as u64);
        Ok(())
    }

    /// A source that panics has failed. Going on, the panic would end a thread that others wait for, with claims in hand.
    fn ask_source(&self, offset: u64, into: &mut [u8]) -> std::result::Result<(), Failure> {
        let ask = std::panic::AssertUnwindSafe(|| self.source.fill(offset, into));
        std::panic::catch_unwind(ask).unwrap_or_else(|_| Err(Failure::new("the source panicked", offset)))
    }

    /// Bytes of windows were installed: let the kernel have them if it may.
    pub(super) fn after_produced(&self, first: usize, last: usize) -> std::result::Result<(), RegionError> {
        if self.discard == Discard::Kernel {
            self.give_to_kernel(first, last)?;
        }
        Ok(())
    }

    fn give_to_kernel(&self, first: usize, last: usize) -> Result<()> {
        // Looked at and noted while claimed: who pins one of them later waits for the claim, and finds the note.
        let mut all = true;
        for window in first..last {
            let given = !self.windows.is_pinned(window);
            self.windows.set_given(window, given);
            all &= given;
        }
        if all {
            let (at, len) = self.span(first, last);
            return self.memory.free_lazily(at, len);
        }
        for window in (first..last).filter(|window| self.windows.is_given(*window)) {
            let (at, len) = self.span(window, window + 1);
            self.memory.free_lazily(at, len)?;
        }
        Ok(())
    }

    /// Count windows that are about to be filled. Before their pages are there, so that who has touched one finds it
    /// counted.
    pub(super) fn count_fills(&self, first: usize, last: usize) {
        stats::add(&self.counters.fills, (last - first) as u64);
        let again = (first..last).filter(|window| self.windows.was_filled(*window)).count();
        stats::add(&self.counters.refills, again as u64);
    }

    /// Give claims back and wake who waits.
    pub(super) fn release(&self, first: usize, last: usize, outcome: Outcome) -> Result<()> {
        for window in first..last {
            let (at, len) = self.span(window, window + 1);
            if outcome == Outcome::Filled {
                self.filled_at[window].store(pressure::now(), Ordering::Relaxed);
                if !self.windows.is_open(window) {
                    self.held_bytes.fetch_add(len as u64, Ordering::AcqRel);
                }
            }
            if self.windows.release(window, outcome) {
                self.memory.wake(at, len)?;
            }
        }
        Ok(())
    }

    fn release_or_complain(&self, first: usize, last: usize, outcome: Outcome) {
        if let Err(error) = self.release(first, last, outcome) {
            signals::complain(format!("quire: region {}: {error}\n", self.name).as_bytes());
        }
    }

    /// A touched window could not be filled: say so, and let touches of it fail until it is discarded.
    fn fail(&self, window: usize, failure: Failure) {
        let (at, len) = self.span(window, window + 1);
        let text = format!("quire: region {}: bytes {at} to {} cannot be filled: {failure}\n", self.name, at + len);
        signals::complain(text.as_bytes());
        lock(&self.failures).insert(window, failure);
        self.poison(window);
        self.release_or_complain(window, window + 1, Outcome::Failed);
    }

    fn poison(&self, window: usize) {
        let (at, len) = self.span(window, window + 1);
        if let Err(error) = self.memory.poison(at, len) {
            signals::complain(format!("quire: region {}: {error}\n", self.name).as_bytes());
        }
    }

    /// Fill windows nobody has asked for yet, quietly: a failure ends it, and is met again when a window is touched.
    /// `goes_on`: further than `last` if a reader comes close behind.
    fn fill_ahead(self: &Arc<Self>, first: usize, last: usize, goes_on: bool) {
        self.produce_ahead(first, last, goes_on);
        // What is still to be put in place may be what all the other threads wait for.
        jobs::help_placing();
    }

    fn produce_ahead(self: &Arc<Self>, mut first: usize, mut last: usize, goes_on: bool) {
        let mut marks = [0; CHUNK / PAGE_BYTES];
        let most = (CHUNK / self.window).max(1);
        while first < last {
            if self.is_resident(first, &mut marks) || !self.windows.try_claim(first) {
                first += 1;
                continue;
            }
            let mut end = first + 1;
            while end < last && end - first < most && !self.is_resident(end, &mut marks) && self.windows.try_claim(end)
            {
                end += 1;
            }
            if self.fill_claimed_in_two(first, end).is_err() {
                return self.release_or_complain(first, end, Outcome::Unchanged);
            }
            first = end;
            if goes_on {
                last = self.ahead.until(last, self.most_ahead()).min(self.windows.len());
            }
        }
    }

    /// The same in other threads, as many as pay off.
    pub(super) fn fill_later(self: &Arc<Self>, first: usize, last: usize) {
        let step = (self.chunk_bytes() / self.window).max(1);
        let parts = (last.saturating_sub(first)).div_ceil(step);
        let next = Arc::new(AtomicUsize::new(first));
        for _ in 0..parts.min(self.source.parallel_fills().max(1)) {
            self.fill_next_later(Arc::clone(&next), step, last);
        }
    }

    /// One step of what `fill_later` does; the next goes to the end of the queue, so that a long range neither fills the
    /// queue nor holds up who comes after it.
    fn fill_next_later(self: &Arc<Self>, next: Arc<AtomicUsize>, step: usize, last: usize) {
        // Waiting in the queue keeps no region from ending.
        let region = Arc::downgrade(self);
        jobs::submit(
            jobs::Kind::Later,
            Box::new(move || {
                let Some(region) = region.upgrade() else { return };
                let start = next.fetch_add(step, Ordering::Relaxed);
                let last = region.ahead.until(last, region.most_ahead()).min(region.windows.len());
                if start >= last {
                    return;
                }
                if let Some(inside) = region.gate.try_enter() {
                    region.fill_ahead(start, (start + step).min(last), false);
                    drop(inside);
                    region.fill_next_later(next, step, last);
                }
            }),
        );
    }

    /// Fill what is missing of windows, now.
    pub(super) fn ensure(&self, first: usize, last: usize) -> std::result::Result<(), RegionError> {
        let step = (self.chunk_bytes() / self.window).max(1);
        let parallel = self.source.parallel_fills().min((last - first).div_ceil(step));
        if parallel <= 1 {
            return self.ensure_part(first, last);
        }
        let next = AtomicUsize::new(first);
        let take_turns = || loop {
            let start = next.fetch_add(step, Ordering::Relaxed);
            if start >= last {
                return Ok(());
            }
            self.ensure_part(start, (start + step).min(last))?;
        };
        std::thread::scope(|scope| {
            // As many helpers as can be had: without any, this thread does it all.
            let start = |_| std::thread::Builder::new().spawn_scoped(scope, take_turns).ok();
            let threads: Vec<_> = {
                let _inherited = Blocked::all_but_faults();
                (1..parallel).map_while(start).collect()
            };
            let own = take_turns();
            threads.into_iter().fold(own, |outcome, thread| {
                outcome.and(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            })
        })
    }

    fn ensure_part(&self, mut first: usize, last: usize) -> std::result::Result<(), RegionError> {
        let mut marks = [0; MAX_UNIT / PAGE_BYTES];
        while first < last {
            if self.is_resident(first, &mut marks) {
                first += 1;
                continue;
            }
            if self.windows.claim_waiting(first) == Claim::Failed {
                let stored = lock(&self.failures).get(&first).cloned();
                // Discarded in between: look again.
                let Some(failure) = stored else { continue };
                return Err(failure.into());
            }
            if self.is_resident(first, &mut marks) {
                // Filled by the one we waited for.
                self.release(first, first + 1, Outcome::Unchanged)?;
                continue;
            }
            let (low, high) = self.around(first);
            let most = (first + (CHUNK / self.window).max(1)).min(last).max(high);
            let (from, to) = self.claim_around(first, low, most);
            if let Err(failure) = self.fill_claimed(from, to) {
                self.release(from, first, Outcome::Unchanged)?;
                self.release(first + 1, to, Outcome::Unchanged)?;
                let outcome = if to - from == 1 { Err(failure) } else { self.fill_claimed(first, first + 1) };
                if let Err(failure) = outcome {
                    self.release(first, first + 1, Outcome::Unchanged)?;
                    return Err(failure);
                }
            }
            first = to.max(first + 1);
        }
        Ok(())
    }

    /// Fill a claimed window again with new pages.
    pub(super) fn refill_claimed(&self, window: usize) -> std::result::Result<(), RegionError> {
        let (at, len) = self.span(window, window + 1);
        let outcome = match self.memory.take(at, len) {
            Ok(()) => self.fill_claimed(window, window + 1),
            Err(error) => Err(error.into()),
        };
        if outcome.is_err() {
            self.release(window, window + 1, Outcome::Unchanged)?;
        }
        outcome
    }
}

const _: () = assert!(MAX_WINDOW as usize >= MAX_UNIT);
