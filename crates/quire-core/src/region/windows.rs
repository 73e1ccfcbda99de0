//! The state of each window of a region, and who fills it.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use super::zeroed::Zeroed;
use crate::Result;
use crate::sys::futex;

/// Somebody fills the window.
const FILLING: u8 = 1;
/// Somebody waits for whoever fills it, and is to be woken.
const WANTED: u8 = 2;
/// It was filled before. Its pages may have been taken since.
const FILLED: u8 = 4;
/// The last fill failed, and touches of it fail.
const FAILED: u8 = 8;
/// It is not to be taken.
const PINNED: u8 = 16;
/// It was filled and nobody has taken it back since, except perhaps the kernel.
const OPEN: u8 = 32;
/// The kernel may drop the pages that it was filled with last.
const GIVEN: u8 = 64;
/// Later processes are told of it.
const NOTED: u8 = 128;

pub struct Windows {
    states: Zeroed<AtomicU8>,
    /// Counts releases, for those who wait for one.
    releases: AtomicU32,
    waiting: AtomicU32,
}

/// What an attempt to become the one who fills a window gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Ours now: release it.
    Ours,
    /// Somebody fills it, and will wake whoever waits for its pages.
    Busy,
    /// It failed, and nobody has discarded it since.
    Failed,
}

impl Windows {
    pub fn new(count: usize) -> Result<Self> {
        Ok(Self { states: Zeroed::new(count)?, releases: AtomicU32::new(0), waiting: AtomicU32::new(0) })
    }

    pub fn len(&self) -> usize {
        self.states.len()
    }

    /// Become the one who fills a window. Takes no lock.
    pub fn claim(&self, window: usize) -> Claim {
        let state = &self.states[window];
        let mut seen = state.load(Ordering::Acquire);
        loop {
            let (next, outcome) = match seen {
                seen if seen & FILLING != 0 => (seen | WANTED, Claim::Busy),
                seen if seen & FAILED != 0 => return Claim::Failed,
                seen => (seen | FILLING, Claim::Ours),
            };
            match state.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return outcome,
                Err(now) => seen = now,
            }
        }
    }

    /// Become the one who fills a window, if nobody does and it has not failed; else leave no trace.
    pub fn try_claim(&self, window: usize) -> bool {
        let state = &self.states[window];
        let seen = state.load(Ordering::Acquire);
        seen & (FILLING | FAILED) == 0
            && state.compare_exchange(seen, seen | FILLING, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Become the one who mends a window that has failed; false if it has not, or somebody is at it.
    pub fn try_claim_failed(&self, window: usize) -> bool {
        let state = &self.states[window];
        let seen = state.load(Ordering::Acquire);
        seen & (FILLING | FAILED) == FAILED
            && state.compare_exchange(seen, seen | FILLING, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Become the one who fills a window; waits for whoever does. Callable in a signal handler.
    pub fn claim_waiting(&self, window: usize) -> Claim {
        loop {
            let seen = self.releases.load(Ordering::Acquire);
            match self.claim(window) {
                Claim::Busy => {
                    self.waiting.fetch_add(1, Ordering::AcqRel);
                    futex::wait(&self.releases, seen);
                    self.waiting.fetch_sub(1, Ordering::AcqRel);
                }
                outcome => return outcome,
            }
        }
    }

    /// Give a claim back. True: somebody may wait for the window's pages and must be woken.
    #[must_use]
    pub fn release(&self, window: usize, outcome: Outcome) -> bool {
        let (set, clear) = match outcome {
            Outcome::Filled => (FILLED | OPEN, FILLING | WANTED),
            Outcome::Failed => (FAILED, FILLING | WANTED),
            Outcome::Unchanged => (0, FILLING | WANTED),
        };
        let before = self.states[window]
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |seen| Some(seen & !clear | set))
            .unwrap_or_else(|seen| seen);
        self.releases.fetch_add(1, Ordering::AcqRel);
        if self.waiting.load(Ordering::Acquire) > 0 {
            futex::wake_all(&self.releases);
        }
        before & WANTED != 0
    }

    pub fn was_filled(&self, window: usize) -> bool {
        self.states[window].load(Ordering::Acquire) & FILLED != 0
    }

    /// Whether there may be pages, or a failure: it was filled or failed, or is being filled. Whoever touched it may go on
    /// before its filler has said that it is done.
    pub fn was_used(&self, window: usize) -> bool {
        self.states[window].load(Ordering::Acquire) & (FILLING | FILLED | FAILED) != 0
    }

    pub fn is_open(&self, window: usize) -> bool {
        self.states[window].load(Ordering::Acquire) & OPEN != 0
    }

    pub fn is_pinned(&self, window: usize) -> bool {
        self.states[window].load(Ordering::Acquire) & PINNED != 0
    }

    pub fn set_pinned(&self, window: usize, pinned: bool) {
        if pinned {
            self.states[window].fetch_or(PINNED, Ordering::AcqRel);
        } else {
            self.states[window].fetch_and(!PINNED, Ordering::AcqRel);
        }
    }

    /// Whether the kernel may drop its pages.
    pub fn is_given(&self, window: usize) -> bool {
        self.states[window].load(Ordering::Acquire) & GIVEN != 0
    }

    pub fn set_given(&self, window: usize, given: bool) {
        if given {
            self.states[window].fetch_or(GIVEN, Ordering::AcqRel);
        } else {
            self.states[window].fetch_and(!GIVEN, Ordering::AcqRel);
        }
    }

    /// Whether processes that come later are told of it.
    pub fn is_noted(&self, window: usize) -> bool {
        self.states[window].load(Ordering::Acquire) & NOTED != 0
    }

    pub fn set_noted(&self, window: usize, noted: bool) {
        if noted {
            self.states[window].fetch_or(NOTED, Ordering::AcqRel);
        } else {
            self.states[window].fetch_and(!NOTED, Ordering::AcqRel);
        }
    }

    /// Its pages were taken; whether it had failed, which is forgotten.
    pub fn set_taken(&self, window: usize) -> bool {
        self.states[window].fetch_and(!(FAILED | OPEN | GIVEN), Ordering::AcqRel) & FAILED != 0
    }

    /// In a forked child, where nobody fills anything: all are missing.
    pub fn enter_child(&self) {
        for state in self.states.iter() {
            if state.load(Ordering::Relaxed) != 0 {
                state.store(0, Ordering::Relaxed);
            }
        }
        self.waiting.store(0, Ordering::Relaxed);
    }
}

/// How a claim ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Filled,
    Failed,
    Unchanged,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_fills_and_others_are_remembered() {
        let windows = Windows::new(2).expect("memory");
        assert_eq!(windows.claim(0), Claim::Ours);
        assert!(!windows.try_claim(0));
        assert!(!windows.release(0, Outcome::Unchanged), "try_claim leaves no trace");
        assert_eq!(windows.claim(0), Claim::Ours);
        assert_eq!(windows.claim(0), Claim::Busy);
        assert!(windows.release(0, Outcome::Filled), "the second is to be woken");
        assert!(windows.was_filled(0) && !windows.was_filled(1));
    }

    #[test]
    fn a_failure_stays_until_it_is_forgotten() {
        let windows = Windows::new(1).expect("memory");
        assert_eq!(windows.claim(0), Claim::Ours);
        assert!(!windows.release(0, Outcome::Failed));
        assert_eq!(windows.claim(0), Claim::Failed);
        assert!(!windows.try_claim(0));
        assert!(windows.set_taken(0));
        assert_eq!(windows.claim(0), Claim::Ours);
    }

    #[test]
    fn a_pin_survives_fills() {
        let windows = Windows::new(1).expect("memory");
        windows.set_pinned(0, true);
        assert_eq!(windows.claim(0), Claim::Ours);
        assert!(!windows.release(0, Outcome::Filled));
        assert!(windows.is_pinned(0));
        windows.set_pinned(0, false);
        assert!(!windows.is_pinned(0) && windows.was_filled(0));
    }
}
