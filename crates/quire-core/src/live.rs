//! Live segments: the same pages at a read-only and a read-write address, and mirrors of them elsewhere.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::forking::{self, ForkAware};
use crate::pages::{PAGE, PageRange, pages_for, union};
use crate::publish::{self, Edition};
use crate::snapshot::{Snapshot, Stats};
use crate::sys::area::{Access, Area, Sharing};
use crate::sys::memfd;
use crate::sys::pagemap::Query;
use crate::sys::sysv::SharedId;
use crate::sys::tracking::Tracking;
use crate::{Error, Result};

/// What holds the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A memfd whose seals forbid every new writable mapping.
    Memfd,
    /// A System V segment; processes of the same user can attach it writable.
    SystemV,
}

#[derive(Debug)]
enum Store {
    Memfd(OwnedFd),
    SystemV(SharedId),
}

#[derive(Debug)]
struct State {
    rw: Area,
    size_bytes: u64,
    store: Arc<Store>,
    tip: Option<Arc<Snapshot>>,
    /// Pages that differ from the tip, found by a scan whose version could not be completed.
    pending: Vec<PageRange>,
    forked: bool,
}

/// Shared live pages with one writing process. Every method may be called from any thread.
#[derive(Debug)]
pub struct LiveSegment {
    ro: Area,
    rw_address: usize,
    size_bytes: u64,
    store: Arc<Store>,
    state: Arc<Mutex<State>>,
}

impl LiveSegment {
    pub fn new(size_bytes: u64, backend: Backend) -> Result<Self> {
        if size_bytes == 0 {
            return Err(Error::Invalid("a live segment has at least one byte".to_owned()));
        }
        if size_bytes > crate::pages::MAX_PAGES * PAGE {
            return Err(Error::Memory(format!(
                "a live segment of {size_bytes} bytes is larger than the address space"
            )));
        }
        let len = (pages_for(size_bytes) * PAGE) as usize;
        let ro = Area::reserve(len)?;
        let state = forking::enlist(|| State::new(size_bytes, backend, &ro))?;
        let (store, rw_address) = {
            let state = state.lock().unwrap_or_else(PoisonError::into_inner);
            (Arc::clone(&state.store), state.rw.addr())
        };
        Ok(Self { ro, rw_address, size_bytes, store, state })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    #[must_use]
    pub const fn ro_address(&self) -> usize {
        self.ro.addr()
    }

    #[must_use]
    pub const fn rw_address(&self) -> usize {
        self.rw_address
    }

    /// The memfd, if that is what holds the pages.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &*self.store {
            Store::Memfd(fd) => Some(fd.as_fd()),
            Store::SystemV(_) => None,
        }
    }

    /// The System V id, if that is what holds the pages.
    #[must_use]
    pub fn shared_id(&self) -> Option<SharedId> {
        match &*self.store {
            Store::Memfd(_) => None,
            Store::SystemV(id) => Some(*id),
        }
    }

    #[must_use]
    pub fn is_forked(&self) -> bool {
        self.lock().forked
    }

    /// The current content as an immutable version: everything is copied the first time, then what changed.
    pub fn snapshot(&self) -> Result<(Arc<Snapshot>, Stats)> {
        let start = Instant::now();
        let mut state = self.lock();
        if state.forked {
            return Err(Error::Forked("snapshot()"));
        }
        let (snapshot, mut stats) = state.publish()?;
        stats.duration_ns = start.elapsed().as_nanos() as u64;
        Ok((snapshot, stats))
    }
}

impl State {
    /// Make the memory and its writable alias, and show it read-only in `ro`, which is as long.
    fn new(size_bytes: u64, backend: Backend, ro: &Area) -> Result<Self> {
        let len = ro.len();
        let rw = Area::reserve(len)?;
        let store = match backend {
            Backend::Memfd => {
                let fd = memfd::create(c"quire-live")?;
                memfd::truncate(fd.as_fd(), len as u64)?;
                rw.map_file(0, len, fd.as_fd(), 0, Sharing::Shared, Access::ReadWrite)?;
                memfd::add_seals(fd.as_fd(), memfd::SEALS_MIRROR)?;
                ro.map_file(0, len, fd.as_fd(), 0, Sharing::Shared, Access::Read)?;
                Store::Memfd(fd)
            }
            Backend::SystemV => {
                let id = SharedId::create(len)?;
                let attached = id.attach(&rw, false).and_then(|()| id.attach(ro, true));
                id.remove()?;
                attached?;
                Store::SystemV(id)
            }
        };
        rw.advise(0, len, libc::MADV_NOHUGEPAGE);
        rw.dont_fork(0, len)?;
        Tracking::current()?.register(&rw, PageRange::new(0, pages_for(size_bytes)))?;
        Ok(Self { rw, size_bytes, store: Arc::new(store), tip: None, pending: Vec::new(), forked: false })
    }

    fn publish(&mut self) -> Result<(Arc<Snapshot>, Stats)> {
        let tracking = Tracking::current()?;
        let pages = pages_for(self.size_bytes);
        // Holes were never touched: they need no scan, and no table of their own in the kernel.
        let data = match &*self.store {
            Store::Memfd(fd) => memfd::data_ranges(fd.as_fd(), PageRange::new(0, pages))?,
            Store::SystemV(_) => vec![PageRange::new(0, pages)],
        };
        let mut found = Vec::new();
        if tracking.is_marked() {
            for &range in &data {
                tracking.written(&self.rw, range, Query::Written, &mut found)?;
            }
        } else {
            found = publish::differing(&self.rw, self.tip.as_deref(), &data)?;
        }
        self.pending = union(&self.pending, &found);
        let mut stats = Stats { pages_scanned: crate::pages::total(&data), ..Stats::default() };
        if let (Some(tip), true) = (&self.tip, self.pending.is_empty()) {
            return Ok((Arc::clone(tip), stats));
        }
        publish::ensure_memory(crate::pages::total(&self.pending), "snapshot()")?;
        let leaving = self.tip.as_deref().map_or_else(|| Ok(Vec::new()), |tip| publish::leaving(tip, 0))?;
        let published = Edition {
            area: &self.rw,
            size_bytes: self.size_bytes,
            tip: self.tip.as_deref(),
            changed: &self.pending,
            rewritten: &[],
            others: &[],
            leaving: &leaving,
        }
        .publish()?;
        self.pending.clear();
        stats.pages_copied = published.pages_copied;
        stats.nodes_written = published.nodes_written;
        let tip = Arc::new(published.snapshot);
        self.tip = Some(Arc::clone(&tip));
        Ok((tip, stats))
    }
}

impl ForkAware for State {
    fn before_fork(&mut self) {}

    fn enter_child(&mut self) {
        self.forked = true;
        if let Err(error) = self.rw.reclaim() {
            // The addresses belong to nobody here, so they must not be unmapped later.
            eprintln!("quire: {error}");
            std::process::abort();
        }
    }
}

/// A read-only view of another process's live segment.
#[derive(Debug)]
pub struct MirrorView {
    area: Area,
    size_bytes: u64,
}

/// Check that a descriptor is a mirror: nobody but its owner's existing mapping can change it, and nobody can cut
/// it short. Returns its size in bytes.
pub fn verify_mirror(fd: BorrowedFd<'_>) -> Result<u64> {
    let Some(seals) = memfd::seals(fd) else {
        return Err(Error::NotImmutable("the descriptor is no memfd".to_owned()));
    };
    if seals & memfd::SEALS_MIRROR != memfd::SEALS_MIRROR {
        return Err(Error::NotImmutable(format!(
            "the memfd has seals {seals:#x}, not all of {:#x} (FUTURE_WRITE, SHRINK, GROW, SEAL)",
            memfd::SEALS_MIRROR
        )));
    }
    let size = memfd::status(fd)?.size;
    if !memfd::is_tmpfs(fd) || size == 0 || size % PAGE != 0 || size > crate::pages::MAX_PAGES * PAGE {
        return Err(Error::Malformed(format!("a mirror of {size} bytes")));
    }
    Ok(size)
}

impl MirrorView {
    /// Map a mirror's descriptor, which is checked first.
    pub fn of_fd(fd: BorrowedFd<'_>, size_bytes: u64) -> Result<Self> {
        let size = verify_mirror(fd)?;
        if size_bytes == 0 || pages_for(size_bytes) * PAGE != size {
            return Err(Error::Malformed(format!("a mirror of {size} bytes is said to have {size_bytes}")));
        }
        let area = Area::reserve(size as usize)?;
        area.map_file(0, area.len(), fd, 0, Sharing::Shared, Access::Read)?;
        Ok(Self { area, size_bytes })
    }

    /// Attach a System V segment read-only.
    pub fn of_shared(id: SharedId, size_bytes: u64) -> Result<Self> {
        let size = id.size()?;
        if size_bytes == 0 || size != pages_for(size_bytes) * PAGE {
            return Err(Error::Malformed(format!("System V segment {} has {size} bytes, not {size_bytes}", id.0)));
        }
        let area = Area::reserve(size as usize)?;
        id.attach(&area, true)?;
        Ok(Self { area, size_bytes })
    }

    #[must_use]
    pub const fn address(&self) -> usize {
        self.area.addr()
    }

    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
}
