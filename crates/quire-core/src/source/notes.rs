//! Which pages of a source were touched, kept for later processes beside the checkpoints.
//!
//! Byte layout: docs/formats.md. As with checkpoints, what cannot be read, written or believed is as good as none. What is
//! read says only what to fill early: it is never taken for content.

use super::ReadAt;
use super::checkpoint::{Cache, Reader, Writer};
use crate::pages::{PageRange, pages_for};

const KIND: u32 = 4;

/// Where notes of one source are kept.
#[derive(Clone, Debug)]
pub struct Notes {
    cache: Cache,
    key: [u8; 32],
    size: u64,
}

impl Notes {
    /// Of a source of `size` bytes, made of these raw bytes. None where there is no cache, or nothing names the bytes.
    pub fn of(cache: Option<&Cache>, raw: &dyn ReadAt, size: u64) -> Option<Self> {
        Some(Self { cache: cache?.clone(), key: raw.identity()?, size })
    }

    /// Pages that were touched by a process before this one, in ascending order; none if nothing is known.
    #[must_use]
    pub fn load(&self) -> Vec<PageRange> {
        self.cache.load(KIND, &self.key).and_then(|bytes| decode(&bytes, self.size)).unwrap_or_default()
    }

    /// Keep pages, in ascending order, for processes after this one.
    pub fn store(&self, touched: &[PageRange]) {
        let mut out = Writer::new(KIND, &self.key);
        encode(&mut out, self.size, touched);
        let _stored = self.cache.store(out);
    }
}

fn encode(out: &mut Writer, size: u64, touched: &[PageRange]) {
    out.u64(size);
    out.u64(touched.len() as u64);
    for range in touched {
        out.u64(range.start);
        out.u64(range.len);
    }
}

fn decode(bytes: &[u8], size: u64) -> Option<Vec<PageRange>> {
    let mut from = Reader::new(bytes);
    if from.u64()? != size {
        return None;
    }
    let count = from.u64()?;
    let mut touched: Vec<PageRange> = Vec::new();
    for _ in 0..count {
        let (start, len) = (from.u64()?, from.u64()?);
        let end = start.checked_add(len)?;
        let behind = touched.last().is_none_or(|last| last.end() < start);
        if len == 0 || !behind || end > pages_for(size) {
            return None;
        }
        touched.push(PageRange::new(start, len));
    }
    from.is_empty().then_some(touched)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(size: u64, touched: &[(u64, u64)], declared: u64) -> Option<Vec<PageRange>> {
        let ranges: Vec<_> = touched.iter().map(|(start, len)| PageRange::new(*start, *len)).collect();
        let mut out = Writer::new(KIND, &[3; 32]);
        encode(&mut out, size, &ranges);
        decode(&out.payload(), declared)
    }

    #[test]
    fn ranges_come_back_in_order_and_within_the_source() {
        let good = [(0, 1), (2, 3), (9, 1)];
        let found = decoded(10 * 4096 - 7, &good, 10 * 4096 - 7).expect("valid");
        assert_eq!(found.iter().map(|range| (range.start, range.len)).collect::<Vec<_>>(), good);
        assert_eq!(decoded(4096, &[], 4096), Some(Vec::new()));
        assert_eq!(decoded(40960, &good, 40961), None, "of another size");
        for bad in [[(1, 0), (2, 1)], [(2, 1), (1, 1)], [(1, 2), (3, 1)], [(1, 1), (9, 2)], [(1, 1), (2, u64::MAX)]] {
            assert_eq!(decoded(40960, &bad, 40960), None, "{bad:?}");
        }
    }
}
