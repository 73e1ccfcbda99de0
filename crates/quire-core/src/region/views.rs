//! Views: other mappings of a shared region's file in this process, whose touches are served as those of its own memory.
//!
//! The dynamic linker makes such mappings of a shared object's read-only segments. They are private, so that a page shows
//! the file's as long as nobody has written to it; filling and taking pages is done in the file.

use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::{Claim, Outcome, Region, registry};
use crate::Result;
use crate::pages::{PAGE, PageRange, push_merged};
use crate::sys::area::{Access, Area, Sharing};
use crate::sys::memfd;
use crate::sys::pagemap::Pagemap;
use crate::sys::uffd::{self, Uffd};

/// A private mapping of a part of the file, which its maker unmaps.
pub struct View {
    area: ManuallyDrop<Area>,
    /// Where in the region it starts, in bytes.
    offset: usize,
    access: Access,
}

impl View {
    /// All are multiples of the page size. Nothing may be mapped there but the file, from `offset` on, as long as the view
    /// is attached.
    #[must_use]
    pub const fn new(address: usize, len: usize, offset: usize, access: Access) -> Self {
        Self { area: Area::of_another(address, len), offset, access }
    }

    /// The part of the view that shows bytes of the region: offset in the view, and length.
    fn part(&self, offset: usize, len: usize) -> Option<(usize, usize)> {
        let start = offset.max(self.offset);
        let end = (offset + len).min(self.offset + self.area.len());
        (start < end).then(|| (start - self.offset, end - start))
    }
}

#[derive(Default)]
pub struct Views {
    list: OnceLock<Vec<View>>,
    detached: AtomicBool,
}

impl Views {
    pub fn is_attached(&self) -> bool {
        self.list.get().is_some() && !self.detached.load(Ordering::Acquire)
    }

    fn attached(&self) -> &[View] {
        if self.is_attached() { self.list.get().map_or(&[], Vec::as_slice) } else { &[] }
    }

    /// What of the views shows bytes of the region: addresses and lengths.
    fn parts(&self, offset: usize, len: usize) -> impl Iterator<Item = (&View, usize, usize)> {
        self.attached().iter().filter_map(move |view| view.part(offset, len).map(|(at, len)| (view, at, len)))
    }

    pub fn attach(&self, views: Vec<View>, uffd: &Uffd) -> Result<()> {
        for view in &views {
            view.register(uffd)?;
        }
        if self.list.set(views).is_err() {
            return Err(crate::Error::Invalid("the region has views already".to_owned()));
        }
        Ok(())
    }

    pub fn wake(&self, uffd: &Uffd, offset: usize, len: usize) -> Result<()> {
        self.parts(offset, len).try_for_each(|(view, at, len)| uffd.wake(view.area.addr() + at, len))
    }

    /// Make touches of missing pages raise SIGBUS, and wake who waits for them.
    pub fn poison(&self, uffd: &Uffd, offset: usize, len: usize) -> Result<()> {
        for (view, at, len) in self.parts(offset, len) {
            let start = view.area.addr() + at;
            for page in (start..start + len).step_by(PAGE as usize) {
                match uffd.poison(page, PAGE as usize) {
                    Err(error) if error.errno() == libc::EEXIST => {}
                    Err(error) if error.errno() == libc::EINVAL || error.errno() == libc::ENOTTY => {
                        // Before Linux 6.6. This one is never mended: code that failed to load stays so.
                        let empty = memfd::create(c"quire-failed")?;
                        view.area.map_file(at, len, empty.as_fd(), 0, Sharing::Private, view.access)?;
                        break;
                    }
                    outcome => outcome?,
                }
            }
            uffd.wake(start, len)?;
        }
        Ok(())
    }

    /// Take poison away. The pages were never filled, so that nobody can have changed them.
    pub fn mend(&self, offset: usize, len: usize) -> Result<()> {
        self.parts(offset, len).try_for_each(|(view, at, len)| view.area.drop_private(at, len))
    }

    /// Whether this process has any page of a range of the region in the page tables of the views.
    pub fn any_present(&self, pagemap: &Pagemap, offset: usize, len: usize) -> Result<bool> {
        for (view, at, len) in self.parts(offset, len) {
            if pagemap.any_present(view.area.addr(), PageRange::new(at as u64 / PAGE, len as u64 / PAGE))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// In a forked child: take the addresses back.
    pub fn reclaim(&self) -> Result<()> {
        self.attached().iter().try_for_each(|view| view.area.reclaim())
    }

    /// In a forked child, after `reclaim`.
    pub fn map_again(&self, file: BorrowedFd<'_>, uffd: &Uffd) -> Result<()> {
        for view in self.attached() {
            view.area.map_file(0, view.area.len(), file, view.offset as u64, Sharing::Private, view.access)?;
            view.register(uffd)?;
        }
        Ok(())
    }
}

impl View {
    fn register(&self, uffd: &Uffd) -> Result<()> {
        // A forked child that nobody has prepared must not run zeros.
        self.area.dont_fork(0, self.area.len())?;
        uffd.register(self.area.addr(), self.area.len(), uffd::MODE_MISSING)
    }
}

impl Region {
    /// Serve touches of these mappings of the region's file, and never take the windows of `kept`, ranges of bytes that were
    /// filled: somebody shows them who would read zeros. Once for each region.
    ///
    /// Pages outside of `kept` are missing afterwards, whoever has made them meanwhile.
    pub fn attach(self: &Arc<Self>, views: Vec<View>, kept: &[Range<u64>]) -> Result<()> {
        let mut windows = Vec::with_capacity(kept.len());
        for range in kept {
            let (first, last) = self.covering(range.start, range.end - range.start)?;
            windows.push(first..last);
        }
        windows.sort_unstable_by_key(|range| range.start);
        let _inside = self.inside()?;
        if self.kept.set(windows).is_err() {
            return Err(crate::Error::Invalid("the region has views already".to_owned()));
        }
        self.keep_again();
        let known: Vec<_> = views.iter().map(|view| (view.area.addr(), view.area.len(), view.offset)).collect();
        for &(start, len, offset) in &known {
            registry::add_view(self, start, len, offset);
        }
        self.memory.attach(views).inspect_err(|_| {
            known.iter().for_each(|(start, ..)| registry::remove_view(*start));
        })?;
        self.drop_strays()
    }

    /// Whoever touched the mappings before they were registered has made pages of zeros, where windows were not filled.
    fn drop_strays(&self) -> Result<()> {
        let mut missing = Vec::new();
        for window in 0..self.windows.len() {
            // Claimed, for somebody who takes it says so after it was done.
            let ours = self.windows.claim_waiting(window) == Claim::Ours;
            let filled = self.windows.is_open(window);
            if ours {
                self.release(window, window + 1, Outcome::Unchanged)?;
            }
            if !filled {
                push_merged(&mut missing, PageRange::new(window as u64, 1));
            }
        }
        for run in missing {
            let (start, len) = self.span(run.start as usize, run.end() as usize);
            self.memory.take(start, len)?;
        }
        Ok(())
    }

    /// Give a pinned range up that was needed once. Later processes are told of it, for they will need it once, too.
    ///
    /// # Errors
    /// The range is not within the region; what the kernel refuses.
    pub fn spend(&self, range: &Range<u64>) -> Result<()> {
        let len = range.end - range.start;
        let (first, last) = self.covering(range.start, len)?;
        (first..last).for_each(|window| self.note_touch(window));
        self.unpin(range.start, len)?;
        self.discard(range.start, len).map(drop)
    }

    /// Mark the windows that may never be taken.
    pub(super) fn keep_again(&self) {
        for window in self.kept.get().into_iter().flatten().cloned().flatten() {
            self.windows.set_pinned(window, true);
        }
    }

    pub(super) fn is_kept(&self, window: usize) -> bool {
        self.kept.get().into_iter().flatten().any(|range| range.contains(&window))
    }

    /// The views were unmapped by whoever made them, or are about to be: touches of their addresses are none of ours.
    pub fn detach(&self) {
        let views = &self.memory.views;
        for view in views.attached() {
            registry::remove_view(view.area.addr());
        }
        views.detached.store(true, Ordering::Release);
    }

    /// How many bytes of these ranges are in memory.
    pub fn resident_of(&self, ranges: &[Range<u64>]) -> Result<u64> {
        let resident = self.resident()?;
        let of = |range: &Range<u64>| {
            let overlaps = resident
                .iter()
                .map(|found| (found.end() * PAGE).min(range.end).saturating_sub((found.start * PAGE).max(range.start)));
            overlaps.sum::<u64>()
        };
        Ok(ranges.iter().map(of).sum())
    }
}
