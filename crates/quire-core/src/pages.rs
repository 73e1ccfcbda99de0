//! Pages, ranges of them, and sparse sets of them.

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

/// Join ascending ranges across the smallest gaps between them until there are at most so many (at least one).
pub fn bridge(ranges: &mut Vec<PageRange>, at_most: usize) {
    let excess = ranges.len().saturating_sub(at_most.max(1));
    if excess == 0 {
        return;
    }
    let mut gaps: Vec<(u64, usize)> =
        ranges.windows(2).enumerate().map(|(i, two)| (two[1].start - two[0].end(), i + 1)).collect();
    gaps.select_nth_unstable(excess - 1);
    let mut joins = vec![false; ranges.len()];
    gaps[..excess].iter().for_each(|&(_, i)| joins[i] = true);
    let mut out: Vec<PageRange> = Vec::with_capacity(ranges.len() - excess);
    for (range, joins) in ranges.iter().zip(joins) {
        match out.last_mut() {
            Some(last) if joins => last.len = range.end() - last.start,
            _ => out.push(*range),
        }
    }
    *ranges = out;
}

/// Append an ascending range, joining it to the last one where they touch.
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
    if a.is_empty() || b.is_empty() {
        return if a.is_empty() { b.to_vec() } else { a.to_vec() };
    }
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

/// The part of an ascending, disjoint list that lies in one range.
#[must_use]
pub fn clip(ranges: &[PageRange], to: PageRange) -> Vec<PageRange> {
    let first = ranges.partition_point(|range| range.end() <= to.start);
    let upto = ranges.partition_point(|range| range.start < to.end());
    ranges[first..upto.max(first)].iter().map(|range| range.intersect(&to)).collect()
}

#[must_use]
pub fn total(ranges: &[PageRange]) -> u64 {
    ranges.iter().map(|r| r.len).sum()
}

/// A sparse set of page numbers: one bitmap for each block of 512 that has any.
#[derive(Default, Debug)]
pub struct PageSet {
    blocks: Vec<Option<Box<[u64; 8]>>>,
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
        self.block(page / FANOUT).is_some_and(|bits| bits[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
    }

    pub fn insert(&mut self, range: PageRange) {
        if range.len > 0 {
            let last = ((range.end() - 1) / FANOUT) as usize;
            if last >= self.blocks.len() {
                self.blocks.resize_with(last + 1, || None);
            }
        }
        for (block, part) in parts(range) {
            let bits = self.blocks[block as usize].get_or_insert_default();
            self.count += update(bits, part, block, |word, mask| word | mask);
        }
    }

    pub fn remove(&mut self, range: PageRange) {
        if self.count == 0 {
            return;
        }
        for (block, part) in parts(range) {
            let Some(slot) = self.blocks.get_mut(block as usize) else { break };
            if let Some(bits) = slot {
                // Wrapping, because pages go away: the difference is negative.
                self.count = self.count.wrapping_add(update(bits, part, block, |word, mask| word & !mask));
                if bits.iter().all(|word| *word == 0) {
                    *slot = None;
                }
            }
        }
    }

    /// Pages of the set within a range.
    #[must_use]
    pub fn count_in(&self, range: PageRange) -> u64 {
        let in_block = |(block, part): (u64, PageRange)| {
            self.block(block).map_or(0, |bits| {
                (0..8).map(|w| u64::from((bits[w as usize] & word_mask(part, block, w)).count_ones())).sum()
            })
        };
        if self.count == 0 { 0 } else { parts(range).map(in_block).sum::<u64>() }
    }

    /// The set as ascending ranges, within a range.
    #[must_use]
    pub fn ranges_in(&self, range: PageRange) -> Vec<PageRange> {
        let mut out = Vec::new();
        for (block, part) in parts(range) {
            if self.block(block).is_some() {
                (part.start..part.end())
                    .filter(|page| self.contains(*page))
                    .for_each(|page| push_merged(&mut out, PageRange::new(page, 1)));
            }
        }
        out
    }

    fn block(&self, block: u64) -> Option<&[u64; 8]> {
        self.blocks.get(block as usize)?.as_deref()
    }
}

/// The blocks that a range touches, with the part of it in each.
fn parts(range: PageRange) -> impl Iterator<Item = (u64, PageRange)> {
    let blocks = if range.len == 0 { 0..0 } else { range.start / FANOUT..(range.end() - 1) / FANOUT + 1 };
    blocks.map(move |block| (block, range.intersect(&PageRange::new(block * FANOUT, FANOUT))))
}

/// Change the bits of `part`; returns by how much their number changed, wrapping.
fn update(bits: &mut [u64; 8], part: PageRange, block: u64, change: impl Fn(u64, u64) -> u64) -> u64 {
    let mut by = 0u64;
    let first = (part.start % FANOUT) / 64;
    let last = ((part.end() - 1) % FANOUT) / 64;
    for w in first..=last {
        let word = &mut bits[w as usize];
        let after = change(*word, word_mask(part, block, w));
        by = by.wrapping_add(u64::from(after.count_ones())).wrapping_sub(u64::from(word.count_ones()));
        *word = after;
    }
    by
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
        assert_eq!(
            subtract(&r(&[(0, 10), (20, 30)]), &r(&[(2, 4), (8, 22), (29, 40)])),
            r(&[(0, 2), (4, 8), (22, 29)])
        );
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
        assert!(set.is_empty() && set.blocks.iter().all(Option::is_none));
    }
}
