//! Walking a page table: extents in page order, and the check of every invariant.

use std::collections::HashSet;

use crate::pages::{FANOUT, PageRange};
use crate::snapshot::{Count, Ref, Snapshot};
use crate::table::span;
use crate::{Error, Result};

/// A run of pages with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub pages: PageRange,
    pub source: Source,
}

/// Where pages come from: nowhere (they read zero), or a layer from a page on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Zero,
    Layer { layer: u8, index: u64 },
}

impl Source {
    /// The source of the pages `skip` further on.
    #[must_use]
    pub const fn skip(self, skip: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Layer { layer, index } => Self::Layer { layer, index: index + skip },
        }
    }

    /// Whether `next` goes on where `len` pages from this source end.
    #[must_use]
    pub fn continues(self, len: u64, next: Self) -> bool {
        self.skip(len) == next
    }
}

/// Append, joining to the last extent where the source goes on.
pub fn push_extent(extents: &mut Vec<Extent>, pages: PageRange, source: Source) {
    if let Some(last) = extents.last_mut() {
        if last.pages.end() == pages.start && last.source.continues(last.pages.len, source) {
            last.pages.len += pages.len;
            return;
        }
    }
    extents.push(Extent { pages, source });
}

impl Snapshot {
    /// All pages as extents, ascending, without gaps, joined where they can be.
    pub fn extents(&self) -> Result<Vec<Extent>> {
        self.extents_in(PageRange::new(0, self.pages()))
    }

    /// The extents of a range of pages.
    pub fn extents_in(&self, range: PageRange) -> Result<Vec<Extent>> {
        let mut out = Vec::new();
        let range = range.intersect(&PageRange::new(0, self.pages()));
        self.collect(self.level(), 0, self.root()?, range, &mut out)?;
        Ok(out)
    }

    fn collect(&self, level: u32, base: u64, at: Ref, range: PageRange, out: &mut Vec<Extent>) -> Result<()> {
        let part = PageRange::new(base, span(level)).intersect(&range);
        if part.len == 0 {
            return Ok(());
        }
        match at {
            Ref::Zero => push_extent(out, part, Source::Zero),
            Ref::Run { layer, index } => {
                push_extent(out, part, Source::Layer { layer, index: index + (part.start - base) })
            }
            Ref::Table { .. } => {
                let below = span(level - 1);
                let first = (part.start - base) / below;
                let last = (part.end() - 1 - base) / below;
                for i in first..=last {
                    self.collect(level - 1, base + i * below, self.child(at, level, base, i)?, range, out)?;
                }
            }
        }
        Ok(())
    }

    /// Check every invariant of docs/formats.md; return what each layer contributes.
    pub fn check(&self) -> Result<Vec<Count>> {
        let mut check = Check {
            snapshot: self,
            counts: vec![Count::default(); self.layers().len()],
            runs: vec![Vec::new(); self.layers().len()],
            nodes: HashSet::new(),
        };
        check.visit(self.level(), 0, self.root()?)?;
        for (layer, runs) in check.runs.iter_mut().enumerate() {
            runs.sort();
            if let Some(two) = runs.windows(2).find(|two| two[0].end() > two[1].start) {
                return Err(Error::Malformed(format!("data page {} of layer {layer} is named twice", two[1].start)));
            }
        }
        for (layer, count) in check.counts.iter().enumerate() {
            // The top layer holds the root entry, so it is reached even if all its pages are zero or elsewhere.
            if layer > 0 && count.is_zero() {
                return Err(Error::Malformed(format!("layer {layer} is not used by the snapshot")));
            }
        }
        Ok(check.counts)
    }
}

struct Check<'a> {
    snapshot: &'a Snapshot,
    counts: Vec<Count>,
    runs: Vec<Vec<PageRange>>,
    nodes: HashSet<(u8, u64)>,
}

impl Check<'_> {
    fn visit(&mut self, level: u32, base: u64, at: Ref) -> Result<()> {
        let pages = self.snapshot.pages();
        match at {
            Ref::Zero => Ok(()),
            _ if base >= pages => Err(Error::Malformed(format!("an entry for page {base} of {pages}"))),
            Ref::Run { layer, index } => {
                let len = span(level).min(pages - base);
                let holds = self.snapshot.layers()[layer as usize].trailer().data_pages;
                if index >= holds || len > holds - index {
                    return Err(Error::Malformed(format!("a run of {len} pages at {index} in a layer of {holds}")));
                }
                self.counts[layer as usize].data += len;
                crate::pages::push_merged(&mut self.runs[layer as usize], PageRange::new(index, len));
                Ok(())
            }
            Ref::Table { layer, index } => {
                if level == 0 {
                    return Err(Error::Malformed("a node below the last level".to_owned()));
                }
                if !self.nodes.insert((layer, index)) {
                    return Err(Error::Malformed(format!("node {index} of layer {layer} is named twice")));
                }
                if self.snapshot.table(layer, index)?.iter().all(|entry| *entry == 0) {
                    return Err(Error::Malformed(format!("node {index} of layer {layer} is empty")));
                }
                self.counts[layer as usize].nodes += 1;
                let below = span(level - 1);
                for i in 0..FANOUT {
                    self.visit(level - 1, base + i * below, self.snapshot.child(at, level, base, i)?)?;
                }
                Ok(())
            }
        }
    }
}
