//! Regions and fork: nothing is being filled while the process forks, and the child has its own missing pages at the same
//! addresses before anything else runs there.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, OnceLock};

use super::gate::Gate;
use super::{buffers, handler, jobs, lock, pager, pressure, registry};
use crate::Result;
use crate::sys::{fork, signals};

/// Held while a region is made known or closed and while the process forks, so that none is half closed in the child.
static CLOSING: Mutex<()> = Mutex::new(());

pub fn closing() -> MutexGuard<'static, ()> {
    lock(&CLOSING)
}

/// Passed by those who ask a source with no region in between.
static READS: Gate = Gate::new();

/// Use a source with no region in between. A fork waits until that is done: locks of the source's, held then, would stay
/// held in the child.
pub fn reading<T>(work: impl FnOnce() -> T) -> Result<T> {
    enlist()?;
    let _inside = READS.enter(|| true);
    Ok(work())
}

/// Be told of forks from now on.
pub fn enlist() -> Result<()> {
    static ONCE: OnceLock<i32> = OnceLock::new();
    fork::at_fork(&ONCE, Some(prepare), Some(in_parent), Some(in_child))
}

extern "C" fn prepare() {
    // Before the regions: a source may lie in the memory of one.
    READS.shut();
    fork::keep_guard(Box::new(closing()));
    // The youngest first: who fills a region may have to wait for an older one, in whose memory its source lies.
    let mut regions = registry::all();
    regions.sort_unstable_by_key(|region| std::cmp::Reverse(region.born));
    for region in &regions {
        region.gate.shut();
    }
    fork::keep_guard(Box::new(registry::lock()));
}

extern "C" fn in_parent() {
    fork::release_guards();
    for region in registry::all() {
        region.gate.open();
    }
    READS.open();
}

extern "C" fn in_child() {
    fork::release_guards();
    // First of all, and without allocating: whatever is mapped from here on could take their addresses.
    for region in registry::lock().values().filter(|span| !span.is_view).filter_map(|span| span.region.upgrade()) {
        if region.memory.reclaim().is_err() {
            // Told below. Never dropped: that would unmap what is somebody else's now.
            std::mem::forget(region);
        }
    }
    READS.enter_child();
    pager::enter_child();
    jobs::enter_child();
    buffers::enter_child();
    handler::enter_child();
    pressure::enter_child();
    for region in registry::all() {
        region.windows.enter_child();
        region.counters.enter_child();
        region.placing.store(0, Ordering::Relaxed);
        region.held_bytes.store(0, Ordering::Relaxed);
        region.source.enter_child();
        lock(&region.pins).clear();
        region.keep_again();
        lock(&region.failures).clear();
        // Unmapped memory, should it come to that, cannot be mistaken for zeros.
        let outcome = region.memory.enter_child().and_then(|()| pager::serve_for(&region));
        if let Err(error) = outcome {
            let text = format!("quire: region {}: lost in the forked child: {error}\n", region.name);
            signals::complain(text.as_bytes());
        }
        region.gate.enter_child();
        region.touching.enter_child();
    }
}
