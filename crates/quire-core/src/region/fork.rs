//! Regions and fork: nothing is being filled while the process forks, and the child has its own missing pages at the same
//! addresses before anything else runs there.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};

use super::gate::Gate;
use super::{buffers, handler, jobs, lock, pager, pressure, registry};
use crate::Result;
use crate::sys::fork::{self, Handlers};
use crate::sys::signals;
use crate::{forking, source};

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
    forking::install()?;
    let _inside = READS.enter(|| true);
    Ok(work())
}

/// In a child the first come before all other handlers of the library: what these map could take the addresses of regions.
pub const HANDLERS: [Handlers; 2] = [
    Handlers { prepare: None, parent: None, child: Some(reclaim) },
    Handlers { prepare: Some(prepare), parent: Some(in_parent), child: Some(in_child) },
];

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
    // Before its locks are taken: the last reference to a region drops its source.
    drop(regions);
    fork::keep_guard(Box::new(registry::lock()));
    fork::keep_guard(Box::new(source::lock_kept()));
}

extern "C" fn in_parent() {
    fork::release_guards();
    for region in registry::all() {
        region.gate.open();
    }
    READS.open();
}

extern "C" fn reclaim() {
    fork::release_guards();
    // Without allocating: whatever is mapped before this is done could take their addresses.
    for region in registry::lock().values().filter(|span| !span.is_view).filter_map(|span| span.region.upgrade()) {
        if region.memory.reclaim().is_err() {
            // Told below. Never dropped: that would unmap what is somebody else's now.
            std::mem::forget(region);
        }
    }
}

extern "C" fn in_child() {
    source::lock_kept().enter_child();
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
        *lock(&region.notes) = None;
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
