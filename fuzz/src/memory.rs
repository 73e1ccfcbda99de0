//! An allocator that ends the run when one input makes the library hold too much.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What one input may make the process allocate.
pub const MOST_BYTES: usize = 100 << 20;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system's allocator, counting.
pub struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; the counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        add(size);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn add(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
    if live > LIMIT.load(Ordering::Relaxed) {
        // The message may allocate too.
        LIMIT.store(usize::MAX, Ordering::Relaxed);
        eprintln!("more than {MOST_BYTES} bytes of heap for one input; the last allocation had {bytes}");
        std::process::abort();
    }
}

/// Run one input; abort if it holds more than `MOST_BYTES` more at any time.
pub fn bounded(run: impl FnOnce()) {
    LIMIT.store(LIVE.load(Ordering::Relaxed).saturating_add(MOST_BYTES), Ordering::Relaxed);
    run();
    LIMIT.store(usize::MAX, Ordering::Relaxed);
}
