//! Laying a snapshot out in address space: which pieces are mapped, in what order, and which are copied.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Result;
use crate::pages::{PAGE, PageRange, PageSet};
use crate::publish::ensure_memory;
use crate::snapshot::Snapshot;
use crate::sys::area::{Access, Area, Sharing};
use crate::table::walk::{Extent, Source};

/// A base mapping runs on across an interruption of at most this many pages.
const BRIDGE_PAGES: u64 = 1024;
/// Where VMAs are short, it runs on across zeros of at most this many pages: they may have to be copied in.
const BRIDGE_ZEROS: u64 = 2;
/// Changes of at least so many pages may take a mapping to twice its budget: copying them would take too much memory.
const LONG_PAGES: u64 = 64;

/// VMAs that one mapping may use: a quarter of the process's limit, as it was when first asked for.
#[must_use]
pub fn vma_budget() -> usize {
    /// 0: not asked for yet. No lock: a child that is forked while a thread asks must not wait for it.
    static BUDGET: AtomicUsize = AtomicUsize::new(0);
    let known = BUDGET.load(Ordering::Relaxed);
    if known > 0 {
        return known;
    }
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
    let limit = limit.and_then(|text| text.trim().parse::<usize>().ok()).unwrap_or(65530);
    let budget = (limit / 4).max(1);
    BUDGET.store(budget, Ordering::Relaxed);
    budget
}

/// The order of work for mapping a snapshot from nothing.
struct Plan {
    /// Mapped first, longest gain first: pieces that bridge interruptions.
    bases: Vec<Extent>,
    /// Mapped over them.
    overlays: Vec<Extent>,
    /// Copied in, because the budget is spent.
    copies: Vec<Extent>,
}

impl Plan {
    fn new(extents: &[Extent], budget: usize) -> Self {
        let short = extents.len() > budget;
        let bases = choose_bases(extents, if short { BRIDGE_ZEROS } else { BRIDGE_PAGES });
        // Zeros that no base covers are there already.
        let needed = |extent: &Extent| {
            if extent.source == Source::Zero { touches(&bases, extent) } else { !is_in_base(&bases, extent) }
        };
        let mut overlays: Vec<Extent> = extents.iter().filter(|extent| needed(extent)).copied().collect();
        let mut copies = Vec::new();
        if short {
            // Each overlay copied instead of mapped saves two VMAs: its own, and the split of the base.
            let excess = (extents.len() - budget).div_ceil(2).min(overlays.len());
            overlays.sort_by_key(|extent| (extent.pages.len, extent.pages.start));
            copies = overlays.drain(..excess).collect();
            overlays.sort_by_key(|extent| extent.pages.start);
            copies.sort_by_key(|extent| extent.pages.start);
        }
        Self { bases, overlays, copies }
    }
}

/// Spans of one layer with one displacement that hold several extents, across at most so many zeros: disjoint,
/// ascending.
fn choose_bases(extents: &[Extent], zeros: u64) -> Vec<Extent> {
    struct Span {
        extent: Extent,
        own: u64,
        parts: u32,
    }
    let mut open: HashMap<(u8, u64), usize> = HashMap::new();
    let mut spans: Vec<Span> = Vec::new();
    for &extent in extents {
        let Source::Layer { layer, index } = extent.source else {
            if extent.pages.len > zeros {
                open.clear();
            }
            continue;
        };
        let key = (layer, extent.pages.start.wrapping_sub(index));
        if let Some(&at) = open.get(&key) {
            let span = &mut spans[at];
            if extent.pages.start - span.extent.pages.end() <= BRIDGE_PAGES {
                span.extent.pages.len = extent.pages.end() - span.extent.pages.start;
                span.own += extent.pages.len;
                span.parts += 1;
                continue;
            }
        }
        open.insert(key, spans.len());
        spans.push(Span { extent, own: extent.pages.len, parts: 1 });
    }
    spans.retain(|span| span.parts > 1);
    spans.sort_by_key(|span| std::cmp::Reverse(span.own));
    let mut taken: BTreeMap<u64, u64> = BTreeMap::new();
    let mut bases = Vec::new();
    for span in spans {
        let pages = span.extent.pages;
        let before = taken.range(..pages.end()).next_back();
        if before.is_none_or(|(_, &end)| end <= pages.start) {
            taken.insert(pages.start, pages.end());
            bases.push(span.extent);
        }
    }
    bases.sort_by_key(|extent| extent.pages.start);
    bases
}

fn is_in_base(bases: &[Extent], extent: &Extent) -> bool {
    let at = bases.partition_point(|base| base.pages.start <= extent.pages.start);
    at > 0 && {
        let base = bases[at - 1];
        extent.pages.end() <= base.pages.end()
            && base.source.skip(extent.pages.start - base.pages.start) == extent.source
    }
}

fn touches(bases: &[Extent], extent: &Extent) -> bool {
    let at = bases.partition_point(|base| base.pages.start < extent.pages.end());
    at > 0 && bases[at - 1].pages.end() > extent.pages.start
}

/// What lies where in a mapped area, so that it can be changed piecemeal within the budget.
#[derive(Debug)]
pub struct Layout {
    /// start page -> (pages, what is mapped); joined where the kernel joins them too.
    vmas: BTreeMap<u64, (u64, Place)>,
    /// Pages whose content was copied over what is mapped.
    copied: PageSet,
    budget: usize,
}

/// What a VMA shows. Layers are named by inode, which stays the same from snapshot to snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Zero,
    Layer { dev: u64, ino: u64, index: u64 },
}

impl Place {
    fn of(snapshot: &Snapshot, source: Source) -> Self {
        match source {
            Source::Zero => Self::Zero,
            Source::Layer { layer, index } => {
                let key = snapshot.layers()[layer as usize].key();
                Self::Layer { dev: key.dev, ino: key.ino, index }
            }
        }
    }

    const fn skip(self, skip: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Layer { dev, ino, index } => Self::Layer { dev, ino, index: index + skip },
        }
    }
}

impl Layout {
    /// Map a snapshot into the first pages of an area. The area must not be visible to anybody yet.
    pub fn build(area: &Area, snapshot: &Snapshot, access: Access, budget: usize) -> Result<Self> {
        let whole = PageRange::new(0, snapshot.pages());
        let extents = snapshot.extents()?;
        let plan = Plan::new(&extents, budget);
        let mut layout = Self { vmas: BTreeMap::new(), copied: PageSet::default(), budget };
        let working = if plan.copies.is_empty() { access } else { Access::ReadWrite };
        if !plan.copies.is_empty() || extents.iter().any(|extent| extent.source == Source::Zero) {
            area.map_zero(0, whole.byte_len(), working)?;
            layout.record(whole, Place::Zero);
        }
        for extent in plan.bases.iter().chain(&plan.overlays) {
            layout.map(area, snapshot, extent.pages, extent.source, working)?;
        }
        // A peer can describe more than it has: what no memory is left for must not end in an out-of-memory kill.
        ensure_memory(plan.copies.iter().map(|extent| extent.pages.len).sum(), "map()")?;
        for extent in &plan.copies {
            layout.copy(area, snapshot, extent.pages, extent.source)?;
        }
        if working != access {
            area.protect(0, whole.byte_len(), access)?;
        }
        Ok(layout)
    }

    /// Change what the given pages show. Within the budget they are mapped, beyond it copied.
    pub fn update(&mut self, area: &Area, snapshot: &Snapshot, changes: &[Extent]) -> Result<()> {
        let mut late = Vec::new();
        // Long extents first: each may take the place of many VMAs.
        let mut changes = changes.to_vec();
        changes.sort_unstable_by_key(|extent| std::cmp::Reverse(extent.pages.len));
        for Extent { pages, source } in changes {
            if self.shows(pages, Place::of(snapshot, source)) {
                if self.copied.count_in(pages) > 0 {
                    area.drop_private(pages.byte_offset(), pages.byte_len())?;
                    self.copied.remove(pages);
                }
            } else if self.has_room_for(pages) {
                self.map(area, snapshot, pages, source, Access::Read)?;
            } else {
                late.push(Extent { pages, source });
            }
        }
        if !late.is_empty() {
            ensure_memory(late.iter().map(|extent| extent.pages.len).sum(), "advance()")?;
            let whole = snapshot.pages() * PAGE;
            area.protect(0, whole as usize, Access::ReadWrite)?;
            let copied = late.iter().try_for_each(|extent| self.copy(area, snapshot, extent.pages, extent.source));
            area.protect(0, whole as usize, Access::Read)?;
            copied?;
        }
        self.uncopy(area, snapshot)
    }

    /// Map what was copied earlier, as far as the budget has room again.
    fn uncopy(&mut self, area: &Area, snapshot: &Snapshot) -> Result<()> {
        if self.copied.is_empty() || self.vmas.len() + 2 > self.budget {
            return Ok(());
        }
        for range in self.copied.ranges_in(PageRange::new(0, snapshot.pages())) {
            for Extent { pages, source } in snapshot.extents_in(range)? {
                if self.shows(pages, Place::of(snapshot, source)) {
                    area.drop_private(pages.byte_offset(), pages.byte_len())?;
                    self.copied.remove(pages);
                } else if self.vmas.len() + 2 <= self.budget {
                    self.map(area, snapshot, pages, source, Access::Read)?;
                } else {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Whether a change may be mapped: within the budget, or if it takes the place of as many VMAs as it makes.
    fn has_room_for(&self, pages: PageRange) -> bool {
        let budget = if pages.len >= LONG_PAGES { 2 * self.budget } else { self.budget };
        self.vmas.len() + 2 <= budget || self.vmas.range(pages.start..pages.end()).nth(2).is_some()
    }

    #[must_use]
    pub const fn copied(&self) -> &PageSet {
        &self.copied
    }

    #[must_use]
    pub fn vma_count(&self) -> usize {
        self.vmas.len()
    }

    fn map(
        &mut self,
        area: &Area,
        snapshot: &Snapshot,
        pages: PageRange,
        source: Source,
        access: Access,
    ) -> Result<()> {
        let place = Place::of(snapshot, source);
        if !self.copied.is_empty() {
            self.copied.remove(pages);
        }
        match source {
            Source::Zero if self.shows(pages, Place::Zero) => return Ok(()),
            Source::Zero => area.map_zero(pages.byte_offset(), pages.byte_len(), access)?,
            Source::Layer { layer, index } => {
                let fd = snapshot.layers()[layer as usize].fd();
                area.map_file(pages.byte_offset(), pages.byte_len(), fd, index * PAGE, Sharing::Private, access)?;
            }
        }
        self.record(pages, place);
        Ok(())
    }

    /// Copy pages over what is mapped, which must be writable.
    fn copy(&mut self, area: &Area, snapshot: &Snapshot, pages: PageRange, source: Source) -> Result<()> {
        match source {
            Source::Zero if self.shows(pages, Place::Zero) && self.copied.count_in(pages) == 0 => return Ok(()),
            Source::Zero => {
                for page in pages.start..pages.end() {
                    area.store((page * PAGE) as usize, &[0; PAGE as usize]);
                }
            }
            Source::Layer { layer, index } => {
                let fd = snapshot.layers()[layer as usize].fd();
                area.read_file(pages.byte_offset(), pages.byte_len(), fd, index * PAGE)?;
            }
        }
        self.copied.insert(pages);
        Ok(())
    }

    /// Whether one VMA shows exactly this for all these pages (copies aside).
    fn shows(&self, pages: PageRange, place: Place) -> bool {
        self.vmas
            .range(..=pages.start)
            .next_back()
            .is_some_and(|(&start, &(len, has))| start + len >= pages.end() && has.skip(pages.start - start) == place)
    }

    fn record(&mut self, pages: PageRange, place: Place) {
        if let Some((&start, &(len, has))) = self.vmas.range(..pages.start).next_back() {
            let end = start + len;
            if end > pages.start {
                self.vmas.insert(start, (pages.start - start, has));
                if end > pages.end() {
                    self.vmas.insert(pages.end(), (end - pages.end(), has.skip(pages.end() - start)));
                }
            }
        }
        while let Some((&start, &(len, has))) = self.vmas.range(pages.start..pages.end()).next() {
            self.vmas.remove(&start);
            let end = start + len;
            if end > pages.end() {
                self.vmas.insert(pages.end(), (end - pages.end(), has.skip(pages.end() - start)));
            }
        }
        let (mut start, mut len, mut place) = (pages.start, pages.len, place);
        if let Some((&before, &(n, has))) = self.vmas.range(..start).next_back() {
            if before + n == start && has.skip(n) == place {
                self.vmas.remove(&before);
                (start, len, place) = (before, len + n, has);
            }
        }
        if let Some(&(n, has)) = self.vmas.get(&(start + len)) {
            if place.skip(len) == has {
                self.vmas.remove(&(start + len));
                len += n;
            }
        }
        self.vmas.insert(start, (len, place));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, len: u64, layer: u8, index: u64) -> Extent {
        Extent { pages: PageRange::new(start, len), source: Source::Layer { layer, index } }
    }

    #[test]
    fn a_base_bridges_scattered_changes() {
        let extents =
            [extent(0, 10, 1, 0), extent(10, 1, 0, 0), extent(11, 9, 1, 11), extent(20, 1, 0, 1), extent(21, 4, 1, 21)];
        let plan = Plan::new(&extents, 100);
        assert_eq!(plan.bases, [extent(0, 25, 1, 0)]);
        assert_eq!(plan.overlays, [extent(10, 1, 0, 0), extent(20, 1, 0, 1)]);
        assert!(plan.copies.is_empty());
        let tight = Plan::new(&extents, 3);
        assert_eq!((tight.overlays.len(), tight.copies.len()), (1, 1));
    }

    #[test]
    fn interleaved_layers_give_disjoint_bases() {
        let extents = [extent(0, 2, 1, 0), extent(2, 1, 2, 2), extent(3, 2, 1, 3), extent(5, 1, 2, 5)];
        let plan = Plan::new(&extents, 100);
        assert_eq!(plan.bases.len(), 1);
        assert_eq!(plan.overlays.len(), 2);
    }

    #[test]
    fn where_vmas_are_short_long_zeros_are_not_copied_in() {
        let zero = |start, len| Extent { pages: PageRange::new(start, len), source: Source::Zero };
        let extents = [extent(0, 1, 1, 0), zero(1, 99), extent(100, 1, 1, 100), zero(101, 99), extent(200, 1, 1, 200)];
        let roomy = Plan::new(&extents, 100);
        assert_eq!((roomy.bases.len(), roomy.overlays.len()), (1, 2));
        let tight = Plan::new(&extents, 3);
        assert!(tight.bases.is_empty());
        assert_eq!((tight.overlays.len(), &tight.copies[..]), (2, &[extent(0, 1, 1, 0)][..]));
    }

    #[test]
    fn layout_splits_and_joins_like_the_kernel() {
        let place = |index| Place::Layer { dev: 0, ino: 1, index };
        let mut layout = Layout { vmas: BTreeMap::new(), copied: PageSet::default(), budget: 10 };
        layout.record(PageRange::new(0, 100), place(0));
        layout.record(PageRange::new(10, 5), place(500));
        assert_eq!(layout.vma_count(), 3);
        assert!(layout.shows(PageRange::new(20, 80), place(20)));
        layout.record(PageRange::new(10, 5), place(10));
        assert_eq!(layout.vma_count(), 1);
        assert!(layout.shows(PageRange::new(0, 100), place(0)));
    }
}
