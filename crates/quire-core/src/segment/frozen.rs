//! The second stage: a private mapping over the layers of the tip, with written pages tracked.

use std::sync::Arc;

use super::rewrite::{self, Ledger, Rewritten};
use super::{lay_out, tracking};
use crate::pages::{PAGE, PageRange, PageSet, pages_for, subtract, total, union};
use crate::publish::{self, Edition};
use crate::snapshot::{Snapshot, Stats};
use crate::sys::area::{Access, Area};
use crate::sys::hold::{Hold, What};
use crate::sys::pagemap::Query;
use crate::sys::tracking::Tracking;
use crate::table::walk::Source;
use crate::{Error, Result};

/// Zero memory of fewer pages is armed like data, so that a scan is one call.
const SPARSE_PAGES: u64 = 512;

/// See the module.
#[derive(Debug)]
pub(super) struct Frozen {
    tip: Arc<Snapshot>,
    zones: Zones,
    /// Private copies whose content is in a layer of the tip too.
    duplicates: PageSet,
    /// Pages that differ from the tip, found by a scan whose version could not be completed.
    pending: Vec<PageRange>,
    /// Ranges that lost their registration when a transition failed.
    unregistered: Vec<PageRange>,
    ledger: Ledger,
}

impl Frozen {
    /// Lay a version out in an area that nobody sees yet.
    pub fn over(area: &Area, tip: Arc<Snapshot>) -> Result<Self> {
        let layout = lay_out(area, &tip)?;
        let mut zones = Zones(Vec::new());
        let mut at = 0;
        for extent in tip.extents()? {
            if extent.source == Source::Zero && extent.pages.len >= SPARSE_PAGES {
                zones.push(PageRange::between(at, extent.pages.start), false);
                zones.push(extent.pages, true);
                at = extent.pages.end();
            }
        }
        zones.push(PageRange::between(at, tip.pages()), false);
        let mut duplicates = PageSet::default();
        for range in layout.copied().ranges_in(PageRange::new(0, tip.pages())) {
            duplicates.insert(range);
        }
        let mut frozen =
            Self { tip, zones, duplicates, pending: Vec::new(), unregistered: Vec::new(), ledger: Ledger::default() };
        frozen.ledger.record(&frozen.tip);
        frozen.track(area, PageRange::new(0, frozen.tip.pages()))?;
        // Nobody could write yet: the private copies there are the ones just made.
        frozen.pending.clear();
        Ok(frozen)
    }

    /// Take over a mapping that was just made private over `tip`.
    pub fn start(area: &Area, tip: Arc<Snapshot>, zones: &[(PageRange, bool)]) -> Result<Self> {
        let mut all = Zones(Vec::new());
        zones.iter().for_each(|&(range, sparse)| all.push(range, sparse));
        let pages = tip.pages();
        let mut frozen = Self {
            tip,
            zones: all,
            duplicates: PageSet::default(),
            pending: Vec::new(),
            unregistered: Vec::new(),
            ledger: Ledger::default(),
        };
        frozen.ledger.record(&frozen.tip);
        frozen.track(area, PageRange::new(0, pages))?;
        Ok(frozen)
    }

    pub const fn tip(&self) -> &Arc<Snapshot> {
        &self.tip
    }

    /// Register and arm a range that was just mapped. Copies made meanwhile belong to the next version.
    fn track(&mut self, area: &Area, range: PageRange) -> Result<()> {
        let tracking = tracking()?;
        if !tracking.is_marked() {
            return Ok(());
        }
        tracking.register(area, range)?;
        let mut early = Vec::new();
        for (part, sparse) in self.zones.within(range) {
            if !sparse {
                tracking.arm(area, part)?;
                tracking.candidates(area, part, &mut early)?;
            }
        }
        self.pending = union(&self.pending, &early);
        Ok(())
    }

    /// Register again what a failed transition left without tracking.
    fn restore_tracking(&mut self, area: &Area) -> Result<()> {
        while let Some(&range) = self.unregistered.last() {
            self.track(area, range)?;
            self.unregistered.pop();
        }
        Ok(())
    }

    /// The pages that differ from the tip, as far as the tracker can tell.
    fn changed(&self, area: &Area, tracking: &Tracking, pages: u64) -> Result<Vec<PageRange>> {
        let mut found = Vec::new();
        if tracking.is_marked() {
            for &(range, sparse) in &self.zones.0 {
                let query = if sparse { Query::WrittenPopulated } else { Query::Written };
                tracking.written(area, range, query, &mut found)?;
            }
            return Ok(union(&self.pending, &found));
        }
        let found = self.differing(area, tracking, PageRange::new(0, pages))?;
        Ok(union(&self.pending, &found))
    }

    /// The pages of a range whose content differs from the tip, by looking at every private copy.
    fn differing(&self, area: &Area, tracking: &Tracking, range: PageRange) -> Result<Vec<PageRange>> {
        let mut candidates = Vec::new();
        tracking.candidates(area, range, &mut candidates)?;
        publish::differing(area, Some(&self.tip), &candidates)
    }

    pub fn publish(&mut self, area: &Area, size_bytes: u64) -> Result<(Arc<Snapshot>, Stats)> {
        let tracking = tracking()?;
        let pages = pages_for(size_bytes);
        self.restore_tracking(area)?;
        // From here on the marks are gone: until the version is complete, its pages stay pending.
        self.pending = self.changed(area, &tracking, pages)?;
        let mut stats = Stats { pages_scanned: pages, ..Stats::default() };
        if self.pending.is_empty() && size_bytes == self.tip.size_bytes() {
            return Ok((Arc::clone(&self.tip), stats));
        }
        publish::ensure_memory(total(&self.pending), "snapshot()")?;
        let changed = self.pending.clone();
        let mut rewritten = Rewritten::default();
        let mut late = Vec::new();
        for stripe in self.ledger.choose(&self.tip, pages, &changed, &self.duplicates)? {
            self.rewrite(area, &tracking, stripe, &mut rewritten, &mut late)?;
        }
        let rest = subtract(&changed, &rewritten.stripes);
        let leaving = publish::leaving(&self.tip, rewritten.layers.len())?;
        let published = Edition {
            area,
            size_bytes,
            tip: Some(&self.tip),
            changed: &rest,
            rewritten: &rewritten.patches,
            others: &rewritten.layers,
            leaving: &leaving,
        }
        .publish()?;
        stats.pages_copied = published.pages_copied + rewritten.pages_copied;
        stats.nodes_written = published.nodes_written;
        self.tip = Arc::new(published.snapshot);
        self.ledger.record(&self.tip);
        rest.iter().for_each(|&range| self.duplicates.insert(range));
        self.pending = late;
        Ok((Arc::clone(&self.tip), stats))
    }

    /// Copy a stripe to a layer of its own and map it from there, while its writers are held.
    fn rewrite(
        &mut self,
        area: &Area,
        tracking: &Tracking,
        stripe: PageRange,
        rewritten: &mut Rewritten,
        late: &mut Vec<PageRange>,
    ) -> Result<()> {
        // Until the version is complete the whole stripe counts as changed: its marks are lost, and its mapping
        // will not be the tip's.
        self.pending = union(&self.pending, &[stripe]);
        self.unregistered.push(stripe);
        let hold = Hold::new(area, &self.zones.to_hold(stripe), tracking)?;
        let mut private = Vec::new();
        tracking.candidates(area, stripe, &mut private)?;
        let copy = rewrite::copy_stripe(area, &self.tip, stripe, &private)?;
        let mut at = stripe.start;
        for run in &copy.runs {
            area.map_zero(((at) * PAGE) as usize, ((run.start - at) * PAGE) as usize, Access::ReadWrite)?;
            copy.map(area, stripe, *run)?;
            at = run.end();
        }
        area.map_zero((at * PAGE) as usize, ((stripe.end() - at) * PAGE) as usize, Access::ReadWrite)?;
        drop(hold);
        self.zones.cut(stripe);
        let mut at = stripe.start;
        for run in copy.runs.iter().copied().chain([PageRange::new(stripe.end(), 0)]) {
            let gap = PageRange::between(at, run.start);
            self.zones.push(gap, gap.len >= SPARSE_PAGES);
            self.zones.push(run, false);
            at = run.end();
        }
        self.zones.sort();
        self.duplicates.remove(stripe);
        // What is private now was stored after the stripe was copied: it belongs to the next version.
        let before = std::mem::take(&mut self.pending);
        let tracked = self.track(area, stripe);
        late.append(&mut self.pending);
        late.sort_unstable();
        self.pending = before;
        tracked?;
        self.unregistered.pop();
        rewritten.add(copy, stripe);
        Ok(())
    }

    pub fn sever(&mut self, area: &Area, size_bytes: u64, pages: u64) -> Result<(Arc<Snapshot>, Stats, super::Fresh)> {
        let tracking = tracking()?;
        let whole = PageRange::new(0, pages);
        self.restore_tracking(area)?;
        self.pending = self.changed(area, &tracking, pages)?;
        self.unregistered = vec![whole];
        let hold = Hold::new(area, &self.zones.to_hold(whole), &tracking)?;
        // The marks are lost; stores between the scan and the hold are found by looking. In sparse zones that finds
        // everything, and a pending page there may have no memory: it must not be touched.
        let sparse: Vec<PageRange> = self.zones.0.iter().filter(|(_, sparse)| *sparse).map(|(zone, _)| *zone).collect();
        self.pending = subtract(&self.pending, &sparse);
        let changed = union(&self.pending, &self.differing(area, &tracking, whole)?);
        self.pending.clone_from(&changed);
        let mut stats = Stats { pages_scanned: pages, ..Stats::default() };
        let snapshot = if changed.is_empty() && size_bytes == self.tip.size_bytes() {
            Arc::clone(&self.tip)
        } else {
            let leaving = publish::leaving(&self.tip, 0)?;
            let published = Edition {
                area,
                size_bytes,
                tip: Some(&self.tip),
                changed: &changed,
                rewritten: &[],
                others: &[],
                leaving: &leaving,
            }
            .publish()?;
            (stats.pages_copied, stats.nodes_written) = (published.pages_copied, published.nodes_written);
            Arc::new(published.snapshot)
        };
        let fresh = super::Fresh::new(area, pages)?;
        drop(hold);
        Ok((snapshot, stats, fresh))
    }

    pub fn grow(&mut self, area: &Area, more: PageRange) -> Result<()> {
        if more.len == 0 {
            return Ok(());
        }
        area.map_zero(more.byte_offset(), more.byte_len(), Access::ReadWrite)?;
        self.zones.push(more, more.len >= SPARSE_PAGES);
        let tracked = self.track(area, more);
        if tracked.is_err() {
            self.zones.cut(more);
        }
        tracked
    }

    pub fn memory(&self, area: &Area, pages: u64) -> Result<super::Memory> {
        let mut private = Vec::new();
        tracking()?.candidates(area, PageRange::new(0, pages), &mut private)?;
        let mut layer_bytes = 0;
        for layer in self.tip.layers() {
            layer_bytes += layer.allocated_bytes()?;
        }
        Ok(super::Memory {
            private_bytes: total(&private) * PAGE,
            duplicate_bytes: self.duplicates.len() * PAGE,
            layer_bytes,
            live_bytes: self.tip.data_pages() * PAGE,
        })
    }

    /// Zones cover the segment; the tip's table is right and its counts too; duplicates equal the tip unless changed.
    pub fn check(&self, area: &Area, pages: u64) -> Result<()> {
        let bad = |text: String| Err(Error::Malformed(text));
        let mut at = 0;
        for &(range, _) in &self.zones.0 {
            if range.start != at {
                return bad(format!("zone {range:?} does not follow page {at}"));
            }
            at = range.end();
        }
        if at != pages {
            return bad(format!("zones end at page {at} of {pages}"));
        }
        if self.tip.check()? != self.tip.counts() {
            return bad(format!("counts {:?} are not {:?}", self.tip.counts(), self.tip.check()?));
        }
        // Every page that differs from the tip must be one that the next version would find.
        let tracking = tracking()?;
        if let Tracking::Marked { pagemap, .. } = &*tracking {
            let mut marked = Vec::new();
            for &(range, sparse) in &self.zones.0 {
                let query = if sparse { Query::WrittenPopulated } else { Query::Written };
                pagemap.scan(area.addr(), range, query, false, &mut marked)?;
            }
            let known = union(&self.pending, &marked);
            let missed = subtract(&self.differing(area, &tracking, PageRange::new(0, pages))?, &known);
            if !missed.is_empty() {
                return bad(format!("changed pages {missed:?} are not marked"));
            }
        }
        Ok(())
    }
}

/// How parts of the mapping are tracked: sparse zero memory is never armed, everything else is armed throughout.
#[derive(Debug)]
struct Zones(Vec<(PageRange, bool)>);

impl Zones {
    /// Append behind the last zone, joining to it if it is of the same kind.
    fn push(&mut self, range: PageRange, sparse: bool) {
        if range.len == 0 {
            return;
        }
        match self.0.last_mut() {
            Some((last, kind)) if *kind == sparse && last.end() == range.start => last.len += range.len,
            _ => self.0.push((range, sparse)),
        }
    }

    /// Remove a range, leaving a gap.
    fn cut(&mut self, range: PageRange) {
        let old = std::mem::take(&mut self.0);
        for (zone, sparse) in old {
            for part in subtract(&[zone], &[range]) {
                self.0.push((part, sparse));
            }
        }
    }

    fn sort(&mut self) {
        self.0.sort_unstable();
        let old = std::mem::take(&mut self.0);
        old.into_iter().for_each(|(range, sparse)| self.push(range, sparse));
    }

    /// How the writers of a range are held.
    fn to_hold(&self, range: PageRange) -> Vec<(PageRange, What)> {
        let how = |sparse| if sparse { What::SparseStores } else { What::Stores };
        self.within(range).into_iter().map(|(part, sparse)| (part, how(sparse))).collect()
    }

    fn within(&self, range: PageRange) -> Vec<(PageRange, bool)> {
        self.0.iter().map(|&(zone, sparse)| (zone.intersect(&range), sparse)).filter(|(part, _)| part.len > 0).collect()
    }
}
