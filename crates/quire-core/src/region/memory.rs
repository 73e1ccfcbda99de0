//! The memory of a region: how bytes get into it, out of it, and what a touch of a missing page does.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::pages::PAGE;
use crate::region::pager;
use crate::region::views::{View, Views};
use crate::sys::area::{Access, Area, Sharing};
use crate::sys::memfd::{self, Piece};
use crate::sys::uffd::{Copied, Uffd};
use crate::{Error, Result};

const PAGE_BYTES: usize = PAGE as usize;

/// How a touch of a missing page is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The kernel lets the toucher sleep and tells a thread of ours.
    Thread,
    /// The kernel sends the toucher SIGBUS, whose handler fills the page.
    Signal,
    /// The page may not be touched; the toucher gets SIGSEGV, whose handler fills the page and allows it.
    Sigsegv,
    /// It is not: everything is filled at once.
    Eager,
}

/// Address space that is filled piece by piece, and what lies behind it.
pub struct Memory {
    view: Area,
    behind: Behind,
    backend: Backend,
    access: Access,
    /// A forked child did not get the addresses back: they belong to somebody else.
    lost: AtomicBool,
    /// A window was hidden behind an empty file, because this kernel has no poison.
    hidden: AtomicBool,
    pub views: Views,
}

enum Behind {
    /// Private pages.
    Pages,
    /// A file that several processes fill.
    Shared(OwnedFd),
    /// A file of this process's own, with its writable mapping.
    Alias(OwnedFd, Area),
}

impl Memory {
    /// Reserve memory of `len` bytes, a multiple of the page size, all of it missing.
    pub fn new(len: usize, backend: Backend, shared: Option<OwnedFd>, executable: bool) -> Result<Self> {
        let view = Area::reserve(len)?;
        let behind = match (shared, backend) {
            (Some(file), _) => Behind::Shared(file),
            (None, Backend::Sigsegv) => {
                let file = memfd::create(c"quire-region")?;
                memfd::truncate(file.as_fd(), len as u64)?;
                Behind::Alias(file, Area::reserve(len)?)
            }
            (None, _) => Behind::Pages,
        };
        let access = if executable { Access::ReadExecute } else { Access::Read };
        let (lost, hidden) = (AtomicBool::new(false), AtomicBool::new(false));
        let memory = Self { view, behind, backend, access, lost, hidden, views: Views::default() };
        memory.map()?;
        Ok(memory)
    }

    fn map(&self) -> Result<()> {
        let len = self.view.len();
        match &self.behind {
            Behind::Pages if self.backend == Backend::Eager => return self.view.map_zero(0, len, Access::ReadWrite),
            Behind::Pages => self.view.map_zero(0, len, self.access)?,
            Behind::Shared(file) if self.backend == Backend::Eager => {
                return self.view.map_file(0, len, file.as_fd(), 0, Sharing::Shared, self.access);
            }
            Behind::Shared(file) | Behind::Alias(file, _) => {
                let access = if self.backend == Backend::Sigsegv { Access::None } else { self.access };
                self.view.map_file(0, len, file.as_fd(), 0, Sharing::Shared, access)?;
            }
        }
        if let Behind::Alias(file, alias) = &self.behind {
            alias.map_file(0, len, file.as_fd(), 0, Sharing::Shared, Access::ReadWrite)?;
            alias.dont_fork(0, len)?;
        }
        // A forked child that nobody has prepared must not read zeros from pages that are missing.
        self.view.dont_fork(0, len)?;
        if let Some(uffd) = self.uffd()? {
            uffd.register(self.view.addr(), len, crate::sys::uffd::MODE_MISSING)?;
        }
        Ok(())
    }

    fn uffd(&self) -> Result<Option<&'static Uffd>> {
        match self.backend {
            Backend::Thread => pager::thread_uffd().map(Some),
            Backend::Signal => pager::signal_uffd().map(Some),
            Backend::Sigsegv | Backend::Eager => Ok(None),
        }
    }

    pub fn view(&self) -> &Area {
        &self.view
    }

    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Whether the kernel may be given leave to drop pages.
    pub fn can_free_lazily(&self) -> bool {
        matches!(self.behind, Behind::Pages) && matches!(self.backend, Backend::Thread | Backend::Signal)
    }

    /// Whether a page that was taken away is noticed as missing by everybody who shares it.
    pub fn can_be_taken(&self) -> bool {
        match self.backend {
            Backend::Thread | Backend::Signal => true,
            Backend::Sigsegv => !matches!(self.behind, Behind::Shared(_)),
            Backend::Eager => false,
        }
    }

    /// The file that other processes fill too.
    pub fn shared_file(&self) -> Option<BorrowedFd<'_>> {
        match &self.behind {
            Behind::Shared(file) => Some(file.as_fd()),
            _ => None,
        }
    }

    /// Put whole pages where readers find them; those that are there already stay. Callable in a signal handler.
    pub fn install(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        match (&self.behind, self.uffd()?) {
            (_, Some(uffd)) => self.copy_missing(uffd, offset, Piece::of(bytes)),
            (Behind::Alias(_, alias), None) => {
                alias.store(offset, bytes);
                self.view.protect(offset, bytes.len(), self.access)
            }
            (Behind::Shared(file), None) => {
                // Not through a mapping: one write makes a page appear whole to those who look for it in the file.
                memfd::write_all(file.as_fd(), bytes, offset as u64)?;
                if self.backend == Backend::Sigsegv {
                    self.view.protect(offset, bytes.len(), self.access)?;
                }
                Ok(())
            }
            (Behind::Pages, None) => {
                self.view.store(offset, bytes);
                Ok(())
            }
        }
    }

    /// Whether pages can be taken from where they lie in memory.
    pub fn can_install_from(&self) -> bool {
        matches!(self.backend, Backend::Thread | Backend::Signal)
    }

    /// The same as `install` with whole pages that lie somewhere in memory, if `can_install_from`.
    pub fn install_from(&self, offset: usize, pages: Piece) -> Result<()> {
        match self.uffd()? {
            Some(uffd) => self.copy_missing(uffd, offset, pages),
            None => Err(Error::Unsupported("pages are installed from a buffer only".to_owned())),
        }
    }

    fn copy_missing(&self, uffd: &Uffd, offset: usize, pages: Piece) -> Result<()> {
        let addr = self.view.addr() + offset;
        let mut done = 0;
        while done < pages.len {
            match uffd.copy(addr + done, Piece { addr: pages.addr + done, len: pages.len - done })? {
                Copied::All => break,
                Copied::Exists(before) => done += before + PAGE_BYTES,
            }
        }
        if done > 0 {
            uffd.wake(addr, pages.len)?;
        }
        if self.views.is_attached() {
            // The pages are in the file. Mapped here too, they would count twice.
            self.view.drop_private(offset, pages.len)?;
            self.views.wake(uffd, offset, pages.len)?;
        }
        Ok(())
    }

    /// Everything is filled: from now on it is as readable as it will be.
    pub fn finish_eager(&self) -> Result<()> {
        self.view.protect(0, self.view.len(), self.access)
    }

    /// Let the kernel drop pages when it needs memory. Callable in a signal handler.
    pub fn free_lazily(&self, offset: usize, len: usize) -> Result<()> {
        self.view.free_lazily(offset, len)
    }

    /// Drop pages: they are missing again, and so is the mark of a failure.
    pub fn take(&self, offset: usize, len: usize) -> Result<()> {
        match &self.behind {
            Behind::Pages => self.view.drop_private(offset, len),
            Behind::Shared(file) => {
                self.view.drop_private(offset, len)?;
                memfd::punch_hole(file.as_fd(), offset as u64, len as u64)
            }
            Behind::Alias(file, _) => {
                self.view.protect(offset, len, Access::None)?;
                memfd::punch_hole(file.as_fd(), offset as u64, len as u64)
            }
        }
    }

    /// Forget which pages were touched lately, so that `touched` tells those touched from now on.
    pub fn age(&self, offset: usize, len: usize) -> Result<()> {
        match self.behind {
            Behind::Shared(_) => self.view.drop_private(offset, len),
            Behind::Pages | Behind::Alias(..) => Ok(()),
        }
    }

    /// Make touches of missing pages raise SIGBUS. False if this kernel cannot.
    pub fn poison(&self, offset: usize, len: usize) -> Result<()> {
        let Some(uffd) = self.uffd()? else { return Ok(()) };
        let addr = self.view.addr() + offset;
        for at in (0..len).step_by(PAGE_BYTES) {
            match uffd.poison(addr + at, PAGE_BYTES) {
                Err(error) if error.errno() == libc::EEXIST => {}
                Err(error) if error.errno() == libc::EINVAL || error.errno() == libc::ENOTTY => {
                    // Before Linux 6.6: a mapping of an empty file faults the same way, until it is taken.
                    self.hidden.store(true, Ordering::Release);
                    let empty = memfd::create(c"quire-failed")?;
                    self.view.map_file(offset, len, empty.as_fd(), 0, Sharing::Shared, self.access)?;
                    break;
                }
                outcome => outcome?,
            }
        }
        self.views.poison(uffd, offset, len)?;
        uffd.wake(addr, len)
    }

    /// After `poison` by mapping an empty file: map and register again. Nothing is readable before it is registered, since
    /// somebody who touches it meanwhile would read zeros.
    pub fn mend(&self, offset: usize, len: usize) -> Result<()> {
        let Some(uffd) = self.uffd()? else { return Ok(()) };
        self.views.mend(offset, len)?;
        if !self.hidden.load(Ordering::Acquire) {
            return Ok(()); // poison goes with the pages
        }
        match &self.behind {
            Behind::Shared(file) => {
                self.view.map_file(offset, len, file.as_fd(), offset as u64, Sharing::Shared, Access::None)?;
            }
            _ => self.view.map_zero(offset, len, Access::None)?,
        }
        self.view.dont_fork(offset, len)?;
        uffd.register(self.view.addr() + offset, len, crate::sys::uffd::MODE_MISSING)?;
        self.view.protect(offset, len, self.access)
    }

    /// Wake who waits for pages of a range, to look again.
    pub fn wake(&self, offset: usize, len: usize) -> Result<()> {
        match self.uffd()? {
            Some(uffd) => {
                self.views.wake(uffd, offset, len)?;
                uffd.wake(self.view.addr() + offset, len)
            }
            None => Ok(()),
        }
    }

    /// In a forked child: take the addresses back.
    pub fn reclaim(&self) -> Result<()> {
        if self.backend == Backend::Eager {
            return Ok(());
        }
        self.lost.store(true, Ordering::Release);
        if let Behind::Alias(_, alias) = &self.behind {
            alias.reclaim()?;
        }
        self.view.reclaim()?;
        self.views.reclaim()?;
        self.lost.store(false, Ordering::Release);
        Ok(())
    }

    /// In a forked child, after `reclaim`: all is missing. What several processes share stays filled.
    pub fn enter_child(&self) -> Result<()> {
        if self.backend == Backend::Eager {
            return Ok(());
        }
        if self.lost.load(Ordering::Acquire) {
            return Err(Error::Unsupported("its address was taken".to_owned()));
        }
        if let Behind::Alias(file, _) = &self.behind {
            let own = memfd::create(c"quire-region")?;
            memfd::truncate(own.as_fd(), self.view.len() as u64)?;
            memfd::replace(file.as_fd(), own)?;
        }
        self.map()?;
        match (&self.behind, self.uffd()?) {
            (Behind::Shared(file), Some(uffd)) => self.views.map_again(file.as_fd(), uffd),
            _ => Ok(()),
        }
    }

    /// Serve touches of other mappings of the file too, from now on.
    pub fn attach(&self, views: Vec<View>) -> Result<()> {
        match (&self.behind, self.backend, self.uffd()?) {
            (Behind::Shared(_), Backend::Thread, Some(uffd)) => self.views.attach(views, uffd)?,
            _ => return Err(Error::Unsupported("views are served for shared regions, by threads, only".to_owned())),
        }
        self.view.drop_private(0, self.view.len())
    }
}
