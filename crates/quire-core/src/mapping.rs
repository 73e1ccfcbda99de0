//! A mapping: a snapshot at a fixed address, which can be advanced to another snapshot.

use std::sync::Arc;

use crate::layout::{Layout, vma_budget};
use crate::pages::PAGE;
use crate::snapshot::{Ref, Snapshot};
use crate::sys::area::{Access, Area};
use crate::table::diff::compare;
use crate::table::walk::{Extent, Source, push_extent};
use crate::{Error, Result};

/// A view of a snapshot in this process.
#[derive(Debug)]
pub struct Mapping {
    area: Area,
    layout: Layout,
    snapshot: Arc<Snapshot>,
    private: bool,
}

impl Mapping {
    /// Map a snapshot; a private mapping can be written to, and nobody else sees it.
    pub fn new(snapshot: Arc<Snapshot>, private: bool) -> Result<Self> {
        let area = Area::reserve((snapshot.pages() * PAGE) as usize)?;
        let access = if private { Access::ReadWrite } else { Access::Read };
        let layout = Layout::build(&area, &snapshot, access, vma_budget())?;
        Ok(Self { area, layout, snapshot, private })
    }

    #[must_use]
    pub const fn address(&self) -> usize {
        self.area.addr()
    }

    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.snapshot.size_bytes()
    }

    #[must_use]
    pub fn copied_pages(&self) -> u64 {
        self.layout.copied().len()
    }

    /// Show another snapshot of the same size at the same address, touching only what differs.
    ///
    /// If a step fails the old version is laid out again; if that fails too, the whole mapping is made
    /// inaccessible rather than left showing a mixture.
    pub fn advance(&mut self, to: &Arc<Snapshot>) -> Result<()> {
        if self.private {
            return Err(Error::Invalid("a private mapping has content of its own and cannot be advanced".to_owned()));
        }
        if to.size_bytes() != self.snapshot.size_bytes() {
            return Err(Error::Invalid(format!(
                "the mapping shows {} bytes, the snapshot has {}; map it anew",
                self.snapshot.size_bytes(),
                to.size_bytes()
            )));
        }
        if let Err(error) = self.change(to, &Arc::clone(&self.snapshot)) {
            let from = Arc::clone(&self.snapshot);
            if self.change(&from, to).is_err() {
                self.area.map_none(0, self.area.len())?;
            }
            return Err(error);
        }
        self.snapshot = Arc::clone(to);
        Ok(())
    }

    fn change(&mut self, to: &Snapshot, from: &Snapshot) -> Result<()> {
        let mut changes: Vec<Extent> = Vec::new();
        compare(from, to, &mut |pages, _, place| {
            let source = match place {
                Ref::Run { layer, index } => Source::Layer { layer, index },
                _ => Source::Zero,
            };
            push_extent(&mut changes, pages, source);
            Ok(())
        })?;
        self.layout.update(&self.area, to, &changes)
    }
}
