//! Free pages, as runs: the shortest that is long enough is taken, neighbours are joined.

use std::collections::{BTreeMap, BTreeSet};

use crate::pages::PageRange;

#[derive(Debug, Default)]
pub struct Runs {
    by_start: BTreeMap<u64, u64>,
    by_len: BTreeSet<(u64, u64)>,
}

impl Runs {
    fn insert(&mut self, run: PageRange) {
        if run.len > 0 {
            self.by_start.insert(run.start, run.len);
            self.by_len.insert((run.len, run.start));
        }
    }

    /// Remove a free run, given exactly.
    pub fn remove(&mut self, run: PageRange) {
        self.by_start.remove(&run.start);
        self.by_len.remove(&(run.len, run.start));
    }

    /// Take consecutive pages; the number of the first.
    pub fn take(&mut self, len: u64) -> Option<u64> {
        let &(found, start) = self.by_len.range((len, 0)..).next()?;
        self.remove(PageRange::new(start, found));
        self.insert(PageRange::new(start + len, found - len));
        Some(start)
    }

    /// Give pages back, joined with free neighbours inside `within`; the run that they are part of now.
    pub fn give(&mut self, run: PageRange, within: PageRange) -> PageRange {
        let mut joined = run;
        if let Some((&start, &len)) = self.by_start.range(within.start..run.start).next_back() {
            if start + len == run.start {
                self.remove(PageRange::new(start, len));
                joined = PageRange::new(start, len + run.len);
            }
        }
        if let Some(&len) = self.by_start.get(&run.end()).filter(|_| run.end() < within.end()) {
            self.remove(PageRange::new(run.end(), len));
            joined.len += len;
        }
        self.insert(joined);
        joined
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_fit_is_taken_and_neighbours_are_joined() {
        let within = PageRange::new(10, 30);
        let mut runs = Runs::default();
        assert_eq!(runs.give(within, within), within);
        assert_eq!(runs.take(4), Some(10));
        assert_eq!(runs.take(2), Some(14));
        assert_eq!(runs.take(8), Some(16));
        assert_eq!(runs.give(PageRange::new(14, 2), within), PageRange::new(14, 2));
        assert_eq!(runs.take(2), Some(14), "not from the long run");
        assert_eq!(runs.take(17), None);
        runs.give(PageRange::new(10, 4), within);
        runs.give(PageRange::new(16, 8), within);
        assert_eq!(runs.give(PageRange::new(14, 2), within), within);
    }

    #[test]
    fn runs_of_different_mappings_are_not_joined() {
        let (low, high) = (PageRange::new(0, 4), PageRange::new(4, 4));
        let mut runs = Runs::default();
        runs.give(low, low);
        assert_eq!(runs.give(high, high), high);
        assert_eq!(runs.take(5), None);
    }
}
