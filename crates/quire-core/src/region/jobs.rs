//! Work for other threads: readahead of slow sources, prefetching, and what signal handlers ask for.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::lock;
use crate::sys::fork::PerProcess;
use crate::sys::threads;

pub type Job = Box<dyn FnOnce() + Send>;

/// Threads at once, and how long an idle one stays.
pub const MOST_THREADS: usize = 16;
const IDLE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Pool {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    /// By kind.
    queues: [VecDeque<Job>; 3],
    threads: usize,
    idle: usize,
}

impl State {
    fn waiting(&self) -> usize {
        self.queues.iter().map(VecDeque::len).sum()
    }
}

/// In a forked child the threads are gone, and locks that they hold would be held for ever.
static POOL: PerProcess<Pool> = PerProcess::new();

/// What a job is for; those of an earlier kind are done first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Putting what was produced in place, for which whoever serves a note may wait.
    Placing,
    /// Serving a signal handler, for which a thread waits.
    Note,
    /// What nobody waits for.
    Later,
}

/// Have a job done soon by another thread.
pub fn submit(kind: Kind, job: Job) {
    let Ok(pool) = POOL.get_or_make(|| Ok(Pool::default())) else { unreachable!("making a pool cannot fail") };
    let mut state = lock(&pool.state);
    state.queues[kind as usize].push_back(job);
    if state.idle >= state.waiting() || state.threads >= MOST_THREADS {
        pool.more.notify_one();
        return;
    }
    state.threads += 1;
    if threads::start("quire-fill", || work(pool)).is_err() {
        state.threads -= 1;
        if state.threads == 0 {
            // No thread can be had at all: whoever submits does the work.
            let jobs = std::mem::take(&mut state.queues);
            drop(state);
            jobs.into_iter().flatten().for_each(|job| job());
        }
    }
}

/// Do what is to be put in place, with no other thread.
pub fn help_placing() {
    let Some(pool) = POOL.get() else { return };
    loop {
        let job = lock(&pool.state).queues[Kind::Placing as usize].pop_front();
        match job {
            Some(job) => job(),
            None => return,
        }
    }
}

fn work(pool: &Pool) {
    let mut state = lock(&pool.state);
    loop {
        if let Some(job) = state.queues.iter_mut().find_map(VecDeque::pop_front) {
            drop(state);
            job();
            state = lock(&pool.state);
            continue;
        }
        state.idle += 1;
        let (next, wait) = pool.more.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
        state = next;
        state.idle -= 1;
        if wait.timed_out() && state.waiting() == 0 {
            state.threads -= 1;
            return;
        }
    }
}

/// Before a fork: the child's copy of the pool is never used, so nothing need be held.
pub fn enter_child() {
    POOL.forget();
}
