//! Work for other threads: readahead of slow sources, prefetching, and what signal handlers ask for.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::lock;
use crate::sys::fork::PerProcess;

pub type Job = Box<dyn FnOnce() + Send>;

/// Threads at once, and how long an idle one stays.
const MOST_THREADS: usize = 16;
const IDLE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Pool {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// In a forked child the threads are gone, and locks that they hold would be held for ever.
static POOL: PerProcess<Pool> = PerProcess::new();

/// Have a job done soon by another thread.
pub fn submit(job: Job) {
    let Ok(pool) = POOL.get_or_make(|| Ok(Pool::default())) else { unreachable!("making a pool cannot fail") };
    let mut state = lock(&pool.state);
    state.queue.push_back(job);
    if state.idle >= state.queue.len() || state.threads >= MOST_THREADS {
        pool.more.notify_one();
        return;
    }
    state.threads += 1;
    let started = std::thread::Builder::new().name("quire-fill".to_owned()).spawn(|| work(pool));
    if started.is_err() {
        state.threads -= 1;
        if state.threads == 0 {
            // No thread can be had at all: whoever submits does the work.
            let jobs = std::mem::take(&mut state.queue);
            drop(state);
            jobs.into_iter().for_each(|job| job());
        }
    }
}

fn work(pool: &Pool) {
    let mut state = lock(&pool.state);
    loop {
        if let Some(job) = state.queue.pop_front() {
            drop(state);
            job();
            state = lock(&pool.state);
            continue;
        }
        state.idle += 1;
        let (next, wait) = pool.more.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
        state = next;
        state.idle -= 1;
        if wait.timed_out() && state.queue.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}

/// Before a fork: the child's copy of the pool is never used, so nothing need be held.
pub fn enter_child() {
    POOL.forget();
}
