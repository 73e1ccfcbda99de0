//! Pages, ranges of them, and sparse sets of them.

use std::collections::BTreeMap;

/// Bytes in a page; the formats fix it, and `Segment::new` refuses kernels with another.
pub const PAGE: u64 = 4096;
/// Entries in a page-table node, and pages in the block that one leaf node covers.
pub const FANOUT: u64 = 512;
/// Pages in the largest object: 2^47 bytes, the user half of the address space.
pub const MAX_PAGES: u64 = 1 << 35;

/// `len` pages from page `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageRange {
    pub start: u64,
    pub len: u64,
}

impl PageRange {
    #[must_use]
    pub const fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }

    /// From `start` to `end`, exclusive.
    #[must_use]
    pub const fn between(start: u64, end: u64) -> Self {
        Self { start, len: end.saturating_sub(start) }
    }

    #[must_use]
    pub const fn end(&self) -> u64 {
        self.start + self.len
    }

    #[must_use]
    pub fn intersect(&self, other: &Self) -> Self {
        Self::between(self.start.max(other.start), self.end().min(other.end()))
    }

    #[must_use]
    pub const fn byte_offset(&self) -> usize {
        (self.start * PAGE) as usize
    }

    #[must_use]
    pub const fn byte_len(&self) -> usize {
        (self.len * PAGE) as usize
    }
}

/// Pages needed for `bytes` bytes.
#[must_use]
pub const fn pages_for(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE)
}

/// Append a range, joining it to the last one where they touch.
pub fn push_merged(ranges: &mut Vec<PageRange>, range: PageRange) {
    if range.len == 0 {
        return;
    }
    match ranges.last_mut() {
        Some(last) if last.end() == range.start => last.len += range.len,
        _ => ranges.push(range),
    }
}

/// The union of two ascending, disjoint lists.
#[must_use]
pub fn union(a: &[PageRange], b: &[PageRange]) -> Vec<PageRange> {
    let mut all: Vec<PageRange> = a.iter().chain(b).copied().collect();
    all.sort_unstable();
    let mut out: Vec<PageRange> = Vec::with_capacity(all.len());
    for range in all {
        match out.last_mut() {
            Some(last) if range.start <= last.end() => last.len = last.end().max(range.end()) - last.start,
            _ if range.len == 0 => {}
            _ => out.push(range),
        }
    }
    out
}

/// What is in `a` and not in `b`, both ascending and disjoint.
#[must_use]
pub fn subtract(a: &[PageRange], b: &[PageRange]) -> Vec<PageRange> {
    let mut out = Vec::with_capacity(a.len());
    let mut holes = b.iter().peekable();
    for range in a {
        let mut start = range.start;
        while let Some(hole) = holes.peek() {
            if hole.end() <= start {
                holes.next();
                continue;
            }
            if hole.start >= range.end() {
                break;
            }
            if hole.start > start {
                out.push(PageRange::between(start, hole.start));
            }
            start = hole.end();
            if hole.end() >= range.end() {
                break;
            }
            holes.next();
        }
        if start < range.end() {
            out.push(PageRange::between(start, range.end()));
        }
    }
    out
}

/// What is in both, both ascending and disjoint.
#[must_use]
pub fn intersection(a: &[PageRange], b: &[PageRange]) -> Vec<PageRange> {
    let mut out = Vec::new();
    let (mut i, mut j) = (0, 0);
    while i < a.len() && j < b.len() {
        let both = a[i].intersect(&b[j]);
        if both.len > 0 {
            out.push(both);
        }
        if a[i].end() <= b[j].end() { i += 1 } else { j += 1 }
    }
    out
}

#[must_use]
pub fn total(ranges: &[PageRange]) -> u64 {
    ranges.iter().map(|r| r.len).sum()
}

/// A sparse set of page numbers: one bitmap for each block of 512 that has any.
#[derive(Default, Debug)]
pub struct PageSet {
    blocks: BTreeMap<u64, [u64; 8]>,
    count: u64,
}

impl PageSet {
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.count
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        let bit = page % FANOUT;
        self.blocks.get(&(page / FANOUT)).is_some_and(|b| b[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
    }

    pub fn insert(&mut self, range: PageRange) {
        self.update(range, true);
    }

    pub fn remove(&mut self, range: PageRange) {
        if self.count > 0 {
            self.update(range, false);
        }
    }

    /// Pages of the set within a range.
    #[must_use]
    pub fn count_in(&self, range: PageRange) -> u64 {
        if range.len == 0 {
            return 0;
        }
        let first = range.start / FANOUT;
        let last = (range.end() - 1) / FANOUT;
        let mut n = 0;
        for (&block, bits) in self.blocks.range(first..=last) {
            let part = range.intersect(&PageRange::new(block * FANOUT, FANOUT));
            n += (0..8).map(|w| u64::from((bits[w as usize] & word_mask(part, block, w)).count_ones())).sum::<u64>();
        }
        n
    }

    /// The set as ascending ranges, within a range.
    #[must_use]
    pub fn ranges_in(&self, range: PageRange) -> Vec<PageRange> {
        let mut out = Vec::new();
        if range.len == 0 {
            return out;
        }
        for (&block, bits) in self.blocks.range(range.start / FANOUT..=(range.end() - 1) / FANOUT) {
            let part = range.intersect(&PageRange::new(block * FANOUT, FANOUT));
            for page in part.start..part.end() {
                let bit = page % FANOUT;
                if bits[(bit / 64) as usize] >> (bit % 64) & 1 == 1 {
                    push_merged(&mut out, PageRange::new(page, 1));
                }
            }
        }
        out
    }

    fn update(&mut self, range: PageRange, on: bool) {
        if range.len == 0 {
            return;
        }
        for block in range.start / FANOUT..=(range.end() - 1) / FANOUT {
            if !on && !self.blocks.contains_key(&block) {
                continue;
            }
            let part = range.intersect(&PageRange::new(block * FANOUT, FANOUT));
            let bits = self.blocks.entry(block).or_default();
            for w in 0..8u64 {
                let mask = word_mask(part, block, w);
                let word = &mut bits[w as usize];
                let before = word.count_ones();
                if on { *word |= mask } else { *word &= !mask }
                self.count = self.count + u64::from(word.count_ones()) - u64::from(before);
            }
            if !on && bits.iter().all(|w| *w == 0) {
                self.blocks.remove(&block);
            }
        }
    }
}

/// The bits of word `w` of a block that lie in `part`.
fn word_mask(part: PageRange, block: u64, w: u64) -> u64 {
    let lo = block * FANOUT + w * 64;
    let cut = part.intersect(&PageRange::new(lo, 64));
    match cut.len {
        0 => 0,
        64 => u64::MAX,
        n => ((1u64 << n) - 1) << (cut.start - lo),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(pairs: &[(u64, u64)]) -> Vec<PageRange> {
        pairs.iter().map(|&(s, e)| PageRange::between(s, e)).collect()
    }

    #[test]
    fn union_merges_touching_and_overlapping() {
        assert_eq!(union(&r(&[(0, 2), (5, 7)]), &r(&[(2, 3), (6, 9)])), r(&[(0, 3), (5, 9)]));
    }

    #[test]
    fn subtract_cuts_holes() {
        assert_eq!(subtract(&r(&[(0, 10), (20, 30)]), &r(&[(2, 4), (8, 22), (29, 40)])), r(&[(0, 2), (4, 8), (22, 29)]));
        assert_eq!(subtract(&r(&[(0, 4), (4, 8)]), &r(&[(1, 6)])), r(&[(0, 1), (6, 8)]));
    }

    #[test]
    fn intersection_of_lists() {
        assert_eq!(intersection(&r(&[(0, 10), (20, 30)]), &r(&[(5, 25)])), r(&[(5, 10), (20, 25)]));
    }

    #[test]
    fn page_set_counts_and_lists() {
        let mut set = PageSet::default();
        set.insert(PageRange::between(510, 515));
        set.insert(PageRange::between(512, 513));
        assert_eq!(set.len(), 5);
        assert!(set.contains(514) && !set.contains(515));
        set.remove(PageRange::between(511, 513));
        assert_eq!(set.ranges_in(PageRange::between(0, 1024)), r(&[(510, 511), (513, 515)]));
        assert_eq!(set.count_in(PageRange::between(511, 514)), 1);
        set.remove(PageRange::between(0, 1024));
        assert!(set.is_empty() && set.blocks.is_empty());
    }
}
