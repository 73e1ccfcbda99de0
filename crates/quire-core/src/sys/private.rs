//! Descriptors that forked children must not keep, and in which process we are.
//!
//! A child's copy of a connection would keep its other end waiting for a process that never speaks. The handler that
//! closes the copies runs in the child before anything else does, where no lock can be trusted: it walks a list of
//! atomics that only grows.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, Ordering};

use crate::Result;
use crate::sys::fork::{self, Handlers};

const NONE: i32 = -1;

struct Place {
    fd: AtomicI32,
    next: *const Place,
}

static PLACES: AtomicPtr<Place> = AtomicPtr::new(std::ptr::null_mut());
static FORKS: AtomicU64 = AtomicU64::new(0);

/// Which process this is: differs between a process and everything it forks, also where the kernel uses an id again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    id: u32,
    forks: u64,
}

#[must_use]
pub fn process() -> Process {
    Process { id: std::process::id(), forks: FORKS.load(Ordering::Acquire) }
}

/// An owned descriptor whose copy in a forked child is closed at once.
///
/// In the child the object is dead: it must be forgotten, not used nor dropped.
pub struct PrivateFd {
    place: &'static Place,
}

// SAFETY: a place is an atomic in memory that is never freed, and `next` is never changed after it was published.
unsafe impl Send for PrivateFd {}
// SAFETY: as above.
unsafe impl Sync for PrivateFd {}

impl PrivateFd {
    pub fn new(fd: OwnedFd) -> Result<Self> {
        install()?;
        let raw = fd.into_raw_fd();
        let mut at = PLACES.load(Ordering::Acquire).cast_const();
        // SAFETY: places are leaked, so every pointer in the list stays valid.
        while let Some(place) = unsafe { at.as_ref() } {
            if place.fd.compare_exchange(NONE, raw, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Ok(Self { place });
            }
            at = place.next;
        }
        let new = Box::into_raw(Box::new(Place { fd: AtomicI32::new(raw), next: std::ptr::null() }));
        loop {
            let head = PLACES.load(Ordering::Acquire);
            // SAFETY: nobody else knows the new place before the exchange below publishes it.
            unsafe { (*new).next = head };
            if PLACES.compare_exchange(head, new, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                // SAFETY: the place is leaked.
                return Ok(Self { place: unsafe { &*new } });
            }
        }
    }

    #[must_use]
    pub fn get(&self) -> BorrowedFd<'_> {
        let raw = self.place.fd.load(Ordering::Acquire);
        assert!(raw != NONE, "a descriptor of the parent was used in a forked child");
        // SAFETY: the descriptor is open as long as this object lives in the process that made it, which the
        // assertion checks.
        unsafe { BorrowedFd::borrow_raw(raw) }
    }
}

impl AsRawFd for PrivateFd {
    fn as_raw_fd(&self) -> i32 {
        self.get().as_raw_fd()
    }
}

impl Drop for PrivateFd {
    fn drop(&mut self) {
        // Out of the list first: a fork in between leaves a copy open, the other order would close what is not ours.
        let raw = self.place.fd.swap(NONE, Ordering::AcqRel);
        if raw != NONE {
            // SAFETY: the descriptor is ours and nobody finds it any more.
            unsafe { libc::close(raw) };
        }
    }
}

/// Be told of forks from now on.
pub fn install() -> Result<()> {
    static ONCE: OnceLock<i32> = OnceLock::new();
    fork::at_fork(&ONCE, &[Handlers { prepare: None, parent: None, child: Some(in_child) }])
}

extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::AcqRel);
    let mut at = PLACES.load(Ordering::Acquire).cast_const();
    // SAFETY: places are leaked, so every pointer in the list stays valid; close is safe in this handler.
    while let Some(place) = unsafe { at.as_ref() } {
        let raw = place.fd.swap(NONE, Ordering::AcqRel);
        if raw != NONE {
            // SAFETY: the descriptor is the child's copy of one that we own.
            unsafe { libc::close(raw) };
        }
        at = place.next;
    }
}

/// A value that each process makes for itself: a forked child does not see that of its parent.
pub struct PerProcess<T> {
    entry: AtomicPtr<(Process, T)>,
}

// SAFETY: the entry is published by an atomic and reached by shared references only, so what `T` allows holds.
unsafe impl<T: Send + Sync> Send for PerProcess<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for PerProcess<T> {}

impl<T> PerProcess<T> {
    #[must_use]
    pub const fn new() -> Self {
        Self { entry: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// The value of this process, made if it has none yet. The parent's stays in the child's memory, untouched: its
    /// locks may be held by threads that do not exist here.
    pub fn get(&self, make: impl FnOnce() -> T) -> &T {
        let here = process();
        let old = self.entry.load(Ordering::Acquire);
        // SAFETY: an entry of this process is freed by `drop` only; others are leaked.
        if let Some((process, value)) = unsafe { old.as_ref() } {
            if *process == here {
                return value;
            }
        }
        let new = Box::into_raw(Box::new((here, make())));
        match self.entry.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: the entry was just published, and is freed by `drop` only.
            Ok(_) => unsafe { &(*new).1 },
            Err(winner) => {
                // SAFETY: nobody else has seen ours. The winner is a thread of this process, as only such can race.
                unsafe {
                    drop(Box::from_raw(new));
                    &(*winner).1
                }
            }
        }
    }
}

impl<T> Default for PerProcess<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let entry = *self.entry.get_mut();
        // SAFETY: nobody borrows from us any more; an entry of another process is left alone.
        unsafe {
            if entry.as_ref().is_some_and(|(owner, _)| *owner == process()) {
                drop(Box::from_raw(entry));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::sys::socket::{Received, message_pair, receive};

    #[test]
    fn dropping_closes() {
        let (ours, theirs) = message_pair().expect("socketpair");
        let raw = ours.as_raw_fd();
        let private = PrivateFd::new(ours).expect("a place");
        assert_eq!(private.as_raw_fd(), raw);
        drop(private);
        let until = Instant::now() + Duration::from_secs(5);
        assert!(matches!(receive(theirs.as_fd(), &mut [0; 1], until), Received::Closed));
    }

    #[test]
    fn a_process_makes_its_value_once() {
        let value = PerProcess::new();
        assert_eq!(*value.get(|| 1), 1);
        assert_eq!(*value.get(|| 2), 1);
    }
}
