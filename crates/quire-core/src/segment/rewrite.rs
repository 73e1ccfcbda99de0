//! Rewriting: which stripes are worth it, and the copying of one.

use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use super::fresh::{HOLE_PAGES, runs_per_stripe, stripes_of};
use crate::Result;
use crate::layer::{Draft, Layer, Origins};
use crate::pages::{PAGE, PageRange, PageSet, bridge, clip, push_merged, subtract, total, union};
use crate::publish::data_in;
use crate::snapshot::Snapshot;
use crate::sys::area::{Access, Area, Sharing};
use crate::sys::memfd::{self, Piece};
use crate::table::Entry;
use crate::table::build::{Patch, Target};
use crate::table::walk::Source;

/// After so many versions a snapshot that still holds a replaced layer is taken to stay.
const VERSIONS_UNTIL_PINNED: u64 = 16;

/// What was replaced by rewriting while other snapshots held it: their pages are there twice until those go.
#[derive(Debug)]
struct Replaced {
    layer: Weak<Layer>,
    pages: u64,
    version: u64,
}

/// What the choice of stripes needs to know of the past.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Versions of this segment that may still be retained.
    versions: Vec<Weak<Snapshot>>,
    replaced: Vec<Replaced>,
    version: u64,
}

impl Ledger {
    /// A new version has become the tip.
    pub fn record(&mut self, tip: &Arc<Snapshot>) {
        self.version += 1;
        self.versions.retain(|version| version.strong_count() > 0);
        self.versions.push(Arc::downgrade(tip));
        self.replaced.retain(|replaced| replaced.layer.strong_count() > 0);
    }

    /// The stripes to rewrite in the version being made. Those that others still hold are entered as replaced.
    pub fn choose(
        &mut self,
        tip: &Snapshot,
        pages: u64,
        changed: &[PageRange],
        duplicates: &PageSet,
    ) -> Result<Vec<PageRange>> {
        let mut chosen = Vec::new();
        let mut others = Vec::new();
        let mut waste = 0;
        for stripe in stripes_of(pages) {
            let here = clip(changed, stripe);
            let (count, duplicated) = (total(&here), duplicates.count_in(stripe));
            // A stripe changed by half costs at most twice as much to rewrite, and is in one piece afterwards.
            // Its content is bounded from above without walking the table.
            if count > 0 && count * 2 >= stripe.len.min(tip.data_pages() + count) {
                chosen.push(stripe);
            } else {
                let again: u64 = here.iter().map(|range| duplicates.count_in(*range)).sum();
                // Each page changed becomes a duplicate, unless it is one, and leaves garbage.
                waste += duplicated + count - again + count;
                others.push((stripe, duplicated + count - again));
            }
        }
        self.replaced.retain(|replaced| replaced.layer.strong_count() > 0);
        let quick = Account::at_worst(tip)?;
        if (waste + quick.garbage) * 4 > quick.content * 3 / 4 {
            let account = self.account(tip)?;
            self.choose_for_space(tip, &account, &others, waste + account.garbage, &mut chosen)?;
        }
        chosen.sort_unstable();
        Ok(chosen)
    }

    /// Choose stripes until clearly less than the limit is wasted, as far as rewriting them helps.
    fn choose_for_space(
        &mut self,
        tip: &Snapshot,
        account: &Account,
        others: &[(PageRange, u64)],
        mut waste: u64,
        chosen: &mut Vec<PageRange>,
    ) -> Result<()> {
        // A little less than the quarter that is promised: nodes and trailers need some of it.
        let limit = (account.content + account.retained) * 9 / 40;
        let mut gains = Vec::new();
        for &(stripe, copies) in others {
            gains.push(account.gain(tip, stripe, copies)?);
        }
        gains.sort_unstable_by_key(|gain| std::cmp::Reverse(gain.net()));
        let pinned = self.replaced.iter().any(|replaced| replaced.version + VERSIONS_UNTIL_PINNED < self.version);
        let mut twice: u64 = self.replaced.iter().map(|replaced| replaced.pages).sum();
        let over = waste + twice > limit;
        for gain in gains {
            let worth = gain.net() > i64::try_from(gain.live / 16).unwrap_or(i64::MAX);
            // Not all at once: what is replaced is freed only when the version is complete, and then used again.
            if worth && over && waste * 8 > limit * 5 {
                waste = waste.saturating_sub(gain.net().unsigned_abs());
                chosen.push(gain.stripe);
            } else if !worth && !pinned && waste > limit * 3 / 4 && gain.given_back > gain.live / 8 {
                // Others hold what would be replaced, perhaps not for long: start early, and keep what is there
                // twice to a quarter of the content.
                if twice > 0 && (twice + gain.live_held) * 4 > account.content {
                    break;
                }
                twice += gain.live_held;
                waste = waste.saturating_sub(gain.given_back);
                chosen.push(gain.stripe);
                self.enter(tip, account, gain.stripe)?;
            }
        }
        Ok(())
    }

    /// Remember which layers a stripe leaves behind for others to hold.
    fn enter(&mut self, tip: &Snapshot, account: &Account, stripe: PageRange) -> Result<()> {
        for (i, &pages) in pages_by_layer(tip, stripe)?.iter().enumerate() {
            // Layers with pages in other stripes too stay for those anyway.
            if account.held[i] && pages > 0 && is_home(tip, i, pages) {
                let layer = Arc::downgrade(&tip.layers()[i]);
                self.replaced.push(Replaced { layer, pages, version: self.version });
            }
        }
        Ok(())
    }

    /// Where the tip's memory goes, with the retained versions of this segment looked at.
    ///
    /// References to a layer only go as versions follow one another, so what any of them needs of it is what the
    /// neediest of them needs. Of holders that are no versions of this segment everything is believed.
    fn account(&self, tip: &Snapshot) -> Result<Account> {
        let retained: Vec<Arc<Snapshot>> = self.versions.iter().filter_map(Weak::upgrade).collect();
        let mut account = Account::default();
        for (layer, count) in tip.layers().iter().zip(tip.counts()) {
            let own = count.data + count.nodes + 1;
            let mut needed = own;
            let mut holders = 0;
            for version in &retained {
                if let Some(at) = version.layers().iter().position(|other| Arc::ptr_eq(layer, other)) {
                    holders += 1;
                    let count = version.counts()[at];
                    needed = needed.max(count.data + count.nodes + 1);
                }
            }
            let allocated = layer.allocated_bytes()? / PAGE;
            // The tip is one of the versions, or the snapshot that the segment started from.
            if Arc::strong_count(layer) > holders.max(1) {
                needed = needed.max(allocated);
            }
            account.content += count.data;
            account.garbage += allocated.saturating_sub(needed);
            account.retained += needed.min(allocated).saturating_sub(own);
            account.held.push(Arc::strong_count(layer) > 1);
            account.unused.push(allocated.saturating_sub(own));
        }
        Ok(account)
    }
}

/// Where a version's memory goes, in pages.
#[derive(Default)]
struct Account {
    content: u64,
    /// Pages of the tip's layers that nothing needs.
    garbage: u64,
    /// Pages of the tip's layers that only other snapshots need.
    retained: u64,
    /// Which of the tip's layers stay when the tip lets go of them.
    held: Vec<bool>,
    /// Pages of each of the tip's layers that the tip does not need.
    unused: Vec<u64>,
}

/// What rewriting one stripe would do, in pages.
struct Gain {
    stripe: PageRange,
    live: u64,
    /// Of those, in layers that others hold: they will be there twice.
    live_held: u64,
    /// Duplicates, and garbage in layers that nobody else holds.
    given_back: u64,
}

impl Gain {
    /// Page counts are below 2^36, so the signed difference is exact.
    const fn net(&self) -> i64 {
        self.given_back as i64 - self.live_held as i64
    }
}

impl Account {
    /// As if every page that the tip does not need were garbage: an upper bound that costs little.
    fn at_worst(tip: &Snapshot) -> Result<Self> {
        let mut account = Self { content: tip.data_pages(), ..Self::default() };
        for (layer, count) in tip.layers().iter().zip(tip.counts()) {
            account.garbage += (layer.allocated_bytes()? / PAGE).saturating_sub(count.data + count.nodes + 1);
        }
        Ok(account)
    }

    fn gain(&self, tip: &Snapshot, stripe: PageRange, copies: u64) -> Result<Gain> {
        let mut gain = Gain { stripe, live: 0, live_held: 0, given_back: copies };
        for (i, &pages) in pages_by_layer(tip, stripe)?.iter().enumerate() {
            gain.live += pages;
            if self.held[i] {
                gain.live_held += pages;
            } else if is_home(tip, i, pages) {
                gain.given_back += self.unused[i];
            }
        }
        Ok(gain)
    }
}

/// Data pages of a stripe in each of the tip's layers.
fn pages_by_layer(tip: &Snapshot, stripe: PageRange) -> Result<Vec<u64>> {
    let mut pages = vec![0; tip.layers().len()];
    for extent in tip.extents_in(stripe)? {
        if let Source::Layer { layer, .. } = extent.source {
            pages[layer as usize] += extent.pages.len;
        }
    }
    Ok(pages)
}

/// Whether a layer has most of its pages in a stripe, so that rewriting the stripe lets go of the layer.
fn is_home(tip: &Snapshot, layer: usize, pages_in_stripe: u64) -> bool {
    pages_in_stripe * 2 > tip.counts()[layer].data
}

/// The stripes rewritten so far for one version.
#[derive(Default)]
pub(super) struct Rewritten {
    pub stripes: Vec<PageRange>,
    pub patches: Vec<Patch>,
    pub layers: Vec<Arc<Layer>>,
    pub pages_copied: u64,
}

impl Rewritten {
    pub fn add(&mut self, copy: Copy, stripe: PageRange) {
        let Copy { layer, runs } = copy;
        let mut at = stripe.start;
        for run in &runs {
            self.zero(PageRange::between(at, run.start));
            self.patches.push(Patch {
                pages: *run,
                target: Target::Other { layer: self.layers.len(), index: run.start - stripe.start },
            });
            at = run.end();
        }
        self.zero(PageRange::between(at, stripe.end()));
        self.pages_copied += total(&runs);
        self.layers.extend(layer);
        self.stripes.push(stripe);
    }

    fn zero(&mut self, pages: PageRange) {
        if pages.len > 0 {
            self.patches.push(Patch { pages, target: Target::Zero });
        }
    }
}

/// A stripe's content in a layer of its own, at the same displacements; none if it is all zero.
pub(super) struct Copy {
    layer: Option<Arc<Layer>>,
    /// Pages of the segment that the layer holds; the rest of the stripe is zero.
    pub runs: Vec<PageRange>,
}

impl Copy {
    pub fn map(&self, area: &Area, stripe: PageRange, run: PageRange) -> Result<()> {
        match &self.layer {
            Some(layer) => {
                let at = (run.start - stripe.start) * PAGE;
                area.map_file(run.byte_offset(), run.byte_len(), layer.fd(), at, Sharing::Private, Access::ReadWrite)
            }
            None => Ok(()),
        }
    }
}

/// Copy a stripe whose writers are held. `private` are the pages that may differ from the tip.
pub(super) fn copy_stripe(area: &Area, tip: &Snapshot, stripe: PageRange, private: &[PageRange]) -> Result<Copy> {
    let unchanged = subtract(&data_in(tip, stripe)?, private);
    let mut changed = Vec::new();
    for range in private {
        for page in range.start..range.end() {
            if !area.page_is_zero((page * PAGE) as usize) {
                push_merged(&mut changed, PageRange::new(page, 1));
            }
        }
    }
    let mut runs: Vec<PageRange> = Vec::new();
    for range in union(&unchanged, &changed) {
        match runs.last_mut() {
            Some(last) if range.start - last.end() < HOLE_PAGES => last.len = range.end() - last.start,
            _ => runs.push(range),
        }
    }
    bridge(&mut runs, runs_per_stripe());
    if runs.is_empty() {
        return Ok(Copy { layer: None, runs });
    }
    let fd = memfd::create(c"quire-layer")?;
    memfd::truncate(fd.as_fd(), stripe.len * PAGE)?;
    // Short holes within a run stay holes of the file: a page without memory must not be touched here.
    for part in union(&unchanged, &changed) {
        let piece = Piece { addr: area.addr() + part.byte_offset(), len: part.byte_len() };
        memfd::write_pieces(fd.as_fd(), (part.start - stripe.start) * PAGE, &[piece])?;
    }
    let mut origins = Origins::default();
    for range in &unchanged {
        for extent in tip.extents_in(*range)? {
            if let Source::Layer { layer, index } = extent.source {
                let here = extent.pages.start - stripe.start;
                origins.extend(&tip.layers()[layer as usize], index, extent.pages.len, here);
            }
        }
    }
    let layer = Layer::seal(Draft {
        fd: Arc::new(fd),
        data_pages: stripe.len,
        nodes: Vec::new(),
        imports: Vec::new(),
        size_bytes: 0,
        root: Entry::ZERO,
        origins,
        gathered: false,
    })?;
    Ok(Copy { layer: Some(layer), runs })
}
