//! Rewriting: which stripes are worth it, and the copying of one.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::fresh::{HOLE_PAGES, stripes_of};
use super::frozen::is_held_elsewhere;
use crate::Result;
use crate::layer::{Draft, Layer, Origins};
use crate::pages::{PAGE, PageRange, PageSet, clip, push_merged, subtract, total, union};
use crate::publish::data_in;
use crate::snapshot::Snapshot;
use crate::sys::area::{Access, Area, Sharing};
use crate::sys::memfd::{self, Piece};
use crate::table::Entry;
use crate::table::build::{Patch, Target};
use crate::table::walk::Source;

/// The stripes to rewrite in the version being made.
pub(super) fn choose(
    tip: &Snapshot,
    pages: u64,
    changed: &[PageRange],
    duplicates: &PageSet,
) -> Result<Vec<PageRange>> {
    let stripes: Vec<PageRange> = stripes_of(pages).collect();
    let mut chosen = Vec::new();
    let mut others = Vec::new();
    for &stripe in &stripes {
        let here = clip(changed, stripe);
        if here.is_empty() && duplicates.count_in(stripe) == 0 {
            continue;
        }
        // A stripe changed by half costs at most twice as much to rewrite, and is in one piece afterwards.
        // Its content is bounded from above without walking the table.
        if total(&here) * 2 >= stripe.len.min(tip.data_pages() + total(&here)) {
            chosen.push(stripe);
        } else {
            others.push((stripe, here));
        }
    }
    let account = Account::of(tip)?;
    let fresh_waste: u64 = others
        .iter()
        .map(|(stripe, here)| {
            let known: u64 = here.iter().map(|range| duplicates.count_in(*range)).sum();
            let duplicate = duplicates.count_in(*stripe) + total(here) - known;
            duplicate + total(here)
        })
        .sum();
    let mut waste = account.garbage + fresh_waste;
    if waste * 4 > account.content + account.retained {
        let mut gains = Vec::new();
        for (stripe, here) in others {
            let gain = account.gain(tip, stripe, &here, duplicates)?;
            let live = total(&data_in_or_changed(tip, stripe, &here)?);
            if gain > i64::try_from(live / 16).unwrap_or(i64::MAX) {
                gains.push((gain.unsigned_abs(), stripe));
            }
        }
        gains.sort_unstable_by_key(|(gain, _)| std::cmp::Reverse(*gain));
        for (gain, stripe) in gains {
            if waste * 16 <= account.content {
                break;
            }
            waste = waste.saturating_sub(gain);
            chosen.push(stripe);
        }
    }
    chosen.sort_unstable();
    Ok(chosen)
}

fn data_in_or_changed(tip: &Snapshot, stripe: PageRange, changed: &[PageRange]) -> Result<Vec<PageRange>> {
    Ok(union(&data_in(tip, stripe)?, changed))
}

/// Where a version's memory goes, in pages.
struct Account {
    content: u64,
    /// Pages of the tip's own layers that nothing needs.
    garbage: u64,
    /// Pages of layers that other snapshots hold too, and that the tip does not need.
    retained: u64,
    held: Vec<bool>,
}

impl Account {
    fn of(tip: &Snapshot) -> Result<Self> {
        let mut account = Self { content: tip.data_pages(), garbage: 0, retained: 0, held: Vec::new() };
        for (layer, count) in tip.layers().iter().zip(tip.counts()) {
            let unused = (layer.allocated_bytes()? / PAGE).saturating_sub(count.data + count.nodes + 1);
            let held = is_held_elsewhere(layer);
            account.held.push(held);
            if held { account.retained += unused } else { account.garbage += unused }
        }
        Ok(account)
    }

    /// Pages that rewriting a stripe gives back, less what it costs because old layers stay for others.
    fn gain(&self, tip: &Snapshot, stripe: PageRange, changed: &[PageRange], duplicates: &PageSet) -> Result<i64> {
        let (mut live, mut live_held) = (0, 0);
        for extent in tip.extents_in(stripe)? {
            if let Source::Layer { layer, .. } = extent.source {
                live += extent.pages.len;
                if self.held[layer as usize] {
                    live_held += extent.pages.len;
                }
            }
        }
        let copies = duplicates.count_in(stripe) + total(changed);
        let own_part = (copies * (live - live_held)).checked_div(live).unwrap_or(0);
        Ok((copies + own_part) as i64 - live_held as i64)
    }
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
        fd,
        data_pages: stripe.len,
        nodes: Vec::new(),
        imports: Vec::new(),
        size_bytes: 0,
        root: Entry::ZERO,
        origins,
    })?;
    Ok(Copy { layer: Some(layer), runs })
}
