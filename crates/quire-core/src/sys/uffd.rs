//! userfaultfd: opening one by whatever way is allowed, and its ioctls.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::memfd::Piece;
use crate::sys::threads;
use crate::{Error, Result};

pub const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub const FEATURE_SIGBUS: u64 = 1 << 7;
pub const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub const FEATURE_POISON: u64 = 1 << 14;
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;

pub const MODE_MISSING: u64 = 1 << 0;
pub const MODE_WP: u64 = 1 << 1;

const UFFD_API: u64 = 0xAA;
const USER_MODE_ONLY: i32 = 1;

const fn ioctl_nr(dir: u64, nr: u64, size: usize) -> u64 {
    dir << 30 | (size as u64) << 16 | 0xAA << 8 | nr
}

const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const IOC_NEW: u64 = ioctl_nr(0, 0x00, 0);
const IOC_API: u64 = ioctl_nr(READ_WRITE, 0x3F, 24);
const IOC_REGISTER: u64 = ioctl_nr(READ_WRITE, 0x00, 32);
const IOC_UNREGISTER: u64 = ioctl_nr(READ, 0x01, 16);
const IOC_WAKE: u64 = ioctl_nr(READ, 0x02, 16);
const IOC_COPY: u64 = ioctl_nr(READ_WRITE, 0x03, 40);
const IOC_WRITEPROTECT: u64 = ioctl_nr(READ_WRITE, 0x06, 24);
const IOC_POISON: u64 = ioctl_nr(READ_WRITE, 0x08, 32);

/// An open userfaultfd. Belongs to the process that opened it; useless in a forked child.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    /// Faults inside system calls are not delivered: such calls fail with EFAULT.
    user_mode_only: bool,
    /// Of the file, to tell it from others under the same number.
    identity: (u64, u64),
    /// Whether `keep_open` was called.
    kept: AtomicBool,
}

/// What became of a copy into missing pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// All pages were missing and are filled.
    All,
    /// This many bytes were copied; the next page exists already.
    Exists(usize),
}

impl Uffd {
    /// Open one with these features, by the device, the system call, or the system call for user-mode faults only.
    pub fn open(features: u64) -> Result<Self> {
        let mut failure = Error::os("userfaultfd", libc::ENOSYS);
        for (user_mode_only, fd) in [(false, from_device as fn() -> _), (false, from_call), (true, from_user_mode_call)]
        {
            match fd().and_then(|fd| handshake(fd, features)) {
                Ok(fd) => {
                    return Ok(Self { identity: identity(&fd), fd, user_mode_only, kept: AtomicBool::new(false) });
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    fn ioctl<const N: usize>(&self, call: &'static str, nr: u64, words: &mut [u64; N]) -> Result<()> {
        loop {
            // SAFETY: each ioctl number above encodes the size of its argument, which is N words.
            let rc = unsafe { libc::ioctl(self.fd.as_raw_fd(), nr as _, words.as_mut_ptr()) };
            if rc == 0 {
                return Ok(());
            }
            let error = Error::last_os(call);
            // The address space was changing under the call: it asks to be repeated.
            if error.errno() != libc::EAGAIN {
                return Err(error);
            }
        }
    }

    /// Keep the kernel from forgetting all registrations when the program closes descriptors that it does not know: what
    /// is missing would read as zeros from then on.
    ///
    /// Once is enough: threads that are here at once do it once.
    pub fn keep_open(&self) -> Result<()> {
        if self.kept.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        threads::keep_open("quire-keeper", self.fd.as_fd()).inspect_err(|_| self.kept.store(false, Ordering::Release))
    }

    /// Whether the descriptor is what it was opened as; false if the program has closed it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        identity(&self.fd) == self.identity
    }

    pub fn register(&self, addr: usize, len: usize, mode: u64) -> Result<()> {
        self.ioctl("ioctl(UFFDIO_REGISTER)", IOC_REGISTER, &mut [addr as u64, len as u64, mode, 0])
    }

    pub fn unregister(&self, addr: usize, len: usize) -> Result<()> {
        self.ioctl("ioctl(UFFDIO_UNREGISTER)", IOC_UNREGISTER, &mut [addr as u64, len as u64])
    }

    /// Let threads that wait in the range try again.
    pub fn wake(&self, addr: usize, len: usize) -> Result<()> {
        self.ioctl("ioctl(UFFDIO_WAKE)", IOC_WAKE, &mut [addr as u64, len as u64])
    }

    /// In a forked child: close what belongs to the parent's address space, though the value itself must stay.
    pub fn abandon(&self) {
        // SAFETY: the value is never used again in this process; whoever leaks it promises that.
        unsafe { libc::close(self.fd.as_raw_fd()) };
    }

    #[must_use]
    pub const fn is_user_mode_only(&self) -> bool {
        self.user_mode_only
    }

    /// Fill missing pages with bytes, in one step for anybody who touches them, and wake who waits for them.
    /// Allocates nothing and takes no lock, so it may be called in a signal handler.
    ///
    /// Stops at the first page that exists. ENOENT and ESRCH (the range was unmapped, the process ends) are errors.
    pub fn copy(&self, addr: usize, from: Piece) -> Result<Copied> {
        let mut done = 0;
        while done < from.len {
            let mut arg = [(addr + done) as u64, (from.addr + done) as u64, (from.len - done) as u64, 0, 0];
            // SAFETY: UFFDIO_COPY takes five words; the kernel reads the piece and reports EFAULT if it is not there, and
            // writes to missing pages of a range registered by its owner, into which no Rust reference exists.
            let rc = unsafe { libc::ioctl(self.fd.as_raw_fd(), IOC_COPY as _, arg.as_mut_ptr()) };
            if rc == 0 {
                return Ok(Copied::All);
            }
            let error = Error::last_os("ioctl(UFFDIO_COPY)");
            let copied = arg[4] as i64;
            if copied > 0 {
                done += copied as usize;
                continue;
            }
            match error.errno() {
                libc::EAGAIN => {}
                libc::EEXIST => return Ok(Copied::Exists(done)),
                _ => return Err(error),
            }
        }
        Ok(Copied::All)
    }

    /// Make touches of missing pages raise SIGBUS, and wake who waits for them. From Linux 6.6 on.
    pub fn poison(&self, addr: usize, len: usize) -> Result<()> {
        self.ioctl("ioctl(UFFDIO_POISON)", IOC_POISON, &mut [addr as u64, len as u64, 0, 0])
    }

    /// Wait for the next touch of a missing page, and return its address.
    pub fn wait_fault(&self) -> Result<usize> {
        const EVENT_PAGEFAULT: u8 = 0x12;
        loop {
            let mut message = [0u64; 4];
            // SAFETY: the buffer is one message of 32 bytes long.
            let n = unsafe { libc::read(self.fd.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
            match n {
                32 if message[0].to_ne_bytes()[0] == EVENT_PAGEFAULT => return Ok(message[2] as usize),
                32 => {} // other events are not asked for
                _ => {
                    let error = Error::last_os("read(userfaultfd)");
                    if error.errno() != libc::EINTR && error.errno() != libc::EAGAIN {
                        return Err(error);
                    }
                }
            }
        }
    }

    pub fn write_protect(&self, addr: usize, len: usize) -> Result<()> {
        self.ioctl("ioctl(UFFDIO_WRITEPROTECT)", IOC_WRITEPROTECT, &mut [addr as u64, len as u64, 1])
    }
}

fn identity(fd: &OwnedFd) -> (u64, u64) {
    // SAFETY: a zeroed stat is a valid one to be filled in.
    let mut status: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the struct in, or fails if the descriptor is not open.
    let rc = unsafe { libc::fstat(fd.as_raw_fd(), &raw mut status) };
    if rc == 0 { (status.st_dev, status.st_ino) } else { (0, 0) }
}

fn owned(call: &'static str, fd: i64) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Error::last_os(call));
    }
    // SAFETY: the descriptor was just returned to us by the kernel and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn from_device() -> Result<OwnedFd> {
    // SAFETY: the path is a NUL-terminated literal.
    let device = owned(
        "open(/dev/userfaultfd)",
        i64::from(unsafe { libc::open(c"/dev/userfaultfd".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) }),
    )?;
    // SAFETY: USERFAULTFD_IOC_NEW takes the flags by value.
    owned(
        "ioctl(USERFAULTFD_IOC_NEW)",
        i64::from(unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW as _, libc::O_CLOEXEC) }),
    )
}

fn from_call() -> Result<OwnedFd> {
    // SAFETY: the call takes flags only.
    owned("userfaultfd", unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })
}

fn from_user_mode_call() -> Result<OwnedFd> {
    // SAFETY: the call takes flags only.
    owned("userfaultfd", unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) })
}

fn handshake(fd: OwnedFd, features: u64) -> Result<OwnedFd> {
    let mut api = [UFFD_API, features, 0];
    // SAFETY: UFFDIO_API takes three words, which `api` holds.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), IOC_API as _, api.as_mut_ptr()) };
    if rc == 0 { Ok(fd) } else { Err(Error::last_os("ioctl(UFFDIO_API)")) }
}
