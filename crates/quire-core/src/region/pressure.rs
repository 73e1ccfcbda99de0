//! Taking windows back when memory is short or a budget is spent, the coldest first.
//!
//! Two occasions. Before a window is filled (`make_room`): its region's budget, and what the machine and the cgroup have
//! left, which is looked up again after a part of it was used. And when the kernel says that somebody waits for memory
//! (pressure stall information), which a thread listens for.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::time::Duration;

use super::{Discard, Outcome, Region, recall, registry};
use crate::pages::{PAGE, PageRange};
use crate::sys::fork::PerProcess;
use crate::sys::memory;
use crate::sys::pagemap::Pagemap;
use crate::sys::psi::Stall;
use crate::sys::threads;
use crate::{Error, Result};

/// So much is to stay free.
const MARGIN: u64 = 16 << 20;
/// Bytes that may be filled before looking again.
static CREDIT: AtomicI64 = AtomicI64::new(0);
/// Grows with each fill, to tell which window was filled before which.
static CLOCK: AtomicU32 = AtomicU32::new(0);

/// The time of a fill.
pub fn now() -> u32 {
    CLOCK.fetch_add(1, Ordering::Relaxed)
}

/// Before a region is filled with so many bytes.
pub fn make_room(region: &Region, bytes: u64) -> Result<()> {
    if region.discard != Discard::Pressure {
        return Ok(());
    }
    if let Some(budget) = region.budget_bytes {
        let held = region.held_bytes.load(Ordering::Acquire);
        if held + bytes > budget {
            evict(&[region], held + bytes - budget + budget / 8)?;
        }
    }
    let bytes = bytes as i64;
    if CREDIT.fetch_sub(bytes, Ordering::AcqRel) >= bytes {
        return Ok(());
    }
    let Some(mut room) = memory::available_bytes() else { return Ok(()) };
    if room < 2 * MARGIN {
        evict_all(2 * MARGIN - room + bytes as u64)?;
        room = memory::available_bytes().unwrap_or(room);
    }
    // Others fill too, so only a part of it is ours.
    CREDIT.store((room.saturating_sub(MARGIN) / 8) as i64, Ordering::Release);
    Ok(())
}

fn evict_all(bytes: u64) -> Result<u64> {
    let regions = registry::all();
    let regions: Vec<&Region> =
        regions.iter().map(Arc::as_ref).filter(|region| region.discard == Discard::Pressure).collect();
    evict(&regions, bytes)
}

/// Take windows back until so many bytes are free, those filled longest ago first. Those of shared regions that this
/// process has touched since they were last looked at are spared once.
fn evict(regions: &[&Region], bytes: u64) -> Result<u64> {
    let mut candidates: Vec<(u32, usize, usize)> = Vec::new();
    for (place, region) in regions.iter().enumerate() {
        let open = (0..region.windows.len()).filter(|window| region.windows.is_open(*window));
        candidates.extend(open.map(|window| (region.age_of(window), place, window)));
    }
    // The clock wraps: age is the distance from now.
    candidates.sort_unstable_by_key(|candidate| std::cmp::Reverse(candidate.0));
    let pagemap = Pagemap::open()?;
    let mut freed = 0;
    for spare in [true, false] {
        for &(_, place, window) in &candidates {
            if freed >= bytes {
                return Ok(freed);
            }
            freed += regions[place].evict_window(window, spare.then_some(&pagemap))?;
        }
    }
    Ok(freed)
}

impl Region {
    fn age_of(&self, window: usize) -> u32 {
        CLOCK.load(Ordering::Relaxed).wrapping_sub(self.filled_at[window].load(Ordering::Relaxed))
    }

    /// Take a window back; returns how many bytes that gave.
    fn evict_window(&self, window: usize, spare_touched: Option<&Pagemap>) -> Result<u64> {
        if self.windows.is_pinned(window) || !self.windows.is_open(window) {
            return Ok(0);
        }
        let (at, len) = self.span(window, window + 1);
        if let Some(pagemap) = spare_touched
            && self.memory.shared_file().is_some()
            && pagemap.any_present(self.address(), PageRange::new(at as u64 / PAGE, len as u64 / PAGE))?
        {
            self.filled_at[window].store(now(), Ordering::Relaxed);
            self.memory.age(at, len)?;
            return Ok(0);
        }
        // Somebody who fills it would be waited for with claims in hand: leave it.
        if !self.windows.try_claim(window) {
            return Ok(0);
        }
        // Looked at again: whoever has pinned it since waits for the claim, and believes what it finds then.
        let taken = !self.windows.is_pinned(window);
        let outcome = if taken { self.take_claimed(window) } else { Ok(()) };
        self.release(window, window + 1, Outcome::Unchanged)?;
        outcome?;
        if !taken {
            return Ok(0);
        }
        self.counters.evicted();
        Ok(len as u64)
    }
}

static LISTENER: PerProcess<()> = PerProcess::new();

/// Listen for stalls from now on. Where the kernel does not tell of them, `make_room` alone must do.
pub fn watch() {
    if LISTENER.get().is_some() {
        return;
    }
    let Ok(stall) = Stall::listen() else { return };
    if threads::start("quire-pressure", move || listen(&stall)).is_ok() {
        // Two threads, should two regions be made at once, do no harm.
        let _made = LISTENER.get_or_make(|| Ok::<(), Error>(()));
    }
}

fn listen(stall: &Stall) {
    let (mut seen, mut rested) = (now(), false);
    while let Ok(stalled) = stall.wait(Duration::from_secs(1)) {
        let fills = CLOCK.load(Ordering::Relaxed);
        if fills != std::mem::replace(&mut seen, fills) {
            rested = false;
        } else if !rested {
            rested = true;
            if recall::rest_all().is_err() {
                return;
            }
        }
        if !stalled {
            continue;
        }
        let held: u64 = registry::all()
            .iter()
            .filter(|region| region.discard == Discard::Pressure)
            .map(|region| region.held_bytes.load(Ordering::Acquire))
            .sum();
        // A part each time: the kernel tells again as long as somebody waits.
        if evict_all(held / 4).is_err() {
            return;
        }
    }
}

/// In a forked child: nothing is filled there yet.
pub fn enter_child() {
    LISTENER.forget();
    CREDIT.store(0, Ordering::Relaxed);
}
