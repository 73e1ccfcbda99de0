//! Reading files at an offset, and telling whether one is still the same. Nothing here allocates or takes a lock, so
//! that a signal handler can call it.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

/// What tells two states of a file apart, as far as the kernel knows without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub dev: u64,
    pub ino: u64,
    pub size: u64,
    pub mtime_ns: i128,
}

/// Why this thread's last system call failed.
pub(crate) fn errno() -> i32 {
    // SAFETY: the address of this thread's errno is always valid.
    unsafe { *libc::__errno_location() }
}

/// The state of a file now.
///
/// # Errors
/// The errno of `fstat`.
pub fn stamp(fd: BorrowedFd<'_>) -> Result<Stamp, i32> {
    // SAFETY: an all-zero stat is a valid value of the plain C struct.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` outlives the call, the descriptor is borrowed.
    if unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(errno());
    }
    let mtime_ns = i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec);
    Ok(Stamp { dev: stat.st_dev, ino: stat.st_ino, size: stat.st_size as u64, mtime_ns })
}

/// Read once, from where the descriptor stands; how many bytes came, 0 at the end.
///
/// # Errors
/// The errno of `read`, EINTR too.
pub fn read(fd: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize, i32> {
    // SAFETY: pointer and length describe `into`, which outlives the call.
    let n = unsafe { libc::read(fd.as_raw_fd(), into.as_mut_ptr().cast(), into.len()) };
    usize::try_from(n).map_err(|_| errno())
}

/// Read until `into` is full or the file ends; how many bytes came.
///
/// # Errors
/// The errno of `pread`.
pub fn read_at(fd: BorrowedFd<'_>, offset: u64, into: &mut [u8]) -> Result<usize, i32> {
    let mut done = 0;
    while done < into.len() {
        let rest = &mut into[done..];
        // SAFETY: pointer and length describe `rest`, which outlives the call.
        let n = unsafe {
            libc::pread(fd.as_raw_fd(), rest.as_mut_ptr().cast(), rest.len(), (offset + done as u64) as libc::off_t)
        };
        match n {
            0 => break,
            n if n > 0 => done += n as usize,
            _ => match errno() {
                libc::EINTR => {}
                other => return Err(other),
            },
        }
    }
    Ok(done)
}
