//! What happens around `fork`: locks are taken before it and released after it on both sides.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::{Error, Result};

thread_local! {
    /// Guards taken by `prepare`, dropped by the thread that forked, in the parent and, as its copy, in the child.
    static GUARDS: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(Vec::new()) };
}

/// What is called around a fork.
pub type Handler = extern "C" fn();

/// Handlers that belong together.
#[derive(Clone, Copy)]
pub struct Handlers {
    /// Before the fork, in the parent.
    pub prepare: Option<Handler>,
    pub parent: Option<Handler>,
    pub child: Option<Handler>,
}

/// Install handlers, once for each `once`, which keeps what came of it. Those of parent and child are called in this
/// order, those before the fork in the reverse.
pub fn at_fork(once: &OnceLock<i32>, all: &[Handlers]) -> Result<()> {
    unsafe extern "C" {
        fn pthread_atfork(prepare: Option<Handler>, parent: Option<Handler>, child: Option<Handler>) -> i32;
    }
    let install = |handlers: &Handlers| {
        // SAFETY: the functions live as long as the process: the extension is never unloaded.
        unsafe { pthread_atfork(handlers.prepare, handlers.parent, handlers.child) }
    };
    match *once.get_or_init(|| all.iter().map(install).find(|errno| *errno != 0).unwrap_or(0)) {
        0 => Ok(()),
        errno => Err(Error::os("pthread_atfork", errno)),
    }
}

/// Keep a lock's guard until `release_guards`.
pub fn keep_guard(guard: Box<dyn Any>) {
    GUARDS.with(|guards| guards.borrow_mut().push(guard));
}

/// Drop the guards, last taken first.
pub fn release_guards() {
    let guards = GUARDS.with(RefCell::take);
    for guard in guards.into_iter().rev() {
        drop(guard);
    }
}

/// A taken lock together with the object that it locks, so that it can be kept anywhere.
pub struct Locked<T: ?Sized + 'static> {
    guard: ManuallyDrop<MutexGuard<'static, T>>,
    owner: ManuallyDrop<Arc<Mutex<T>>>,
}

impl<T: ?Sized + 'static> Locked<T> {
    #[must_use]
    pub fn new(owner: Arc<Mutex<T>>) -> Self {
        let guard = owner.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the guard borrows from the Arc's allocation, which `owner` keeps alive and in place; Drop releases
        // the guard before the Arc, so the borrow never outlives what it borrows from.
        let guard = unsafe { std::mem::transmute::<MutexGuard<'_, T>, MutexGuard<'static, T>>(guard) };
        Self { guard: ManuallyDrop::new(guard), owner: ManuallyDrop::new(owner) }
    }
}

impl<T: ?Sized + 'static> Deref for Locked<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T: ?Sized + 'static> DerefMut for Locked<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

impl<T: ?Sized + 'static> Drop for Locked<T> {
    fn drop(&mut self) {
        // SAFETY: each is dropped once, here, guard first.
        unsafe {
            ManuallyDrop::drop(&mut self.guard);
            ManuallyDrop::drop(&mut self.owner);
        }
    }
}

/// A value that lives as long as the process, made when first asked for; a forked child forgets it and makes its own.
/// Reading it takes no lock, so a signal handler can.
pub struct PerProcess<T: 'static>(AtomicPtr<T>);

impl<T: Send + Sync + 'static> PerProcess<T> {
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicPtr::new(std::ptr::null_mut()))
    }

    #[must_use]
    pub fn get(&self) -> Option<&'static T> {
        let value = self.0.load(Ordering::Acquire);
        // SAFETY: either null or a leaked box, which is never freed.
        if value.is_null() { None } else { Some(unsafe { &*value }) }
    }

    pub fn get_or_make(&self, make: impl FnOnce() -> Result<T>) -> Result<&'static T> {
        if let Some(value) = self.get() {
            return Ok(value);
        }
        let made = Box::into_raw(Box::new(make()?));
        match self.0.compare_exchange(std::ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: just leaked, and never freed from now on.
            Ok(_) => Ok(unsafe { &*made }),
            Err(earlier) => {
                // SAFETY: ours alone: nobody else has seen it.
                drop(unsafe { Box::from_raw(made) });
                // SAFETY: a leaked box, which is never freed.
                Ok(unsafe { &*earlier })
            }
        }
    }

    /// In a forked child: the next `get_or_make` makes a new one. The old one is leaked, with whatever locks in it
    /// threads of the parent hold.
    pub fn forget(&self) -> Option<&'static T> {
        let old = self.get();
        self.0.store(std::ptr::null_mut(), Ordering::Release);
        old
    }
}

impl<T: Send + Sync + 'static> Default for PerProcess<T> {
    fn default() -> Self {
        Self::new()
    }
}
