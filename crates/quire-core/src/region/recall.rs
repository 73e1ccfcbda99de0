//! What was touched of a sparse region, kept for later processes (`source::Notes`). They fill it in one pass, forwards,
//! where touch by touch a source that is decoded would decode the same parts many times.
//!
//! Noted is what was touched, and what is kept for views. What was filled because it was noted before, and is not used,
//! is left out when notes are written again.

use super::{PAGE_BYTES, Region, buffers, fork, lock, registry};
use crate::Result;
use crate::pages::{PAGE, PageRange, push_merged};
use crate::source;
use crate::sys::pagemap::Pagemap;

/// Notes are written again if one window in so many that were noted was touched and is not noted.
const FEW: usize = 16;

impl Region {
    /// Fill what was touched by a process before this one. What cannot be filled is left to whoever touches it.
    ///
    /// # Errors
    /// The region is closed.
    pub fn recall(&self) -> Result<()> {
        let _inside = self.inside()?;
        let Some(notes) = lock(&self.notes).clone() else { return Ok(()) };
        for (first, last) in notes.load().into_iter().map(|range| self.windows_of(range)) {
            if self.ensure(first, last).is_err() {
                break;
            }
            (first..last).for_each(|window| self.windows.set_noted(window, true));
        }
        Ok(())
    }

    fn windows_of(&self, range: PageRange) -> (usize, usize) {
        let pages = (self.window / PAGE_BYTES) as u64;
        let last = range.end().div_ceil(pages).min(self.windows.len() as u64);
        ((range.start / pages) as usize, last as usize)
    }

    /// Keep for later processes what was touched until now, if that is much more than what was noted before.
    ///
    /// # Errors
    /// The region is closed; /proc/self/pagemap cannot be read.
    pub fn remember(&self) -> Result<()> {
        let _inside = self.inside()?;
        // Held, so that one thread does it at a time; inside, so that none holds it while the process forks.
        let notes = lock(&self.notes);
        let Some(notes) = &*notes else { return Ok(()) };
        let all = 0..self.windows.len();
        let noted = all.clone().filter(|window| self.windows.is_noted(*window)).count();
        let new = all.clone().filter(|window| !self.windows.is_noted(*window) && self.was_wanted(*window)).count();
        if new <= noted / FEW {
            return Ok(());
        }
        let pagemap = Pagemap::open()?;
        let mut touched = Vec::new();
        for window in all {
            let wanted = self.was_wanted(window) || self.windows.is_noted(window) && self.is_used(window, &pagemap)?;
            self.windows.set_noted(window, wanted);
            if wanted {
                let (at, len) = self.span(window, window + 1);
                push_merged(&mut touched, PageRange::new(at as u64 / PAGE, len as u64 / PAGE));
            }
        }
        notes.store(&touched);
        Ok(())
    }

    fn was_wanted(&self, window: usize) -> bool {
        self.was_touched(window) || self.windows.is_pinned(window)
    }

    /// Whether a view has a page of it in its page table: itself, or the kernel's because a page close by was touched.
    fn is_used(&self, window: usize, pagemap: &Pagemap) -> Result<bool> {
        let (at, len) = self.span(window, window + 1);
        self.memory.views.any_present(pagemap, at, len)
    }

    /// Give up what is held only to fill faster.
    ///
    /// # Errors
    /// The region is closed.
    pub fn rest(&self) -> Result<()> {
        let _inside = self.inside()?;
        self.source.rest();
        buffers::trim();
        source::trim(0);
        Ok(())
    }
}

/// Remember what was touched of all regions: the process is about to end.
pub fn remember_all() {
    for region in registry::all() {
        // One that is closed, or cannot tell, has no notes: they only make later processes faster.
        let _noted = region.remember();
    }
}

/// Nothing was filled for a while: note what was until now, and give up what would fill the next faster.
pub fn rest_all() -> Result<()> {
    remember_all();
    for region in registry::all() {
        // Closed in between: then there is nothing to give up.
        let _rested = region.rest();
    }
    fork::reading(|| source::trim(0))
}
