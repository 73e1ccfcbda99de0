//! Memory files: making, sealing, reading, writing.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::pages::{PAGE, PageRange};
use crate::sys::area::interrupted;
use crate::sys::file;
use crate::{Error, Result};

/// The seals that make content immutable for good.
pub const SEALS_IMMUTABLE: i32 = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
/// The seals of a mirror: only mappings that exist already can write.
pub const SEALS_MIRROR: i32 = libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

const TMPFS_MAGIC: i64 = 0x0102_1994;
const MFD_NOEXEC_SEAL: u32 = 8;

/// A new memfd that can be sealed; its name shows in /proc/PID/maps.
pub fn create(name: &std::ffi::CStr) -> Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    for flags in [flags | MFD_NOEXEC_SEAL, flags] {
        // SAFETY: `name` is a NUL-terminated string that outlives the call.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd >= 0 {
            // SAFETY: the descriptor is new and nobody else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        // Kernels before 6.3 do not know NOEXEC_SEAL.
        if std::io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            break;
        }
    }
    Err(Error::last_os("memfd_create"))
}

pub fn truncate(fd: BorrowedFd<'_>, bytes: u64) -> Result<()> {
    let bytes = i64::try_from(bytes).map_err(|_| Error::Invalid(format!("size {bytes} is too large")))?;
    // SAFETY: plain system call on a descriptor we borrow.
    let rc = unsafe { libc::ftruncate(fd.as_raw_fd(), bytes) };
    if rc == 0 { Ok(()) } else { Err(Error::last_os("ftruncate")) }
}

/// Add seals. The kernel refuses `F_SEAL_WRITE` with EBUSY while a page is in use, which includes the moment in which
/// another thread faults on it; it waits up to 150 ms by itself, and we ask it again a few times.
pub fn add_seals(fd: BorrowedFd<'_>, seals: i32) -> Result<()> {
    const TRIES: u32 = 20;
    for attempt in 1.. {
        // SAFETY: plain system call on a descriptor we borrow.
        let rc = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        if rc == 0 {
            break;
        }
        let error = Error::last_os("fcntl(F_ADD_SEALS)");
        if error.errno() != libc::EBUSY || attempt == TRIES {
            return Err(error.hinted("somebody has a writable mapping of the memory, or uses its pages"));
        }
    }
    Ok(())
}

/// The seals of a descriptor; None if it is not a file that can have any.
#[must_use]
pub fn seals(fd: BorrowedFd<'_>) -> Option<i32> {
    // SAFETY: plain system call on a descriptor we borrow.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    (seals >= 0).then_some(seals)
}

/// Whether the file lies in tmpfs memory of ordinary pages (a memfd that is not hugetlbfs).
#[must_use]
pub fn is_tmpfs(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: an all-zero statfs is a valid value of the plain C struct.
    let mut info: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the struct outlives the call.
    let rc = unsafe { libc::fstatfs(fd.as_raw_fd(), &raw mut info) };
    #[allow(clippy::unnecessary_cast)]
    let kind = info.f_type as i64;
    rc == 0 && kind == TMPFS_MAGIC
}

/// What `fstat` says that we need.
#[derive(Clone, Copy, Debug)]
pub struct Status {
    pub dev: u64,
    pub ino: u64,
    pub size: u64,
    pub allocated_bytes: u64,
    pub regular: bool,
}

pub fn status(fd: BorrowedFd<'_>) -> Result<Status> {
    // SAFETY: an all-zero stat is a valid value of the plain C struct.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the struct outlives the call.
    if unsafe { libc::fstat(fd.as_raw_fd(), &raw mut st) } != 0 {
        return Err(Error::last_os("fstat"));
    }
    Ok(Status {
        dev: st.st_dev,
        ino: st.st_ino,
        size: u64::try_from(st.st_size).unwrap_or(0),
        allocated_bytes: u64::try_from(st.st_blocks).unwrap_or(0) * 512,
        regular: st.st_mode & libc::S_IFMT == libc::S_IFREG,
    })
}

/// Fill `buf` from the file; false if the file is too short.
pub fn read_exact(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<bool> {
    let got = file::read_at(fd, offset, buf).map_err(|errno| Error::os("pread", errno))?;
    Ok(got == buf.len())
}

/// Write all bytes at an offset. Allocates nothing and takes no lock, so it may be called in a signal handler.
pub fn write_all(fd: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        // SAFETY: the pointer and length describe `rest`.
        let n =
            unsafe { libc::pwrite(fd.as_raw_fd(), rest.as_ptr().cast(), rest.len(), (offset + done as u64) as i64) };
        match n {
            n if n > 0 => done += n as usize,
            _ if interrupted() => {}
            _ => return Err(Error::last_os("pwrite")),
        }
    }
    Ok(())
}

/// Give the memory of a part back; it reads zero until it is written again.
pub fn punch_hole(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: plain system call on a descriptor we borrow.
    let rc = unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset as i64, len as i64) };
    if rc == 0 { Ok(()) } else { Err(Error::last_os("fallocate(PUNCH_HOLE)")) }
}

/// Make a descriptor number mean another file, in one step.
pub fn replace(place: BorrowedFd<'_>, file: OwnedFd) -> Result<()> {
    // SAFETY: the number stays owned by whoever owns it; only the file behind it changes.
    let rc = unsafe { libc::dup3(file.as_raw_fd(), place.as_raw_fd(), libc::O_CLOEXEC) };
    if rc < 0 { Err(Error::last_os("dup3")) } else { Ok(()) }
}

/// A piece of memory to be written: its address and length in bytes.
///
/// The kernel copies from it and reports EFAULT for memory that is not there, so no claim about it is needed.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub addr: usize,
    pub len: usize,
}

impl Piece {
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self { addr: bytes.as_ptr() as usize, len: bytes.len() }
    }
}

/// Write all pieces, one after the other, from `offset` on.
pub fn write_pieces(fd: BorrowedFd<'_>, offset: u64, pieces: &[Piece]) -> Result<()> {
    const BATCH: usize = 1024;
    let mut at = offset;
    let mut batch: Vec<libc::iovec> = Vec::with_capacity(BATCH.min(pieces.len()));
    for chunk in pieces.chunks(BATCH) {
        batch.clear();
        batch.extend(
            chunk
                .iter()
                .filter(|p| p.len > 0)
                .map(|p| libc::iovec { iov_base: p.addr as *mut libc::c_void, iov_len: p.len }),
        );
        let mut first = 0;
        while first < batch.len() {
            let rest = &batch[first..];
            // SAFETY: the iovecs describe memory that the kernel only reads, and it checks every address.
            let n = unsafe { libc::pwritev(fd.as_raw_fd(), rest.as_ptr(), rest.len() as i32, at as i64) };
            if n < 0 {
                if interrupted() {
                    continue;
                }
                return Err(Error::last_os("pwritev"));
            }
            if n == 0 {
                return Err(Error::os("pwritev", libc::ENOSPC));
            }
            at += n as u64;
            let mut n = n as usize;
            while first < batch.len() && n >= batch[first].iov_len {
                n -= batch[first].iov_len;
                first += 1;
            }
            if n > 0 {
                batch[first].iov_base = (batch[first].iov_base as usize + n) as *mut libc::c_void;
                batch[first].iov_len -= n;
            }
        }
    }
    Ok(())
}

/// The pages of a range of the file that are allocated, by SEEK_DATA and SEEK_HOLE; ascending and disjoint.
pub fn data_ranges(fd: BorrowedFd<'_>, within: PageRange) -> Result<Vec<PageRange>> {
    let mut out = Vec::new();
    let end = within.end() * PAGE;
    let mut at = within.start * PAGE;
    while at < end {
        let Some(start) = seek(fd, at, libc::SEEK_DATA)? else { break };
        let start = start / PAGE * PAGE;
        if start >= end {
            break;
        }
        let stop = seek(fd, start, libc::SEEK_HOLE)?.unwrap_or(end).min(end);
        crate::pages::push_merged(&mut out, PageRange::between(start / PAGE, stop.div_ceil(PAGE)));
        at = stop.max(start + PAGE);
    }
    Ok(out)
}

fn seek(fd: BorrowedFd<'_>, offset: u64, whence: i32) -> Result<Option<u64>> {
    // SAFETY: plain system call on a descriptor we borrow; nobody else uses its file position.
    let at = unsafe { libc::lseek(fd.as_raw_fd(), offset as i64, whence) };
    if at >= 0 {
        return Ok(Some(at as u64));
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        _ => Err(Error::last_os("lseek")),
    }
}
