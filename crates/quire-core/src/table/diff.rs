//! Comparing two page tables: equal subtrees are skipped, so the cost is that of the difference.

use std::sync::Arc;

use crate::Result;
use crate::layer::{Layer, MAX_LAYERS};
use crate::pages::{FANOUT, PAGE, PageRange, push_merged, union};
use crate::snapshot::{Ref, Snapshot};
use crate::table::{Entry, span};

/// Runs of so many pages are asked for their holes before their pages are compared.
const LONG_RUN: u64 = 256;
/// Entries compared at once.
const GROUP: usize = 16;

/// The pages whose content differs, ascending and merged. Pages that only one of the two has count as different.
pub fn diff(a: &Snapshot, b: &Snapshot) -> Result<Vec<PageRange>> {
    let mut out = Vec::new();
    compare(a, b, &mut |pages, at_a, at_b| differing_pages(a, b, pages, at_a, at_b, &mut out))?;
    push_merged(&mut out, PageRange::between(a.pages().min(b.pages()), a.pages().max(b.pages())));
    Ok(out)
}

/// Call `found` for each range of pages, within both, that the two tables place differently: ascending, with the
/// place in each table, neither of which is a table.
pub fn compare(a: &Snapshot, b: &Snapshot, found: &mut dyn FnMut(PageRange, Ref, Ref) -> Result<()>) -> Result<()> {
    let mut walk = Walk { a, b, same: Same::new(a, b), common: a.pages().min(b.pages()), found };
    walk.visit(a.level().max(b.level()), 0, a.root()?, b.root()?)
}

/// Which layers of the two snapshots are one and the same.
struct Same {
    /// For each layer of the first, its place in the second.
    layers: Vec<Option<u8>>,
    /// Nodes name layers by id, which a hostile sender can forge. Equal nodes are equal subtrees only if no id means
    /// one file in the first snapshot and another in the second.
    ids_agree: bool,
}

impl Same {
    fn new(a: &Snapshot, b: &Snapshot) -> Self {
        let find = |layer| b.layers().iter().position(|other| Arc::ptr_eq(layer, other)).map(|i| i as u8);
        let forged = |x: &Arc<Layer>| b.layers().iter().any(|y| x.trailer().id == y.trailer().id && !Arc::ptr_eq(x, y));
        Self { layers: a.layers().iter().map(find).collect(), ids_agree: !a.layers().iter().any(forged) }
    }

    fn refs(&self, a: Ref, b: Ref) -> bool {
        match (a, b) {
            (Ref::Zero, Ref::Zero) => true,
            (Ref::Run { layer: la, index: ia }, Ref::Run { layer: lb, index: ib }) => {
                ia == ib && self.layers[la as usize] == Some(lb)
            }
            (Ref::Table { layer: la, index: ia }, Ref::Table { layer: lb, index: ib }) => {
                self.ids_agree && ia == ib && self.layers[la as usize] == Some(lb)
            }
            _ => false,
        }
    }
}

struct Walk<'a> {
    a: &'a Snapshot,
    b: &'a Snapshot,
    same: Same,
    common: u64,
    found: &'a mut dyn FnMut(PageRange, Ref, Ref) -> Result<()>,
}

impl Walk<'_> {
    fn visit(&mut self, level: u32, base: u64, a: Ref, b: Ref) -> Result<()> {
        if base >= self.common || self.same.refs(a, b) {
            return Ok(());
        }
        if !matches!(a, Ref::Table { .. }) && !matches!(b, Ref::Table { .. }) {
            return (self.found)(PageRange::between(base, (base + span(level)).min(self.common)), a, b);
        }
        if let (Ref::Table { layer: la, index: ia }, Ref::Table { layer: lb, index: ib }) = (a, b) {
            if level <= self.a.level() && level <= self.b.level() {
                return self.nodes(level, base, (la, ia), (lb, ib));
            }
        }
        match (level, a, b) {
            (1, Ref::Run { layer, index }, Ref::Table { layer: holder, index: node }) => {
                let slot = self.same.layers[layer as usize].and_then(|at| self.b.slot_of_layer(holder, at));
                let entries = self.b.table(holder, node)?;
                return self.run_and_leaf(base, slot.map(|slot| Entry::run(slot, index)), entries, |walk, i| {
                    Ok((walk.a.child(a, 1, base, i)?, walk.b.child(b, 1, base, i)?))
                });
            }
            (1, Ref::Table { layer: holder, index: node }, Ref::Run { layer, index }) => {
                let at = self.same.layers.iter().position(|same| *same == Some(layer));
                let slot = at.and_then(|at| self.a.slot_of_layer(holder, at as u8));
                let entries = self.a.table(holder, node)?;
                return self.run_and_leaf(base, slot.map(|slot| Entry::run(slot, index)), entries, |walk, i| {
                    Ok((walk.a.child(a, 1, base, i)?, walk.b.child(b, 1, base, i)?))
                });
            }
            _ => {}
        }
        let below = span(level - 1);
        for i in 0..FANOUT {
            let (child_a, child_b) = (self.a.child(a, level, base, i)?, self.b.child(b, level, base, i)?);
            self.visit(level - 1, base + i * below, child_a, child_b)?;
        }
        Ok(())
    }
}

impl Walk<'_> {
    /// A run on one side, a node of the last level on the other: `first` is how the node would name the run.
    fn run_and_leaf(
        &mut self,
        base: u64,
        first: Option<Entry>,
        entries: &[u64],
        pair: impl Fn(&Self, u64) -> Result<(Ref, Ref)>,
    ) -> Result<()> {
        for (i, &raw) in entries.iter().enumerate() {
            if base + i as u64 >= self.common {
                break;
            }
            // The next page of a run is the next index, which stands in the low bits.
            if first.is_some_and(|first| raw == first.raw() + i as u64) {
                continue;
            }
            let (a, b) = pair(self, i as u64)?;
            self.visit(0, base + i as u64, a, b)?;
        }
        Ok(())
    }

    /// Two nodes. Most entries are equal words with slots that mean the same in both.
    fn nodes(&mut self, level: u32, base: u64, (la, ia): (u8, u64), (lb, ib): (u8, u64)) -> Result<()> {
        let (entries_a, entries_b) = (self.a.table(la, ia)?, self.b.table(lb, ib)?);
        let mut agree = 0u64;
        for slot in 0..MAX_LAYERS as u8 {
            let (at_a, at_b) = (self.a.layer_of_slot(la, slot), self.b.layer_of_slot(lb, slot));
            // A slot that one of them does not resolve is not used by it: both tables have been checked.
            let agrees = match (at_a, at_b) {
                (Some(at_a), Some(at_b)) => self.same.layers[at_a as usize] == Some(at_b),
                _ => true,
            };
            agree |= u64::from(agrees) << slot;
        }
        // Tables of one lineage keep their slots, so that whole groups are equal words; slot 0 alone always differs.
        let by_words = level == 1 || self.same.ids_agree;
        let grouped = by_words && agree | 1 == u64::MAX;
        for (group, (group_a, group_b)) in entries_a.chunks_exact(GROUP).zip(entries_b.chunks_exact(GROUP)).enumerate()
        {
            if grouped && group_a == group_b && !group_a.iter().any(|&raw| raw != 0 && Entry::from_raw(raw).slot() == 0)
            {
                continue;
            }
            for (i, (&raw_a, &raw_b)) in group_a.iter().zip(group_b).enumerate() {
                if by_words && raw_a == raw_b && (raw_a == 0 || agree >> Entry::from_raw(raw_a).slot() & 1 == 1) {
                    continue;
                }
                let (a, b) = (self.a.resolve(la, Entry::from_raw(raw_a))?, self.b.resolve(lb, Entry::from_raw(raw_b))?);
                self.visit(level - 1, base + (group * GROUP + i) as u64 * span(level - 1), a, b)?;
            }
        }
        Ok(())
    }
}

/// Append those pages of a range whose bytes differ. Long runs may have holes, whose pages read zero and are not looked
/// at one by one: a few KiB can describe terabytes of them.
fn differing_pages(
    a: &Snapshot,
    b: &Snapshot,
    pages: PageRange,
    at_a: Ref,
    at_b: Ref,
    out: &mut Vec<PageRange>,
) -> Result<()> {
    if pages.len < LONG_RUN {
        return differing_in(a, b, pages, pages, at_a, at_b, out);
    }
    for part in union(&a.data_of(at_a, pages)?, &b.data_of(at_b, pages)?) {
        differing_in(a, b, pages, part, at_a, at_b, out)?;
    }
    Ok(())
}

/// Append those pages of a part of a range whose bytes differ, skipping what is known to be a copy of the same page.
fn differing_in(
    a: &Snapshot,
    b: &Snapshot,
    pages: PageRange,
    part: PageRange,
    at_a: Ref,
    at_b: Ref,
    out: &mut Vec<PageRange>,
) -> Result<()> {
    let (mut buf_a, mut buf_b) = ([0; PAGE as usize], [0; PAGE as usize]);
    let mut page = part.start;
    while page < part.end() {
        let skip = page - pages.start;
        let copied = same_origin(a, b, at_a, at_b, skip);
        if copied > 0 {
            page += copied.min(part.end() - page);
            continue;
        }
        let differs = match (a.page_of(at_a, skip, &mut buf_a)?, b.page_of(at_b, skip, &mut buf_b)?) {
            (Some(x), Some(y)) => x != y,
            (Some(x), None) | (None, Some(x)) => x.iter().any(|byte| *byte != 0),
            (None, None) => false,
        };
        if differs {
            push_merged(out, PageRange::new(page, 1));
        }
        page += 1;
    }
    Ok(())
}

/// Pages from `skip` on that are copies of the same pages, as the process that copied them knows.
fn same_origin(a: &Snapshot, b: &Snapshot, at_a: Ref, at_b: Ref, skip: u64) -> u64 {
    let (Ref::Run { layer: la, index: ia }, Ref::Run { layer: lb, index: ib }) = (at_a, at_b) else { return 0 };
    let (number_a, page_a, len_a) = a.layers()[la as usize].origin(ia + skip);
    let (number_b, page_b, len_b) = b.layers()[lb as usize].origin(ib + skip);
    if (number_a, page_a) == (number_b, page_b) { len_a.min(len_b) } else { 0 }
}
