//! Regions from Rust: every backend, with a source of numbers that can be told to fail.

mod children;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use children::{Stop, in_child};
use quire_core::region::{Backend, Discard, Region, RegionError, Settings};
use quire_core::source::{Failure, Filled, Source};

const PAGE: usize = 4096;
const WINDOW: usize = 4 * PAGE;

struct Numbers {
    size: u64,
    quick: bool,
    broken: AtomicBool,
    asked: AtomicU64,
}

impl Numbers {
    fn new(size: u64, quick: bool) -> Arc<Self> {
        Arc::new(Self { size, quick, broken: AtomicBool::new(false), asked: AtomicU64::new(0) })
    }
}

fn byte(offset: u64) -> u8 {
    (offset ^ offset >> 8 ^ offset >> 16).to_le_bytes()[0] | 1
}

impl Source for Numbers {
    fn size(&self) -> u64 {
        self.size
    }

    fn fill(&self, offset: u64, into: &mut [u8]) -> Filled {
        if self.broken.load(Ordering::Acquire) {
            return Err(Failure::new("broken", offset));
        }
        self.asked.fetch_add(into.len() as u64, Ordering::Relaxed);
        for (i, to) in into.iter_mut().enumerate() {
            *to = byte(offset + i as u64);
        }
        Ok(())
    }

    fn is_signal_safe(&self) -> bool {
        self.quick
    }
}

fn settings(backend: Backend, discard: Discard) -> Settings {
    Settings {
        name: "numbers".to_owned(),
        window_bytes: WINDOW as u64,
        discard,
        backend,
        executable: false,
        shared: None,
        budget_bytes: None,
        sparse: false,
    }
}

fn peek(region: &Region, offset: u64) -> u8 {
    assert!(offset < region.size());
    let at = (region.address() + offset as usize) as *const u8;
    // SAFETY: inside the region, which is readable and stays open.
    unsafe { at.read_volatile() }
}

const BACKENDS: [Backend; 4] = [Backend::Thread, Backend::Signal, Backend::Sigsegv, Backend::Eager];

#[test]
fn every_backend_shows_the_source() {
    for backend in BACKENDS {
        for quick in [true, false] {
            for size in [1, PAGE as u64, 3 * WINDOW as u64 + 5, 100 * WINDOW as u64] {
                let region = Region::open(Numbers::new(size, quick), settings(backend, Discard::Kernel)).expect("made");
                for at in (0..size).rev().step_by(1777) {
                    assert_eq!(peek(&region, at), byte(at), "{backend:?} {quick} {size} {at}");
                }
                let mut all = vec![0; size as usize];
                region.read(0, &mut all).expect("readable");
                assert!(all.iter().enumerate().all(|(at, b)| *b == byte(at as u64)), "{backend:?}");
            }
        }
    }
}

#[test]
fn only_what_is_touched_is_produced() {
    for backend in [Backend::Thread, Backend::Signal, Backend::Sigsegv] {
        let source = Numbers::new(1 << 32, true);
        let region = Region::open(source.clone(), settings(backend, Discard::Kernel)).expect("made");
        for at in [0, 1 << 20, 1 << 30, (1 << 32) - 1] {
            assert_eq!(peek(&region, at), byte(at));
        }
        assert_eq!(source.asked.load(Ordering::Relaxed), 4 * region.window_bytes() as u64);
        assert_eq!(region.figures().faults, 4);
    }
}

#[test]
fn many_threads_see_the_same() {
    for backend in [Backend::Thread, Backend::Signal, Backend::Sigsegv] {
        for quick in [true, false] {
            let size = 200 * WINDOW as u64;
            let region = Region::open(Numbers::new(size, quick), settings(backend, Discard::Kernel)).expect("made");
            std::thread::scope(|scope| {
                for thread in 0..4u64 {
                    let region = &region;
                    scope.spawn(move || {
                        let mut at = thread * 7919;
                        for round in 0..3000 {
                            at = (at * 1_103_515_245 + 12345 + round) % size;
                            assert_eq!(peek(region, at), byte(at), "{backend:?}");
                            if thread == 3 && round % 50 == 0 {
                                region.discard(0, size).expect("discarded");
                            }
                        }
                    });
                }
            });
        }
    }
}

#[test]
fn a_failure_is_told_and_can_be_tried_again() {
    for backend in [Backend::Thread, Backend::Signal, Backend::Sigsegv] {
        let source = Numbers::new(10 * WINDOW as u64, true);
        let region = Region::open(source.clone(), settings(backend, Discard::Kernel)).expect("made");
        assert_eq!(peek(&region, 0), byte(0));
        source.broken.store(true, Ordering::Release);
        let mut part = [0; 100];
        let failure = region.read(5 * WINDOW as u64, &mut part);
        assert!(matches!(&failure, Err(RegionError::Page(failure)) if failure.cause == "broken"), "{failure:?}");
        source.broken.store(false, Ordering::Release);
        region.read(5 * WINDOW as u64, &mut part).expect("mended");
        assert_eq!(part[0], byte(5 * WINDOW as u64));
    }
}

#[test]
fn pins_keep_pages() {
    for backend in [Backend::Thread, Backend::Signal, Backend::Sigsegv] {
        let region =
            Region::open(Numbers::new(10 * WINDOW as u64, true), settings(backend, Discard::Kernel)).expect("made");
        peek(&region, 0);
        region.pin(10, 2 * WINDOW as u64).expect("pinned");
        region.discard(0, region.size()).expect("discarded");
        let resident: u64 = region.resident().expect("told").iter().map(|range| range.len).sum();
        assert_eq!(resident, 3 * WINDOW as u64 / PAGE as u64, "{backend:?}");
        region.unpin(10, 2 * WINDOW as u64).expect("unpinned");
        region.discard(0, region.size()).expect("discarded");
        assert!(region.resident().expect("told").is_empty(), "{backend:?}");
        assert_eq!(peek(&region, 7), byte(7));
    }
}

#[test]
fn a_budget_holds() {
    let size = 400 * WINDOW as u64;
    let mut settings = settings(Backend::Thread, Discard::Pressure);
    settings.budget_bytes = Some(size / 10);
    let region = Region::open(Numbers::new(size, true), settings).expect("made");
    for round in 0..2 {
        for at in (0..size).step_by(PAGE) {
            assert_eq!(peek(&region, at), byte(at), "{round}");
        }
        let resident: u64 = region.resident().expect("told").iter().map(|range| range.len * PAGE as u64).sum();
        // What is under way at the time comes on top.
        assert!(resident <= size / 10 + (1 << 20), "{resident}");
    }
    assert!(region.figures().evictions > 300);
}

#[test]
fn a_forked_child_reads_the_right_bytes() {
    for backend in BACKENDS {
        for quick in [true, false] {
            let size = 50 * WINDOW as u64;
            let region = Region::open(Numbers::new(size, quick), settings(backend, Discard::Kernel)).expect("made");
            for at in (0..size / 2).step_by(PAGE) {
                assert_eq!(peek(&region, at), byte(at));
            }
            let right = || (0..size).step_by(PAGE).all(|at| peek(&region, at) == byte(at));
            let grandchild = || in_child(right) == 0 && right();
            assert_eq!(in_child(right), 0, "{backend:?} {quick}");
            assert_eq!(in_child(grandchild), 0, "{backend:?} {quick}");
            assert!(right());
        }
    }
}

#[test]
fn forking_while_others_touch() {
    for backend in [Backend::Thread, Backend::Signal, Backend::Sigsegv] {
        for quick in [true, false] {
            let size = 300 * WINDOW as u64;
            let region = Region::open(Numbers::new(size, quick), settings(backend, Discard::Kernel)).expect("made");
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let (region, done) = (&region, &done);
                let _stop = Stop(done);
                for thread in 0..2u64 {
                    scope.spawn(move || {
                        let mut at = thread;
                        while !done.load(Ordering::Acquire) {
                            at = (at * 1_103_515_245 + 12345) % size;
                            assert_eq!(peek(region, at), byte(at));
                            if at % 97 == 0 {
                                region.discard(0, size).expect("discarded");
                            }
                        }
                    });
                }
                for _ in 0..20 {
                    let right = || (0..size).step_by(WINDOW).all(|at| peek(region, at) == byte(at));
                    assert_eq!(in_child(right), 0, "{backend:?} {quick}");
                }
            });
        }
    }
}

#[test]
fn a_touch_that_cannot_be_served_ends_the_toucher() {
    for (backend, signal) in
        [(Backend::Thread, libc::SIGBUS), (Backend::Signal, libc::SIGBUS), (Backend::Sigsegv, libc::SIGBUS)]
    {
        for quick in [true, false] {
            let status = in_child(|| {
                let source = Numbers::new(10 * WINDOW as u64, quick);
                let region = Region::open(source.clone(), settings(backend, Discard::Kernel)).expect("made");
                source.broken.store(true, Ordering::Release);
                peek(&region, 0) == 0
            });
            assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == signal, "{backend:?} {quick} {status:#x}");
        }
    }
}

#[test]
fn a_store_to_a_region_is_a_fault_like_any_other() {
    for backend in BACKENDS {
        let status = in_child(|| {
            let region =
                Region::open(Numbers::new(WINDOW as u64, true), settings(backend, Discard::Kernel)).expect("made");
            peek(&region, 0);
            // SAFETY: a store to read-only memory ends this process, which is what is tested.
            unsafe { (region.address() as *mut u8).write_volatile(0) };
            true
        });
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{backend:?} {status:#x}");
    }
}

#[test]
fn a_poisoned_window_recovers_after_discard() {
    let source = Numbers::new(10 * WINDOW as u64, true);
    let region = Region::open(source.clone(), settings(Backend::Thread, Discard::Kernel)).expect("made");
    source.broken.store(true, Ordering::Release);
    let mut byte_read = [0u8; 1];
    // A system call meets the poison as EFAULT or EHWPOISON and does not end the process.
    let (from, to) = (region.address() as *mut libc::c_void, byte_read.as_mut_ptr().cast());
    let local = libc::iovec { iov_base: to, iov_len: 1 };
    let remote = libc::iovec { iov_base: from, iov_len: 1 };
    // SAFETY: the kernel checks the remote range; the local one is a byte of ours.
    let n = unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    assert_eq!(n, -1);
    assert!(matches!(region.read(0, &mut byte_read), Err(RegionError::Page(_))));
    source.broken.store(false, Ordering::Release);
    assert!(matches!(region.read(0, &mut byte_read), Err(RegionError::Page(_))), "stays failed until discarded");
    assert_eq!(region.discard(0, region.size()).expect("discarded"), 1);
    assert_eq!(peek(&region, 0), byte(0));
}
