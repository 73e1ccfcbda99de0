//! What a region counts. All of it may be counted in a signal handler.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Latencies are counted by powers of two of microseconds: place n holds those below 2^n, the last all above.
pub const BUCKETS: usize = 24;

#[derive(Default)]
pub struct Counters {
    pub faults: AtomicU64,
    pub fills: AtomicU64,
    pub bytes: AtomicU64,
    pub refills: AtomicU64,
    pub failures: AtomicU64,
    evictions: AtomicU64,
    latency: [AtomicU64; BUCKETS],
}

/// A copy of the counters at one moment.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Touches of missing pages that were served.
    pub faults: u64,
    /// Windows that were filled, ahead of a touch too.
    pub fills: u64,
    /// Bytes that the source gave.
    pub bytes: u64,
    /// Fills of windows that were filled before.
    pub refills: u64,
    /// Fills that failed.
    pub failures: u64,
    /// Windows taken back under pressure or for the budget.
    pub evictions: u64,
    /// Faults by how long they took to serve.
    pub latency: [u64; BUCKETS],
}

pub fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Counters {
    /// A touch was served.
    pub fn served(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        add(&self.latency[bucket.min(BUCKETS - 1)], 1);
    }

    pub fn evicted(&self) {
        add(&self.evictions, 1);
    }

    /// In a forked child, which has done nothing yet.
    pub fn enter_child(&self) {
        let all = [&self.faults, &self.fills, &self.bytes, &self.refills, &self.failures, &self.evictions];
        all.into_iter().chain(&self.latency).for_each(|counter| counter.store(0, Ordering::Relaxed));
    }

    pub fn figures(&self) -> Figures {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Figures {
            faults: read(&self.faults),
            fills: read(&self.fills),
            bytes: read(&self.bytes),
            refills: read(&self.refills),
            failures: read(&self.failures),
            evictions: read(&self.evictions),
            latency: std::array::from_fn(|i| read(&self.latency[i])),
        }
    }
}
