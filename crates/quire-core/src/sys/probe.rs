//! What this kernel and user can do, found out by doing it; never by a version number.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::pages::{PAGE, PageRange};
use crate::sys::area::{Access, Area, Sharing};
use crate::sys::memfd;
use crate::sys::pagemap::{Pagemap, Query};
use crate::sys::sysv::SharedId;
use crate::sys::tracking::{OVERRIDE, Tracking};
use crate::sys::uffd::{self, Uffd};
use crate::{Error, Result};

/// One thing that was tried: Ok if it did what quire relies on.
#[derive(Debug)]
pub struct Check {
    /// A dotted name, `facility.detail`; docs/kernel.md lists them.
    pub name: &'static str,
    pub result: Result<()>,
}

/// Everything that was tried, and what quire uses in this process.
#[derive(Debug)]
pub struct Probe {
    pub checks: Vec<Check>,
    /// Written pages are marked by the kernel and writers are held by userfaultfd; otherwise pages are compared
    /// and writers are held by SIGSEGV.
    pub marked: bool,
    /// The value of `QUIRE_TRACKING`, if it is set.
    pub tracking_override: Option<String>,
}

const PAGE_BYTES: usize = PAGE as usize;

/// The userfaultfd features that are asked for one by one: name, bit.
const FEATURES: [(&str, u32); 12] = [
    ("userfaultfd.feature.PAGEFAULT_FLAG_WP", 0),
    ("userfaultfd.feature.EVENT_FORK", 1),
    ("userfaultfd.feature.EVENT_REMAP", 2),
    ("userfaultfd.feature.MISSING_SHMEM", 5),
    ("userfaultfd.feature.SIGBUS", 7),
    ("userfaultfd.feature.MINOR_SHMEM", 10),
    ("userfaultfd.feature.EXACT_ADDRESS", 11),
    ("userfaultfd.feature.WP_HUGETLBFS_SHMEM", 12),
    ("userfaultfd.feature.WP_UNPOPULATED", 13),
    ("userfaultfd.feature.POISON", 14),
    ("userfaultfd.feature.WP_ASYNC", 15),
    ("userfaultfd.feature.MOVE", 16),
];

/// Try everything. Takes about a millisecond, and leaves nothing behind but the process's own page tracker.
#[must_use]
pub fn probe() -> Probe {
    let mut checks = vec![
        Check { name: "memfd.create", result: memfd::create(c"quire-probe").map(drop) },
        Check { name: "memfd.seal_seal", result: seal_seal() },
        Check { name: "memfd.seal_shrink", result: seal_size(libc::F_SEAL_SHRINK, 0) },
        Check { name: "memfd.seal_grow", result: seal_size(libc::F_SEAL_GROW, 2 * PAGE) },
        Check { name: "memfd.seal_write", result: seal_write() },
        Check { name: "memfd.seal_write_is_exclusive", result: seal_write_is_exclusive() },
        Check { name: "memfd.seal_future_write", result: seal_future_write() },
        Check { name: "memfd.private_mapping", result: private_mapping() },
        Check { name: "memfd.shared_read_mapping", result: shared_read_mapping() },
    ];
    let mut usable: Option<Way> = None;
    for way in Way::ALL {
        let result = way.open().and_then(|fd| handshake(&fd, 0));
        if result.is_ok() {
            usable = usable.or(Some(way));
        }
        checks.push(Check { name: way.name(), result });
    }
    checks.extend(FEATURES.map(|(name, bit)| Check { name, result: feature(usable, 1 << bit) }));
    checks.extend([
        Check { name: "userfaultfd.hold", result: hold() },
        Check { name: "pagemap.read", result: pagemap_read() },
        Check { name: "pagemap.scan", result: pagemap_scan() },
        Check { name: "sysv", result: sysv() },
        Check { name: "madv_free", result: madv_free() },
        Check { name: "region.missing", result: fill_missing(0).map(drop) },
        Check { name: "region.kernel_faults", result: kernel_faults() },
        Check { name: "region.sigbus", result: fill_missing(uffd::FEATURE_SIGBUS).map(drop) },
        Check { name: "region.poison", result: poison() },
    ]);
    let tracking_override = std::env::var_os(OVERRIDE).map(|value| value.to_string_lossy().into_owned());
    Probe { checks, marked: Tracking::current().is_ok_and(|tracking| tracking.is_marked()), tracking_override }
}

/// The three ways to a userfaultfd, in the order in which quire tries them.
#[derive(Clone, Copy)]
enum Way {
    Device,
    Call,
    UserModeCall,
}

impl Way {
    const ALL: [Self; 3] = [Self::Device, Self::Call, Self::UserModeCall];

    const fn name(self) -> &'static str {
        match self {
            Self::Device => "userfaultfd.device",
            Self::Call => "userfaultfd.call",
            Self::UserModeCall => "userfaultfd.user_mode_call",
        }
    }

    fn open(self) -> Result<OwnedFd> {
        /// `_IO(0xAA, 0)`
        const USERFAULTFD_IOC_NEW: u64 = 0xAA00;
        const UFFD_USER_MODE_ONLY: i32 = 1;
        match self {
            Self::Device => {
                // SAFETY: the path is a NUL-terminated literal.
                let device = unsafe { libc::open(c"/dev/userfaultfd".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
                let device = owned("open(/dev/userfaultfd)", i64::from(device))?;
                // SAFETY: USERFAULTFD_IOC_NEW takes flags by value.
                let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, libc::O_CLOEXEC) };
                owned("ioctl(USERFAULTFD_IOC_NEW)", i64::from(fd))
            }
            Self::Call => {
                // SAFETY: the call takes flags only.
                owned("userfaultfd", unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })
            }
            Self::UserModeCall => {
                let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY;
                // SAFETY: the call takes flags only.
                owned("userfaultfd(UFFD_USER_MODE_ONLY)", unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })
            }
        }
    }
}

fn owned(call: &'static str, fd: i64) -> Result<OwnedFd> {
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(Error::last_os(call));
    }
    // SAFETY: the kernel has just returned this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn handshake(fd: &OwnedFd, features: u64) -> Result<()> {
    const UFFD_API: u64 = 0xAA;
    /// `_IOWR(0xAA, 0x3F, struct uffdio_api)`
    const UFFDIO_API: u64 = 0xC018_AA3F;
    let mut api = [UFFD_API, features, 0];
    // SAFETY: struct uffdio_api is three u64, which `api` holds.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, api.as_mut_ptr()) };
    if rc == 0 { Ok(()) } else { Err(Error::last_os("ioctl(UFFDIO_API)")) }
}

/// A descriptor takes one handshake only, so each feature needs a new one.
fn feature(way: Option<Way>, bits: u64) -> Result<()> {
    let way = way.ok_or_else(|| Error::Unsupported("userfaultfd cannot be opened".to_owned()))?;
    handshake(&way.open()?, bits)
}

/// A memfd of one page that reads zero.
fn one_page() -> Result<OwnedFd> {
    let file = memfd::create(c"quire-probe")?;
    memfd::truncate(file.as_fd(), PAGE)?;
    Ok(file)
}

/// A mapping of the first `pages` pages of a file.
fn mapped(file: &OwnedFd, pages: usize, sharing: Sharing, access: Access) -> Result<Area> {
    let area = Area::reserve(pages * PAGE_BYTES)?;
    area.map_file(0, area.len(), file.as_fd(), 0, sharing, access)?;
    Ok(area)
}

/// Ok if the kernel refused with this errno.
fn refused<T>(result: Result<T>, errno: i32, what: &str) -> Result<()> {
    match result {
        Ok(_) => Err(Error::Unsupported(format!("{what} was not refused"))),
        Err(error) if error.errno() == errno => Ok(()),
        Err(error) => Err(error),
    }
}

fn write_byte(file: &OwnedFd) -> Result<()> {
    memfd::write_pieces(file.as_fd(), 0, &[memfd::Piece::of(&[1])])
}

fn seal_seal() -> Result<()> {
    let file = one_page()?;
    memfd::add_seals(file.as_fd(), libc::F_SEAL_SEAL)?;
    refused(memfd::add_seals(file.as_fd(), libc::F_SEAL_GROW), libc::EPERM, "a seal after F_SEAL_SEAL")
}

fn seal_size(seal: i32, size: u64) -> Result<()> {
    let file = one_page()?;
    memfd::add_seals(file.as_fd(), seal)?;
    refused(memfd::truncate(file.as_fd(), size), libc::EPERM, "ftruncate of a sealed memfd")
}

fn seal_write() -> Result<()> {
    let file = one_page()?;
    memfd::add_seals(file.as_fd(), libc::F_SEAL_WRITE)?;
    refused(write_byte(&file), libc::EPERM, "a write to a memfd with F_SEAL_WRITE")?;
    let writable = mapped(&file, 1, Sharing::Shared, Access::ReadWrite);
    refused(writable, libc::EPERM, "a writable shared mapping of a memfd with F_SEAL_WRITE")
}

fn seal_write_is_exclusive() -> Result<()> {
    let file = one_page()?;
    let area = mapped(&file, 1, Sharing::Shared, Access::ReadWrite)?;
    let sealed = memfd::add_seals(file.as_fd(), libc::F_SEAL_WRITE);
    refused(sealed, libc::EBUSY, "F_SEAL_WRITE beside a writable shared mapping")?;
    drop(area);
    memfd::add_seals(file.as_fd(), libc::F_SEAL_WRITE)
}

fn seal_future_write() -> Result<()> {
    let file = one_page()?;
    let area = mapped(&file, 1, Sharing::Shared, Access::ReadWrite)?;
    memfd::add_seals(file.as_fd(), libc::F_SEAL_FUTURE_WRITE)?;
    area.store(0, &[7]);
    expect_first_byte(&file, 7, "a mapping older than F_SEAL_FUTURE_WRITE no longer writes")?;
    refused(write_byte(&file), libc::EPERM, "a write to a memfd with F_SEAL_FUTURE_WRITE")?;
    let writable = mapped(&file, 1, Sharing::Shared, Access::ReadWrite);
    refused(writable, libc::EPERM, "a writable shared mapping of a memfd with F_SEAL_FUTURE_WRITE")
}

fn expect_first_byte(file: &OwnedFd, want: u8, otherwise: &str) -> Result<()> {
    let mut byte = [0];
    if memfd::read_exact(file.as_fd(), &mut byte, 0)? && byte == [want] {
        return Ok(());
    }
    Err(Error::Unsupported(otherwise.to_owned()))
}

fn private_mapping() -> Result<()> {
    let file = one_page()?;
    memfd::add_seals(file.as_fd(), memfd::SEALS_IMMUTABLE)?;
    let area = mapped(&file, 1, Sharing::Private, Access::ReadWrite)?;
    area.store(0, &[7]);
    expect_first_byte(&file, 0, "a store to a private mapping reached the sealed memfd")
}

fn shared_read_mapping() -> Result<()> {
    let file = one_page()?;
    memfd::add_seals(file.as_fd(), memfd::SEALS_IMMUTABLE)?;
    mapped(&file, 1, Sharing::Shared, Access::Read).map(drop)
}

/// Register a private mapping for missing pages and write protection, as holding writers does.
fn hold() -> Result<()> {
    let features = uffd::FEATURE_PAGEFAULT_FLAG_WP | uffd::FEATURE_MISSING_SHMEM | uffd::FEATURE_WP_HUGETLBFS_SHMEM;
    let uffd = Uffd::open(features)?;
    let area = mapped(&one_page()?, 1, Sharing::Private, Access::ReadWrite)?;
    uffd.register(area.addr(), area.len(), uffd::MODE_MISSING | uffd::MODE_WP)?;
    uffd.write_protect(area.addr(), area.len())?;
    uffd.unregister(area.addr(), area.len())?;
    uffd.wake(area.addr(), area.len())
}

/// See a private copy in the page map's text: the fallback's way of finding candidates.
fn pagemap_read() -> Result<()> {
    let file = memfd::create(c"quire-probe")?;
    memfd::truncate(file.as_fd(), 4 * PAGE)?;
    let area = mapped(&file, 4, Sharing::Private, Access::ReadWrite)?;
    area.store(2 * PAGE_BYTES, &[1]);
    let mut found = Vec::new();
    Pagemap::open()?.private_pages(area.addr(), PageRange::new(0, 4), &mut found)?;
    expect_found(&found, PageRange::new(2, 1), "/proc/self/pagemap")
}

/// Find exactly the one page written in a registered range, and nothing once it is armed again.
fn pagemap_scan() -> Result<()> {
    let features = uffd::FEATURE_WP_ASYNC
        | uffd::FEATURE_PAGEFAULT_FLAG_WP
        | uffd::FEATURE_WP_UNPOPULATED
        | uffd::FEATURE_WP_HUGETLBFS_SHMEM;
    let (uffd, pagemap) = (Uffd::open(features)?, Pagemap::open()?);
    let file = memfd::create(c"quire-probe")?;
    memfd::truncate(file.as_fd(), 4 * PAGE)?;
    let area = mapped(&file, 4, Sharing::Private, Access::ReadWrite)?;
    uffd.register(area.addr(), area.len(), uffd::MODE_WP)?;
    uffd.write_protect(area.addr(), area.len())?;
    area.store(PAGE_BYTES, &[1]);
    let mut found = Vec::new();
    for _ in 0..2 {
        pagemap.scan(area.addr(), PageRange::new(0, 4), Query::Written, true, &mut found)?;
    }
    expect_found(&found, PageRange::new(1, 1), "PAGEMAP_SCAN")
}

fn expect_found(found: &[PageRange], want: PageRange, by: &str) -> Result<()> {
    if found == [want] {
        return Ok(());
    }
    Err(Error::Unsupported(format!("{by} found {found:?} instead of {want:?}")))
}

/// Attach a segment twice: a store to the writable one shows in the read-only one.
fn sysv() -> Result<()> {
    let (writable, readable) = (Area::reserve(PAGE_BYTES)?, Area::reserve(PAGE_BYTES)?);
    let id = SharedId::create(PAGE_BYTES)?;
    let attached = id.attach(&writable, false).and_then(|()| id.attach(&readable, true));
    // Removed even if attaching failed, so that nothing is left behind.
    id.remove()?;
    attached?;
    writable.store(0, &[1]);
    if readable.page_is_zero(0) {
        return Err(Error::Unsupported("two attachments of a System V segment differ".to_owned()));
    }
    Ok(())
}

/// Fill a missing page of read-only private memory and of a read-only mapped memfd, as regions do.
fn fill_missing(features: u64) -> Result<Uffd> {
    let uffd = Uffd::open(features | uffd::FEATURE_MISSING_SHMEM)?;
    let page = [7u8; PAGE_BYTES];
    let private = Area::reserve(PAGE_BYTES)?;
    private.map_zero(0, PAGE_BYTES, Access::Read)?;
    let file = memfd::create(c"quire-probe")?;
    memfd::truncate(file.as_fd(), PAGE)?;
    for area in [private, mapped(&file, 1, Sharing::Shared, Access::Read)?] {
        uffd.register(area.addr(), PAGE_BYTES, uffd::MODE_MISSING)?;
        let copied = uffd.copy(area.addr(), memfd::Piece::of(&page))?;
        if copied != uffd::Copied::All || !area.page_equals(0, &page) {
            return Err(Error::Unsupported("a missing page was filled with something else".to_owned()));
        }
    }
    Ok(uffd)
}

fn kernel_faults() -> Result<()> {
    if Uffd::open(uffd::FEATURE_MISSING_SHMEM)?.is_user_mode_only() {
        return Err(Error::Unsupported("faults inside system calls are not delivered to this user".to_owned()));
    }
    Ok(())
}

/// Poison a page; a system call that reads it fails and does not wait.
fn poison() -> Result<()> {
    let uffd = fill_missing(0)?;
    let area = Area::reserve(PAGE_BYTES)?;
    area.map_zero(0, PAGE_BYTES, Access::Read)?;
    uffd.register(area.addr(), PAGE_BYTES, uffd::MODE_MISSING)?;
    uffd.poison(area.addr(), PAGE_BYTES)?;
    match area.copy_out(0, &mut [0]) {
        0 => Ok(()),
        _ => Err(Error::Unsupported("a poisoned page was read".to_owned())),
    }
}

fn madv_free() -> Result<()> {
    let area = Area::reserve(PAGE_BYTES)?;
    area.map_zero(0, PAGE_BYTES, Access::ReadWrite)?;
    area.store(0, &[1]);
    area.free_lazily(0, PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_failures_say_why() {
        let probe = probe();
        let mut names: Vec<_> = probe.checks.iter().map(|check| check.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), probe.checks.len());
        for check in &probe.checks {
            if let Err(error) = &check.result {
                assert!(!error.to_string().is_empty(), "{}", check.name);
            }
        }
    }

    #[test]
    fn what_no_kernel_lacks_works() {
        let probe = probe();
        for name in ["memfd.create", "memfd.seal_write", "memfd.seal_write_is_exclusive", "memfd.private_mapping"] {
            let check = probe.checks.iter().find(|check| check.name == name).expect("a known name");
            assert!(check.result.is_ok(), "{check:?}");
        }
    }

    #[test]
    fn marking_needs_a_working_scan() {
        let probe = probe();
        let scan = probe.checks.iter().find(|check| check.name == "pagemap.scan").expect("a known name");
        assert!(scan.result.is_ok() || !probe.marked);
    }
}
