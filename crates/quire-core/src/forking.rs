//! Fork: what writes memory is told before it and, in the child, after it; all locks are held across it.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::Result;
use crate::region;
use crate::sys::fork::{self, Handlers, Locked};
use crate::sys::{hold, private, tracking};

/// An object whose memory parent and child must not share.
pub trait ForkAware: Send {
    /// Called in the parent, before the fork.
    fn before_fork(&mut self);
    /// Called in the child, before anything else runs there.
    fn enter_child(&mut self);
    /// Whether the child's copy is as good as the original, so that forks of the child are told of it too.
    fn lives_on_in_child(&self) -> bool {
        false
    }
}

type Member = Weak<Mutex<dyn ForkAware>>;

static MEMBERS: Mutex<Vec<Member>> = Mutex::new(Vec::new());

fn members() -> MutexGuard<'static, Vec<Member>> {
    MEMBERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Make an object and have it told of forks for as long as it lives.
///
/// No fork comes between: a child would inherit memory that it shares with the parent and knows nothing of, and that
/// could not be sealed while the child lives.
pub fn enlist<T: ForkAware + 'static>(make: impl FnOnce() -> Result<T>) -> Result<Arc<Mutex<T>>> {
    install()?;
    let mut all = members();
    let made = Arc::new(Mutex::new(make()?));
    let member: Arc<Mutex<dyn ForkAware>> = Arc::<Mutex<T>>::clone(&made);
    all.retain(|weak| weak.strong_count() > 0);
    all.push(Arc::downgrade(&member));
    Ok(made)
}

/// Be told of forks from now on.
///
/// To be called when the library is loaded: a child that is forked while another thread is in here for the first time
/// would wait for it for ever.
pub fn install() -> Result<()> {
    static ONCE: OnceLock<i32> = OnceLock::new();
    private::install()?;
    let own = Handlers { prepare: Some(prepare), parent: Some(in_parent), child: Some(in_child) };
    // Ours are last, and so the first before a fork: who has one of our locks may touch a region, which is served until
    // regions get ready for the fork.
    fork::at_fork(&ONCE, &[region::HANDLERS[0], region::HANDLERS[1], own])
}

extern "C" fn prepare() {
    let list = members();
    let mut locked: Vec<Locked<dyn ForkAware>> = list.iter().filter_map(Weak::upgrade).map(Locked::new).collect();
    locked.iter_mut().for_each(|one| one.before_fork());
    fork::keep_guard(Box::new(list));
    for one in locked {
        fork::keep_guard(Box::new(one));
    }
    fork::keep_guard(Box::new(tracking::lock()));
    fork::keep_guard(Box::new(hold::lock()));
    fork::keep_guard(Box::new(crate::layer::lock()));
}

extern "C" fn in_parent() {
    fork::release_guards();
}

extern "C" fn in_child() {
    fork::release_guards();
    // Both belong to the parent's address space.
    *tracking::lock() = None;
    *hold::lock() = hold::Synchronous::default();
    let inherited: Vec<Arc<Mutex<dyn ForkAware>>> = members().drain(..).filter_map(|weak| weak.upgrade()).collect();
    for one in inherited {
        let mut locked = one.lock().unwrap_or_else(PoisonError::into_inner);
        locked.enter_child();
        if locked.lives_on_in_child() {
            members().push(Arc::downgrade(&one));
        }
    }
}
