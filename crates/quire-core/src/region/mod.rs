//! Regions: memory that a source fills when it is first touched, and again after it was taken away.
//!
//! A region is cut into windows, the unit of filling. Whoever fills a window claims it first (`windows`), asks the source
//! (`fill`) and installs the bytes (`memory`). Touches of missing pages come from the pager's threads (`pager`) or from
//! the signal handler of the toucher (`handler`). `pressure` takes windows back; docs/regions.md has the whole picture.

mod ahead;
mod buffers;
mod fill;
mod fork;
mod gate;
mod handler;
mod jobs;
mod memory;
mod pager;
mod pressure;
mod recall;
mod registry;
mod stats;
mod views;
mod windows;
mod zeroed;

use std::collections::HashMap;
use std::ffi::CStr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::pages::{PAGE, PageRange, push_merged};
use crate::source::{Failure, Notes, Source};
use crate::sys::{memfd, signals};
use crate::{Error, Result, forking};

pub(crate) use fork::HANDLERS;
pub use fork::reading;
pub use memory::Backend;
pub use recall::remember_all;
pub use stats::{BUCKETS, Figures};
pub use views::View;

use ahead::Ahead;
use gate::{Gate, Inside};
use memory::Memory;
use stats::Counters;
use windows::{Claim, Outcome, Windows};
use zeroed::Zeroed;

/// The smallest and largest window, in bytes.
pub const MIN_WINDOW: u64 = PAGE;
pub const MAX_WINDOW: u64 = 16 << 20;
/// Windows are made larger until a region has no more than this many where each may become a VMA.
const MAX_SIGSEGV_WINDOWS: u64 = 8192;
const PAGE_BYTES: usize = PAGE as usize;

/// Who takes filled pages back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// The kernel, when it is short of memory.
    Kernel,
    /// This process, when the machine or its cgroup is short of memory, or a budget is spent: the coldest first.
    Pressure,
    /// Nobody but `discard`.
    Never,
}

#[derive(Debug)]
pub struct Settings {
    /// For messages.
    pub name: String,
    pub window_bytes: u64,
    pub discard: Discard,
    pub backend: Backend,
    pub executable: bool,
    /// A memfd of at least the source's size in whole pages, filled by several processes.
    pub shared: Option<OwnedFd>,
    /// Take windows back beyond so many bytes.
    pub budget_bytes: Option<u64>,
    /// Fill nothing but what is touched, even if the source produces more at once: for memory that is touched here and
    /// there. What was is noted for later processes, if the source can keep notes.
    pub sparse: bool,
}

/// Why a call on a region failed.
#[derive(Debug)]
pub enum RegionError {
    /// The source could not give the bytes.
    Page(Failure),
    Core(Error),
}

impl From<Error> for RegionError {
    fn from(error: Error) -> Self {
        Self::Core(error)
    }
}

impl From<Failure> for RegionError {
    fn from(failure: Failure) -> Self {
        Self::Page(failure)
    }
}

pub struct Region {
    name: String,
    source: Arc<dyn Source>,
    size: u64,
    window: usize,
    /// The source's bytes lie in memory of another region, so that reading them may need the pager.
    nested: bool,
    /// When it was made, among all regions.
    born: u64,
    discard: Discard,
    budget_bytes: Option<u64>,
    sparse: bool,
    memory: Memory,
    windows: Windows,
    /// When each window was first asked for by a touch, from 1 on; 0 for never.
    order: Zeroed<AtomicU32>,
    touched: AtomicU32,
    /// Where to note it for later processes. Not in forked children.
    notes: Mutex<Option<Notes>>,
    /// When each window was last filled, by the clock of `pressure`.
    filled_at: Zeroed<AtomicU32>,
    /// Bytes filled and not taken back by us; an upper bound of what is resident.
    held_bytes: AtomicU64,
    counters: Counters,
    ahead: Ahead,
    /// Chunks that were produced and wait for another thread to put them in place.
    placing: AtomicUsize,
    gate: Gate,
    /// Passed by those who touch the memory themselves, and shut by closing only: they may have to wait for somebody who
    /// fills, and has to pass `gate`.
    touching: Gate,
    pins: Mutex<HashMap<usize, u32>>,
    failures: Mutex<HashMap<usize, Failure>>,
    /// Windows that may never be taken, in forked children neither.
    kept: OnceLock<Vec<Range<usize>>>,
    /// No more touching, and then no more filling.
    closing: AtomicBool,
    closed: AtomicBool,
}

static BORN: AtomicU64 = AtomicU64::new(0);

fn closed() -> Error {
    Error::Invalid("the region is closed".to_owned())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The file of a shared region, with a name for `/proc/PID/maps`: its length is fixed for good, its content is anybody's who has it.
pub fn shared_file(name: &CStr, size: u64) -> Result<OwnedFd> {
    let file = memfd::create(name)?;
    memfd::truncate(file.as_fd(), memory_len(size) as u64)?;
    memfd::add_seals(file.as_fd(), SHARED_SEALS)?;
    Ok(file)
}

const SHARED_SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Refuse a file that could shrink under us, or is not as long as the source.
fn check_shared_file(file: BorrowedFd<'_>, size: u64) -> Result<()> {
    let len = memfd::status(file)?.size;
    let sealed = memfd::seals(file).is_some_and(|seals| {
        seals & SHARED_SEALS == SHARED_SEALS && seals & (libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE) == 0
    });
    if !sealed || !memfd::is_tmpfs(file) || len != memory_len(size) as u64 {
        return Err(Error::Malformed(format!(
            "a file of {len} bytes is not that of a shared region of {size} bytes, or is not sealed as such"
        )));
    }
    Ok(())
}

/// Bytes of memory that a source of `size` bytes takes: whole pages, and one at least.
fn memory_len(size: u64) -> usize {
    size.next_multiple_of(PAGE).max(PAGE) as usize
}

impl Region {
    /// Make a region of a source. Nothing is filled yet, except by `Backend::Eager`.
    pub fn open(source: Arc<dyn Source>, settings: Settings) -> std::result::Result<Handle, RegionError> {
        let size = source.size();
        let mut window = settings.window_bytes;
        if !window.is_power_of_two() || !(MIN_WINDOW..=MAX_WINDOW).contains(&window) {
            return Err(Error::Invalid(format!(
                "a window of {window} bytes is not a power of two from {MIN_WINDOW} to {MAX_WINDOW}"
            ))
            .into());
        }
        if size > 1 << 46 {
            return Err(Error::Invalid(format!("a region of {size} bytes is larger than the address space")).into());
        }
        while settings.backend == Backend::Sigsegv && size.div_ceil(window) > MAX_SIGSEGV_WINDOWS {
            window *= 2;
        }
        if settings.backend == Backend::Eager {
            crate::sys::memory::ensure(size, "filling a region at once")?;
        }
        if let Some(file) = &settings.shared {
            check_shared_file(file.as_fd(), size)?;
        }
        let memory = Memory::new(memory_len(size), settings.backend, settings.shared, settings.executable)?;
        let discard = match settings.discard {
            Discard::Kernel if !memory.can_free_lazily() => Discard::Never,
            Discard::Pressure if !memory.can_be_taken() => Discard::Never,
            wanted => wanted,
        };
        // One at least: there is a page that can be touched, though by none of the region's bytes.
        let count = usize::try_from(size.div_ceil(window).max(1)).expect("fits, since the size does");
        let notes = if settings.sparse { source.notes() } else { None };
        let nested = source.address_of(0, size as usize).is_some_and(|addr| registry::overlaps(addr, size as usize));
        let region = Arc::new(Self {
            name: settings.name,
            source,
            size,
            window: window as usize,
            nested,
            born: BORN.fetch_add(1, Ordering::AcqRel),
            discard,
            budget_bytes: settings.budget_bytes,
            sparse: settings.sparse,
            memory,
            windows: Windows::new(count)?,
            order: Zeroed::new(count)?,
            filled_at: Zeroed::new(count)?,
            touched: AtomicU32::new(0),
            notes: Mutex::new(notes),
            held_bytes: AtomicU64::new(0),
            counters: Counters::default(),
            ahead: Ahead::default(),
            placing: AtomicUsize::new(0),
            gate: Gate::default(),
            touching: Gate::default(),
            pins: Mutex::default(),
            failures: Mutex::default(),
            kept: OnceLock::new(),
            closing: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        });
        if settings.backend == Backend::Eager {
            fork::reading(|| region.ensure(0, count))??;
            region.memory.finish_eager()?;
        } else {
            forking::install()?;
            {
                // A fork under way has shut all older regions.
                let _no_fork = fork::closing();
                registry::add(&region)?;
            }
            pager::serve_for(&region)?;
            if discard == Discard::Pressure {
                pressure::watch();
            }
        }
        Ok(Handle(region))
    }

    #[must_use]
    pub fn address(&self) -> usize {
        self.memory.view().addr()
    }

    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    #[must_use]
    pub fn window_bytes(&self) -> usize {
        self.window
    }

    #[must_use]
    pub fn backend(&self) -> Backend {
        self.memory.backend()
    }

    /// What really takes pages back: `Kernel` and `Pressure` become `Never` where the backend would not notice.
    #[must_use]
    pub fn discard_mode(&self) -> Discard {
        self.discard
    }

    /// Whether a system call on a missing page waits for it, instead of failing with EFAULT.
    #[must_use]
    pub fn serves_system_calls(&self) -> bool {
        match self.memory.backend() {
            Backend::Eager => true,
            Backend::Thread => pager::thread_uffd().is_ok_and(|uffd| !uffd.is_user_mode_only()),
            Backend::Signal | Backend::Sigsegv => false,
        }
    }

    #[must_use]
    pub fn figures(&self) -> Figures {
        self.counters.figures()
    }

    /// The file that other processes may fill too, of a shared region.
    #[must_use]
    pub fn shared_file(&self) -> Option<BorrowedFd<'_>> {
        self.memory.shared_file()
    }

    /// Keep the region from being closed and the process from forking.
    fn inside(&self) -> Result<Inside<'_>> {
        let is_open = || !self.closed.load(Ordering::Acquire);
        self.gate.enter(is_open).ok_or_else(closed)
    }

    /// Refuse a range of bytes that does not lie within the region.
    pub fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        self.covering(offset, len).map(drop)
    }

    /// Windows that overlap a range of bytes.
    fn covering(&self, offset: u64, len: u64) -> Result<(usize, usize)> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size);
        let Some(end) = end else {
            return Err(Error::Invalid(format!(
                "bytes {offset} to {offset}+{len} are outside a region of {} bytes",
                self.size
            )));
        };
        let window = self.window as u64;
        let last = if len == 0 { offset / window } else { end.div_ceil(window) };
        Ok(((offset / window) as usize, last as usize))
    }

    /// The bytes of windows within the region's memory: offset and length, in whole pages.
    fn span(&self, first: usize, last: usize) -> (usize, usize) {
        let end = (last * self.window).min(self.memory.view().len());
        (first * self.window, end - first * self.window)
    }

    /// Fill what is missing of a range.
    pub fn prefetch(&self, offset: u64, len: u64) -> std::result::Result<(), RegionError> {
        let (first, last) = self.covering(offset, len)?;
        let _inside = self.inside()?;
        self.ensure(first, last)
    }

    /// Fill what is missing of a range in the background; failures are met when the range is touched.
    pub fn prefetch_later(self: &Arc<Self>, offset: u64, len: u64) -> Result<()> {
        let (first, last) = self.covering(offset, len)?;
        self.fill_later(first, last);
        Ok(())
    }

    /// Copy bytes out, without ever touching a page that cannot be filled.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> std::result::Result<(), RegionError> {
        /// Pages can be taken between filling and copying, but not for ever.
        const TRIES: u32 = 3;
        self.covering(offset, into.len() as u64)?;
        let is_open = || !self.closing.load(Ordering::Acquire);
        let _touching = self.touching.enter(is_open).ok_or_else(closed)?;
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let step = (self.window - at as usize % self.window).max(self.chunk_bytes()).min(into.len() - done);
            let part = &mut into[done..done + step];
            for attempt in 1.. {
                let (first, last) = self.covering(at, step as u64)?;
                {
                    let _inside = self.inside()?;
                    self.ensure(first, last)?;
                }
                if self.memory.view().copy_out(at as usize, part) == step {
                    break;
                }
                if attempt == TRIES {
                    let _inside = self.inside()?;
                    self.source.fill(at, part)?;
                    break;
                }
            }
            done += step;
        }
        Ok(())
    }

    /// Make a range resident and keep it so until `unpin`.
    pub fn pin(&self, offset: u64, len: u64) -> std::result::Result<(), RegionError> {
        let (first, last) = self.covering(offset, len)?;
        let _inside = self.inside()?;
        {
            let mut pins = lock(&self.pins);
            for window in first..last {
                *pins.entry(window).or_default() += 1;
                self.windows.set_pinned(window, true);
            }
        }
        let outcome = self.make_resident(first, last);
        if outcome.is_err() {
            self.unpin_windows(first, last)?;
        }
        outcome
    }

    fn make_resident(&self, first: usize, last: usize) -> std::result::Result<(), RegionError> {
        // Whoever fills or takes a window now may not have seen that it is pinned, so each is claimed once; who claims it
        // after us does see it.
        for window in first..last {
            if self.windows.claim_waiting(window) != Claim::Ours {
                continue; // it has failed: told below
            }
            if self.windows.is_given(window) {
                // Given once, pages can be dropped at any time: only new ones are safe.
                self.refill_claimed(window)?;
            } else {
                self.release(window, window + 1, Outcome::Unchanged)?;
            }
        }
        self.ensure(first, last)
    }

    pub fn unpin(&self, offset: u64, len: u64) -> Result<()> {
        let (first, last) = self.covering(offset, len)?;
        let _inside = self.inside()?;
        self.unpin_windows(first, last)
    }

    fn unpin_windows(&self, first: usize, last: usize) -> Result<()> {
        let mut pins = lock(&self.pins);
        for window in first..last {
            let Some(count) = pins.get_mut(&window) else { continue };
            *count -= 1;
            if *count == 0 {
                pins.remove(&window);
                if self.is_kept(window) {
                    continue;
                }
                self.windows.set_pinned(window, false);
                if self.discard == Discard::Kernel {
                    // Said before it is done: who pins it again has to know.
                    self.windows.set_given(window, true);
                    let (at, len) = self.span(window, window + 1);
                    self.memory.free_lazily(at, len)?;
                }
            }
        }
        Ok(())
    }

    /// Drop the pages of the windows that lie within a range and are not pinned, and forget failures there. Returns how
    /// many windows were dropped.
    pub fn discard(&self, offset: u64, len: u64) -> Result<usize> {
        let (mut first, mut last) = self.covering(offset, len)?;
        if offset % self.window as u64 != 0 {
            first += 1;
        }
        if offset + len != self.size && (offset + len) % self.window as u64 != 0 {
            last -= 1;
        }
        let _inside = self.inside()?;
        let mut dropped = 0;
        for window in first..last {
            if self.windows.was_used(window) && self.take(window)? {
                dropped += 1;
            }
        }
        Ok(dropped)
    }

    /// Take one window's pages; false if it is pinned.
    fn take(&self, window: usize) -> Result<bool> {
        if self.windows.is_pinned(window) || self.memory.backend() == Backend::Eager {
            return Ok(false);
        }
        let (at, len) = self.span(window, window + 1);
        if self.windows.try_claim_failed(window) {
            // A file that others show and would not miss pages of stays as it is.
            let taken = if self.memory.can_be_taken() { self.memory.take(at, len) } else { Ok(()) };
            let outcome = taken.and_then(|()| self.memory.mend(at, len));
            if outcome.is_ok() {
                lock(&self.failures).remove(&window);
                self.windows.set_taken(window);
            }
            self.release(window, window + 1, Outcome::Unchanged)?;
            return outcome.map(|()| true);
        }
        if self.windows.claim_waiting(window) != Claim::Ours {
            return Ok(false);
        }
        let was_open = self.windows.is_open(window);
        // Looked at again: whoever has pinned it since waits for the claim, and believes what it finds then.
        let outcome = if self.windows.is_pinned(window) {
            self.release(window, window + 1, Outcome::Unchanged)?;
            return Ok(false);
        } else if self.memory.can_be_taken() {
            self.take_claimed(window)
        } else {
            Ok(())
        };
        self.release(window, window + 1, Outcome::Unchanged)?;
        outcome.map(|()| was_open)
    }

    /// Take the pages of a claimed window.
    fn take_claimed(&self, window: usize) -> Result<()> {
        let (at, len) = self.span(window, window + 1);
        self.memory.take(at, len)?;
        if self.windows.is_open(window) {
            self.windows.set_taken(window);
            self.held_bytes.fetch_sub(len as u64, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Page ranges that are in memory.
    pub fn resident(&self) -> Result<Vec<PageRange>> {
        const BATCH: usize = 1 << 14;
        let mut found = Vec::new();
        let pages = (self.size as usize).div_ceil(PAGE_BYTES);
        let mut marks = vec![0; BATCH];
        for first in (0..pages).step_by(BATCH) {
            let n = BATCH.min(pages - first);
            self.memory.view().residency(first * PAGE_BYTES, n * PAGE_BYTES, &mut marks)?;
            for (i, _) in marks[..n].iter().enumerate().filter(|(_, mark)| **mark & 1 != 0) {
                push_merged(&mut found, PageRange::new((first + i) as u64, 1));
            }
        }
        Ok(found)
    }

    /// Windows that were touched while missing, in that order, by number.
    #[must_use]
    pub fn touched(&self) -> Vec<usize> {
        let mut touched: Vec<(u32, usize)> = self
            .order
            .iter()
            .enumerate()
            .map(|(window, order)| (order.load(Ordering::Relaxed), window))
            .filter(|(order, _)| *order > 0)
            .collect();
        touched.sort_unstable();
        touched.into_iter().map(|(_, window)| window).collect()
    }

    fn was_touched(&self, window: usize) -> bool {
        self.order[window].load(Ordering::Relaxed) > 0
    }

    fn close(&self) {
        if !self.closing.swap(true, Ordering::AcqRel) {
            // Whoever touches may wait for a window, and is served until it is done.
            self.touching.shut();
            self.closed.store(true, Ordering::Release);
            let _no_fork = fork::closing();
            registry::remove(self.address());
            self.gate.shut();
        }
    }
}

/// The owner's hold on a region. Dropped, it waits for what is being filled, and lets nothing be filled any more.
///
/// Threads that fill hold the region too, but do not close it: that waits for a fork, which waits for them.
pub struct Handle(Arc<Region>);

impl std::ops::Deref for Handle {
    type Target = Arc<Region>;
    fn deref(&self) -> &Arc<Region> {
        &self.0
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        /// Others have the region in hand for moments; one that is gone, because this process was forked, for ever.
        const PATIENCE: u32 = 200;
        self.0.close();
        // What the source holds is given back here, and not whenever the last of them lets go.
        for _ in 0..PATIENCE {
            if Arc::strong_count(&self.0) == 1 {
                break;
            }
            signals::pause(50_000);
        }
    }
}
