//! Forks while other threads are anywhere in the library: the child finds no lock taken, and its memory whole.

mod children;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use children::{Stop, in_child};
use quire_core::Segment;
use quire_core::mapping::Mapping;
use quire_core::pages::PAGE;
use quire_core::region::{Backend, Discard, Handle, Region, Settings, reading};
use quire_core::source::{self, Memory, Plain, SnapshotBytes, Source, Zstd};

const WINDOW: u64 = 4 * PAGE;
const SIZE: u64 = 64 * WINDOW;
const BACKENDS: [Backend; 3] = [Backend::Thread, Backend::Signal, Backend::Sigsegv];
const FORKS: usize = 40;

fn byte(offset: u64) -> u8 {
    (offset ^ offset >> 8 ^ offset >> 16).to_le_bytes()[0] | 1
}

fn bytes() -> Vec<u8> {
    (0..SIZE).map(byte).collect()
}

fn open(source: Arc<dyn Source>, backend: Backend) -> Handle {
    let settings = Settings {
        name: "numbers".to_owned(),
        window_bytes: WINDOW,
        discard: Discard::Pressure,
        backend,
        executable: false,
        shared: None,
        budget_bytes: None,
        sparse: false,
    };
    Region::open(source, settings).expect("made")
}

fn memory() -> Arc<dyn Source> {
    Arc::new(Plain(Memory::from(bytes().into_boxed_slice())))
}

/// Frames of a window and a half, so that blocks are kept between windows.
fn frames() -> Arc<dyn Source> {
    let mut file = Vec::new();
    for part in bytes().chunks(WINDOW as usize * 3 / 2) {
        let mut frame = vec![0; zstd_safe::compress_bound(part.len())];
        let len = zstd_safe::compress(&mut frame[..], part, 1).expect("compressed");
        file.extend_from_slice(&frame[..len]);
    }
    let source = Zstd::new(Arc::new(Memory::from(file.into_boxed_slice())), None).expect("frames");
    while !source.is_passed() {
        source.pass().expect("whole");
    }
    Arc::new(source)
}

fn peek(region: &Region, offset: u64) -> u8 {
    assert!(offset < region.size());
    let at = (region.address() + offset as usize) as *const u8;
    // SAFETY: inside the region, which is readable and stays open.
    unsafe { at.read_volatile() }
}

fn is_right(region: &Region) -> bool {
    (0..region.size()).step_by(PAGE as usize).all(|at| peek(region, at) == byte(at))
}

/// Two threads do something again and again while this one forks, and each child sees the same as its parent.
fn fork_beside(work: impl Fn(u64) + Sync, in_each_child: impl Fn() -> bool) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&done);
        for thread in 0..2 {
            let (work, done) = (&work, &done);
            scope.spawn(move || {
                let mut round = thread;
                while !done.load(Ordering::Acquire) {
                    work(round);
                    round += 2;
                }
            });
        }
        for _ in 0..FORKS {
            assert_eq!(in_child(&in_each_child), 0);
        }
    });
}

#[test]
fn while_regions_are_opened_and_closed() {
    let regions = BACKENDS.map(|backend| open(memory(), backend));
    let open_one = |round: u64| {
        let region = open(memory(), BACKENDS[round as usize % 3]);
        assert_eq!(peek(&region, round % SIZE), byte(round % SIZE));
    };
    fork_beside(open_one, || {
        (0..3).for_each(open_one);
        regions.iter().all(|region| is_right(region))
    });
}

#[test]
fn while_threads_start_and_end() {
    let regions = BACKENDS.map(|backend| open(memory(), backend));
    fork_beside(|_| std::thread::spawn(|| {}).join().expect("ended"), || regions.iter().all(|region| is_right(region)));
}

#[test]
fn while_blocks_are_decoded_and_given_up() {
    let regions = BACKENDS.map(|backend| open(frames(), backend));
    let decode = |round: u64| {
        let region = &regions[round as usize % 3];
        assert!(is_right(region));
        region.discard(0, SIZE).expect("discarded");
        source::trim(0);
        let mut part = [0; 100];
        reading(|| frames().fill(round % (SIZE - 100), &mut part)).expect("no fork").expect("filled");
        assert_eq!(part[0], byte(round % (SIZE - 100)));
    };
    fork_beside(decode, || {
        let right = regions.iter().all(|region| is_right(region));
        source::trim(0);
        right && is_right(&open(frames(), Backend::Thread))
    });
}

#[test]
fn while_a_segment_takes_what_a_region_shows() {
    // The segment first: what gets ready for a fork must not depend on what was used first.
    let segment = Segment::new(SIZE).expect("made");
    segment.write(0, &bytes()).expect("written");
    let (first, _) = segment.snapshot().expect("sealed");
    let region = open(Arc::new(Plain(SnapshotBytes::new(first).expect("mapped"))), Backend::Thread);
    let copy = |round: u64| {
        if round % 2 == 0 {
            let at = round / 2 * PAGE % (SIZE - WINDOW);
            // SAFETY: readable, and open for longer than this runs.
            let shown =
                unsafe { std::slice::from_raw_parts((region.address() + at as usize) as *const u8, WINDOW as usize) };
            segment.write(at, shown).expect("written");
            let (version, _) = segment.snapshot().expect("sealed");
            assert_eq!(Mapping::new(version, false).expect("mapped").size_bytes(), SIZE);
        } else {
            region.discard(0, SIZE).expect("discarded");
        }
    };
    fork_beside(copy, || {
        let own = Segment::new(SIZE).expect("made");
        own.write(0, &bytes()).expect("written");
        let (version, _) = own.snapshot().expect("sealed");
        let source = Arc::new(Plain(SnapshotBytes::new(version).expect("mapped")));
        is_right(&region) && is_right(&open(source, Backend::Sigsegv))
    });
}
