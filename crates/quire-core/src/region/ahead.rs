//! Readahead: how many windows to fill at a touch. Doubles while touches follow each other, as the kernel's does.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Remembers where the last fill ended and how long it was, in one word, so that a signal handler can use it.
#[derive(Default)]
pub struct Ahead {
    last: AtomicU64,
    /// Whoever fills ahead goes on until here, because the reader is close behind.
    chased: AtomicUsize,
}

const LENGTH_BITS: u32 = 20;

impl Ahead {
    /// A window was touched that is missing: how many windows to fill from it on, at most `most`.
    pub fn observe(&self, window: usize, most: usize) -> usize {
        let seen = self.last.load(Ordering::Relaxed);
        let (next, length) = (seen >> LENGTH_BITS, (seen & ((1 << LENGTH_BITS) - 1)) as usize);
        // The first touch of all says nothing: `next` is 0 and the length too.
        let run = if length > 0 && next == window as u64 { (length * 2).min(most) } else { 1 };
        let run = run.clamp(1, (1 << LENGTH_BITS) - 1);
        self.last.store((((window + run) as u64) << LENGTH_BITS) | run as u64, Ordering::Relaxed);
        run
    }

    /// A window was touched that is being filled. If that is ahead of a reader, `most` windows from here on are wanted.
    pub fn chase(&self, window: usize, most: usize) {
        let next = (self.last.load(Ordering::Relaxed) >> LENGTH_BITS) as usize;
        if window < next && next - window <= most {
            self.chased.store(window + most, Ordering::Relaxed);
            self.reached(window + most);
        }
    }

    /// Where filling ahead ends that was to end at `last`, now that a reader may have come closer.
    pub fn until(&self, last: usize, most: usize) -> usize {
        let chased = self.chased.load(Ordering::Relaxed);
        if chased > last && chased - last <= most { chased } else { last }
    }

    /// More was filled than `observe` said, up to `end`.
    pub fn reached(&self, end: usize) {
        let seen = self.last.load(Ordering::Relaxed);
        if seen >> LENGTH_BITS < end as u64 {
            self.last.store(((end as u64) << LENGTH_BITS) | (seen & ((1 << LENGTH_BITS) - 1)), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_while_sequential_and_starts_again_after_a_jump() {
        let ahead = Ahead::default();
        let mut at = 0;
        let mut runs = Vec::new();
        for _ in 0..6 {
            let run = ahead.observe(at, 16);
            runs.push(run);
            at += run;
        }
        assert_eq!(runs, [1, 2, 4, 8, 16, 16]);
        assert_eq!(ahead.observe(1000, 16), 1);
        assert_eq!(ahead.observe(1001, 16), 2);
        assert_eq!(ahead.observe(5, 16), 1);
    }

    #[test]
    fn goes_on_while_a_reader_is_close_behind() {
        let ahead = Ahead::default();
        assert_eq!([ahead.observe(0, 16), ahead.observe(1, 16)], [1, 2]);
        assert_eq!(ahead.until(3, 16), 3);
        ahead.chase(2, 16);
        assert_eq!(ahead.until(3, 16), 18);
        assert_eq!(ahead.observe(18, 16), 4);
        ahead.chase(900, 16);
        assert_eq!(ahead.until(22, 16), 22);
    }
}
