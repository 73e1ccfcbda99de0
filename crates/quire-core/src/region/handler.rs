//! Serving a touch in the signal handler of the thread that made it.
//!
//! Nothing is allocated here and no lock is taken. Sources that need either are asked by another thread, for which the
//! handler leaves a note in a fixed table and waits.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Instant;

use super::{Backend, Claim, Discard, Failure, Outcome, Region, RegionError, jobs, registry, stats};
use crate::Result;
use crate::sys::area::{Access, Area};
use crate::sys::fork::PerProcess;
use crate::sys::signals::Line;
use crate::sys::{futex, signals, threads};

/// Have touches of a region served in signal handlers from now on.
pub fn serve_for(region: &Arc<Region>) -> Result<()> {
    let signal = if region.backend() == Backend::Signal { &signals::BUS } else { &signals::SEGV };
    signal.claim(on_fault)?;
    BUFFERS.get_or_make(Buffers::new)?;
    if !region.is_filled_in_handlers() && THREAD.get().is_none() {
        threads::start("quire-notes", read_notes)?;
        THREAD.get_or_make(|| Ok(()))?;
    }
    Ok(())
}

fn on_fault(address: usize) -> bool {
    registry::find_in_handler(address).is_some_and(|region| region.touched_in_handler(address))
}

impl Region {
    fn touched_in_handler(&self, address: usize) -> bool {
        let started = Instant::now();
        let window = (address - self.address()) / self.window;
        if window >= self.windows.len() {
            return false;
        }
        let touched = self.address() + window * self.window;
        if !self.is_filled_in_handlers() {
            return match leave_note(self.address(), window) {
                Answer::Filled => {
                    signals::forget_repeats(touched);
                    true
                }
                Answer::Found => signals::repeats_are_few(touched),
                Answer::Failed => self.refuse(),
            };
        }
        match self.windows.claim_waiting(window) {
            Claim::Ours => {}
            Claim::Busy => return true,
            Claim::Failed => {
                self.complain(window, None);
                return self.refuse();
            }
        }
        if self.is_filled_for_handler(window) {
            let released = self.release(window, window + 1, Outcome::Unchanged);
            released.is_ok() && signals::repeats_are_few(touched)
        } else {
            self.note_touch(window);
            stats::add(&self.counters.faults, 1);
            let ahead = self.ahead.observe(window, (AHEAD / self.window).max(1));
            let outcome = self.produce_in_pieces(window);
            if let Err(error) = outcome {
                let failure = if let RegionError::Page(failure) = &error { Some(failure) } else { None };
                self.complain(window, failure);
                // Not marked as failed: there is no page to poison, and the next touch may try again.
                let released = self.release(window, window + 1, Outcome::Unchanged);
                debug_assert!(released.is_ok(), "{released:?}");
                return self.refuse();
            }
            let released = self.release(window, window + 1, Outcome::Filled);
            self.counters.served(started.elapsed());
            self.run_ahead(window + 1, (window + ahead).min(self.windows.len()));
            signals::forget_repeats(touched);
            released.is_ok()
        }
    }

    /// The touch cannot be served: SIGBUS, whichever signal told of it.
    fn refuse(&self) -> bool {
        if self.backend() == Backend::Sigsegv {
            signals::raise_bus();
        }
        false
    }

    /// Whether the toucher fills in its handler. Making room, too, needs memory and locks.
    fn is_filled_in_handlers(&self) -> bool {
        self.source.is_signal_safe() && self.discard != Discard::Pressure
    }

    /// Whether a claimed window needs no filling, because another thread has done it in between.
    pub(super) fn is_filled_for_handler(&self, window: usize) -> bool {
        match self.backend() {
            Backend::Sigsegv => self.windows.is_open(window),
            _ => self.is_resident(window, &mut [0; 64]),
        }
    }

    /// Fill a claimed window with a buffer that was made beforehand.
    fn produce_in_pieces(&self, window: usize) -> std::result::Result<(), RegionError> {
        if self.take_from_memory(window, window + 1)? {
            return Ok(());
        }
        let Some(buffers) = BUFFERS.get() else {
            return Err(Failure::new("the pager is not there", 0).into());
        };
        buffers.with(|buffer| {
            let (at, len) = self.span(window, window + 1);
            for part in (0..len).step_by(buffer.len()) {
                self.produce_bytes(at + part, &mut buffer[..(len - part).min(BUFFER)])?;
            }
            self.count_fills(window, window + 1);
            self.after_produced(window, window + 1)
        })
    }

    fn run_ahead(&self, first: usize, last: usize) {
        for window in first..last {
            if self.is_filled_for_handler(window) || !self.windows.try_claim(window) {
                continue;
            }
            let outcome = match self.produce_in_pieces(window) {
                Ok(()) => Outcome::Filled,
                Err(_) => Outcome::Unchanged, // met again when it is touched
            };
            if self.release(window, window + 1, outcome).is_err() || outcome == Outcome::Unchanged {
                return;
            }
        }
    }

    /// Fill a window that a signal handler asked for, and go on once it has its answer.
    fn serve_note(self: &Arc<Self>, note: &Note, window: usize) {
        let started = Instant::now();
        let Ok(_inside) = self.inside() else { return note.answer(Answer::Failed) };
        self.ahead.chase(window, self.most_ahead());
        match self.windows.claim_waiting(window) {
            Claim::Ours if self.is_filled_for_handler(window) => {
                let released = self.release(window, window + 1, Outcome::Unchanged);
                note.answer(if released.is_ok() { Answer::Found } else { Answer::Failed });
            }
            Claim::Ours => {
                let ahead = self.demand(window, started);
                note.answer(if ahead.is_some() { Answer::Filled } else { Answer::Failed });
                if let Some(ahead) = ahead {
                    self.go_ahead(ahead);
                }
            }
            Claim::Busy | Claim::Failed => note.answer(Answer::Failed),
        }
    }

    fn complain(&self, window: usize, failure: Option<&Failure>) {
        let (at, len) = self.span(window, window + 1);
        let mut line = Line::default();
        // A line that is too long is cut.
        let _cut = match failure {
            Some(failure) => writeln!(
                line,
                "quire: region {}: bytes {at} to {} cannot be filled: {} at byte {} (errno {})",
                self.name,
                at + len,
                failure.cause,
                failure.offset,
                failure.errno
            ),
            None => writeln!(line, "quire: region {}: bytes {at} to {} could not be filled", self.name, at + len),
        };
        signals::complain(line.text());
    }
}

/// Readahead in a handler is done before the toucher goes on, so it is shorter.
const AHEAD: usize = 1 << 20;

/// Buffers for handlers, as many as threads that fill at once.
struct Buffers {
    memory: Area,
    taken: [AtomicBool; COUNT],
}

const COUNT: usize = 32;
const BUFFER: usize = 256 << 10;

static BUFFERS: PerProcess<Buffers> = PerProcess::new();

impl Buffers {
    fn new() -> Result<Self> {
        let memory = Area::reserve(COUNT * BUFFER)?;
        memory.map_zero(0, COUNT * BUFFER, Access::ReadWrite)?;
        Ok(Self { memory, taken: [const { AtomicBool::new(false) }; COUNT] })
    }

    fn with<T>(&self, work: impl FnOnce(&mut [u8]) -> T) -> T {
        loop {
            for (place, taken) in self.taken.iter().enumerate() {
                if !taken.swap(true, Ordering::AcqRel) {
                    let outcome = self.memory.with_bytes(place * BUFFER, BUFFER, work);
                    taken.store(false, Ordering::Release);
                    return outcome;
                }
            }
            signals::pause(20_000);
        }
    }
}

/// What a handler asks another thread to fill.
struct Note {
    state: AtomicU32,
    region: AtomicUsize,
    window: AtomicUsize,
}

const FREE: u32 = 0;
const WRITING: u32 = 1;
const ASKED: u32 = 2;
const TAKEN: u32 = 3;
const SERVED: u32 = 4;
const FOUND: u32 = 5;
const FAILED: u32 = 6;

impl Note {
    fn answer(&self, answer: Answer) {
        let end = match answer {
            Answer::Filled => SERVED,
            Answer::Found => FOUND,
            Answer::Failed => FAILED,
        };
        self.state.store(end, Ordering::Release);
        futex::wake_all(&self.state);
    }
}

static NOTES: [Note; 256] =
    [const { Note { state: AtomicU32::new(FREE), region: AtomicUsize::new(0), window: AtomicUsize::new(0) } }; 256];
/// Counts notes, for the thread that reads them.
static CALLS: AtomicU32 = AtomicU32::new(0);
static THREAD: PerProcess<()> = PerProcess::new();

/// What became of a note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The window was missing and is filled.
    Filled,
    /// It was there.
    Found,
    /// It cannot be had.
    Failed,
}

/// In a handler: have another thread fill a window, and wait for it.
fn leave_note(region: usize, window: usize) -> Answer {
    let note = loop {
        let free =
            |note: &&Note| note.state.compare_exchange(FREE, WRITING, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        match NOTES.iter().find(free) {
            Some(note) => break note,
            None => signals::pause(100_000),
        }
    };
    note.region.store(region, Ordering::Release);
    note.window.store(window, Ordering::Release);
    note.state.store(ASKED, Ordering::Release);
    CALLS.fetch_add(1, Ordering::AcqRel);
    futex::wake_all(&CALLS);
    loop {
        match note.state.load(Ordering::Acquire) {
            end @ (SERVED | FOUND | FAILED) => {
                note.state.store(FREE, Ordering::Release);
                return match end {
                    SERVED => Answer::Filled,
                    FOUND => Answer::Found,
                    _ => Answer::Failed,
                };
            }
            seen => futex::wait(&note.state, seen),
        }
    }
}

fn read_notes() {
    loop {
        let seen = CALLS.load(Ordering::Acquire);
        for note in &NOTES {
            if note.state.compare_exchange(ASKED, TAKEN, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            jobs::submit(
                jobs::Kind::Note,
                Box::new(move || {
                    let region = registry::find(note.region.load(Ordering::Acquire));
                    let window = note.window.load(Ordering::Acquire);
                    match region {
                        Some((region, _)) => region.serve_note(note, window),
                        None => note.answer(Answer::Failed),
                    }
                }),
            );
        }
        futex::wait_long(&CALLS, seen);
    }
}

/// In a forked child: no handler runs, and no thread reads notes.
pub fn enter_child() {
    for note in &NOTES {
        note.state.store(FREE, Ordering::Relaxed);
    }
    THREAD.forget();
    if let Some(buffers) = BUFFERS.get() {
        buffers.taken.iter().for_each(|taken| taken.store(false, Ordering::Relaxed));
    }
}
