//! Comparing two page tables: equal subtrees are skipped, so the cost is that of the difference.

use std::sync::Arc;

use crate::pages::{FANOUT, PAGE, PageRange, push_merged};
use crate::snapshot::{Ref, Snapshot};
use crate::table::span;
use crate::Result;

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
struct Same(Vec<Option<u8>>);

impl Same {
    fn new(a: &Snapshot, b: &Snapshot) -> Self {
        let find = |layer| b.layers().iter().position(|other| Arc::ptr_eq(layer, other)).map(|i| i as u8);
        Self(a.layers().iter().map(find).collect())
    }

    fn refs(&self, a: Ref, b: Ref) -> bool {
        match (a, b) {
            (Ref::Zero, Ref::Zero) => true,
            (Ref::Run { layer: la, index: ia }, Ref::Run { layer: lb, index: ib })
            | (Ref::Table { layer: la, index: ia }, Ref::Table { layer: lb, index: ib }) => {
                ia == ib && self.0[la as usize] == Some(lb)
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
        let below = span(level - 1);
        for i in 0..FANOUT {
            let (child_a, child_b) = (self.a.child(a, level, base, i)?, self.b.child(b, level, base, i)?);
            self.visit(level - 1, base + i * below, child_a, child_b)?;
        }
        Ok(())
    }
}

/// Append those pages of a range whose bytes differ, skipping what is known to be a copy of the same page.
fn differing_pages(a: &Snapshot, b: &Snapshot, pages: PageRange, at_a: Ref, at_b: Ref, out: &mut Vec<PageRange>) -> Result<()> {
    let (mut buf_a, mut buf_b) = ([0; PAGE as usize], [0; PAGE as usize]);
    let mut skip = 0;
    while skip < pages.len {
        let copied = same_origin(a, b, at_a, at_b, skip);
        if copied > 0 {
            skip += copied.min(pages.len - skip);
            continue;
        }
        let differs = match (a.page_of(at_a, skip, &mut buf_a)?, b.page_of(at_b, skip, &mut buf_b)?) {
            (Some(x), Some(y)) => x != y,
            (Some(x), None) | (None, Some(x)) => x.iter().any(|byte| *byte != 0),
            (None, None) => false,
        };
        if differs {
            push_merged(out, PageRange::new(pages.start + skip, 1));
        }
        skip += 1;
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
