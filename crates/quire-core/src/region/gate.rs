//! A gate that those who fill pass, and that closing and forking shut.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::futex;

/// Counts who is inside; the highest bit says that the gate is shut.
#[derive(Default)]
pub struct Gate(AtomicU32);

const SHUT: u32 = 1 << 31;

impl Gate {
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Go in; waits while the gate is shut, as long as `is_wanted` says so.
    pub fn enter(&self, is_wanted: impl Fn() -> bool) -> Option<Inside<'_>> {
        loop {
            if let Some(inside) = self.try_enter() {
                return Some(inside);
            }
            if !is_wanted() {
                return None;
            }
            let seen = self.0.load(Ordering::Acquire);
            if seen & SHUT != 0 {
                futex::wait(&self.0, seen);
            }
        }
    }

    /// Go in, unless the gate is shut.
    pub fn try_enter(&self) -> Option<Inside<'_>> {
        let enter = |seen: u32| (seen & SHUT == 0).then_some(seen + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, enter).ok().map(|_| Inside(self))
    }

    /// Shut the gate and wait until nobody is inside.
    pub fn shut(&self) {
        self.0.fetch_or(SHUT, Ordering::AcqRel);
        loop {
            let seen = self.0.load(Ordering::Acquire);
            if seen & !SHUT == 0 {
                return;
            }
            futex::wait(&self.0, seen);
        }
    }

    /// In a forked child: open, with nobody inside.
    pub fn enter_child(&self) {
        self.0.store(0, Ordering::Release);
    }

    pub fn open(&self) {
        self.0.fetch_and(!SHUT, Ordering::AcqRel);
        futex::wake_all(&self.0);
    }
}

/// Somebody is inside.
pub struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let before = self.0.0.fetch_sub(1, Ordering::AcqRel);
        if before & SHUT != 0 {
            futex::wake_all(&self.0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shutting_waits_for_who_is_inside() {
        let gate = Gate::default();
        let inside = gate.try_enter().expect("open");
        std::thread::scope(|scope| {
            let shutting = scope.spawn(|| gate.shut());
            while gate.try_enter().is_some() {
                std::thread::yield_now();
            }
            assert!(!shutting.is_finished());
            drop(inside);
            shutting.join().expect("no panic");
        });
        assert!(gate.enter(|| false).is_none());
        gate.open();
        assert!(gate.enter(|| false).is_some());
    }
}
