//! Which pages this process has written: one tracker a process, chosen by trying it.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pages::{PAGE, PageRange};
use crate::sys::area::{Access, Area, Sharing};
use crate::sys::memfd;
use crate::sys::pagemap::{Pagemap, Query};
use crate::sys::uffd::{self, Uffd};
use crate::{Error, Result};

/// The environment variable that forces the fallback: `QUIRE_TRACKING=compare`.
pub const OVERRIDE: &str = "QUIRE_TRACKING";

/// How written pages are found.
#[derive(Debug)]
pub enum Tracking {
    /// The kernel marks them: userfaultfd in asynchronous write-protect mode, read with PAGEMAP_SCAN.
    Marked { uffd: Uffd, pagemap: Pagemap },
    /// Private copies are compared with the last version; without a page map, every page is.
    Compare { pagemap: Option<Pagemap> },
}

static CURRENT: Mutex<Option<Arc<Tracking>>> = Mutex::new(None);

pub(crate) fn lock() -> MutexGuard<'static, Option<Arc<Tracking>>> {
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tracking {
    /// This process's tracker; an error only while no descriptor is left for it. A forked child gets its own: both descriptors belong to an address space.
    pub fn current() -> Result<Arc<Self>> {
        let mut current = lock();
        if let Some(chosen) = &*current {
            return Ok(Arc::clone(chosen));
        }
        Ok(Arc::clone(current.insert(Arc::new(Self::choose()?))))
    }

    /// The choice is for good, so a lack of descriptors, which may pass, must not decide it.
    fn choose() -> Result<Self> {
        let passing = |error: &Error| matches!(error.errno(), libc::EMFILE | libc::ENFILE);
        let forced = std::env::var_os(OVERRIDE).is_some_and(|value| value == "compare");
        if !forced {
            match Self::try_marked() {
                Err(error) if !passing(&error) => {}
                other => return other,
            }
        }
        match Pagemap::open() {
            Err(error) if passing(&error) => Err(error),
            opened => Ok(Self::Compare { pagemap: opened.ok() }),
        }
    }

    /// Make a marked tracker and see it find exactly the one page written.
    fn try_marked() -> Result<Self> {
        let uffd = Uffd::open(
            uffd::FEATURE_WP_ASYNC
                | uffd::FEATURE_PAGEFAULT_FLAG_WP
                | uffd::FEATURE_WP_UNPOPULATED
                | uffd::FEATURE_WP_HUGETLBFS_SHMEM,
        )?;
        let tracking = Self::Marked { uffd, pagemap: Pagemap::open()? };
        let pages = PageRange::new(0, 4);
        let file = memfd::create(c"quire-probe")?;
        memfd::truncate(file.as_fd(), pages.len * PAGE)?;
        let area = Area::reserve(pages.byte_len())?;
        area.map_file(0, area.len(), file.as_fd(), 0, Sharing::Private, Access::ReadWrite)?;
        tracking.register(&area, pages)?;
        tracking.arm(&area, pages)?;
        area.store(PAGE as usize, &[1]);
        let mut found = Vec::new();
        tracking.written(&area, pages, Query::Written, &mut found)?;
        tracking.written(&area, pages, Query::Written, &mut found)?;
        if found == [PageRange::new(1, 1)] {
            Ok(tracking)
        } else {
            Err(Error::Unsupported(format!("PAGEMAP_SCAN found {found:?}")))
        }
    }

    #[must_use]
    pub const fn is_marked(&self) -> bool {
        matches!(self, Self::Marked { .. })
    }

    /// Start tracking a range of freshly mapped memory. Nothing is armed yet.
    pub fn register(&self, area: &Area, range: PageRange) -> Result<()> {
        match self {
            Self::Marked { uffd, .. } if range.len > 0 => {
                uffd.register(area.addr() + range.byte_offset(), range.byte_len(), uffd::MODE_WP)
            }
            _ => Ok(()),
        }
    }

    /// Mark every page of a registered range as not written, unpopulated ones too.
    pub fn arm(&self, area: &Area, range: PageRange) -> Result<()> {
        match self {
            Self::Marked { uffd, .. } if range.len > 0 => {
                uffd.write_protect(area.addr() + range.byte_offset(), range.byte_len())
            }
            _ => Ok(()),
        }
    }

    /// Append the pages written since they were last armed, and arm them again.
    pub fn written(&self, area: &Area, range: PageRange, query: Query, out: &mut Vec<PageRange>) -> Result<()> {
        match self {
            Self::Marked { pagemap, .. } => pagemap.scan(area.addr(), range, query, true, out),
            Self::Compare { .. } => Err(Error::Unsupported("pages are not marked by this tracker".to_owned())),
        }
    }

    /// Pages that may have been written: the private copies, or all of them where that cannot be seen.
    pub fn candidates(&self, area: &Area, range: PageRange, out: &mut Vec<PageRange>) -> Result<()> {
        match self {
            Self::Marked { pagemap, .. } | Self::Compare { pagemap: Some(pagemap) } => {
                pagemap.private_pages(area.addr(), range, out)
            }
            Self::Compare { pagemap: None } => {
                crate::pages::push_merged(out, range);
                Ok(())
            }
        }
    }

    pub(crate) fn uffd(&self) -> Option<&Uffd> {
        match self {
            Self::Marked { uffd, .. } => Some(uffd),
            Self::Compare { .. } => None,
        }
    }
}
