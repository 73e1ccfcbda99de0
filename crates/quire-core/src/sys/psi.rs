//! Pressure stall information: being told when processes wait for memory.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::{Error, Result};

/// A trigger: readable when some process has waited for memory for a tenth of two seconds.
///
/// The window is two seconds because unprivileged users may use multiples of it only.
pub struct Stall(OwnedFd);

impl Stall {
    pub fn listen() -> Result<Self> {
        const TRIGGER: &[u8] = b"some 200000 2000000\0";
        let flags = libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
        // SAFETY: the path is a NUL-terminated literal.
        let fd = unsafe { libc::open(c"/proc/pressure/memory".as_ptr(), flags) };
        if fd < 0 {
            return Err(Error::last_os("open(/proc/pressure/memory)"));
        }
        // SAFETY: the descriptor is new and nobody else owns it.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: the slice is valid.
        if unsafe { libc::write(file.as_raw_fd(), TRIGGER.as_ptr().cast(), TRIGGER.len()) } < 0 {
            return Err(Error::last_os("write(/proc/pressure/memory)"));
        }
        Ok(Self(file))
    }

    /// Wait for a stall; false if none came in time.
    pub fn wait(&self, limit: Duration) -> Result<bool> {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLPRI, revents: 0 };
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd, which outlives the call.
        let n = unsafe { libc::poll(&raw mut poll, 1, limit) };
        if n < 0 {
            let error = Error::last_os("poll");
            return if error.errno() == libc::EINTR { Ok(false) } else { Err(error) };
        }
        if poll.revents & libc::POLLERR != 0 {
            return Err(Error::Unsupported("the pressure file is gone".to_owned()));
        }
        Ok(n > 0)
    }
}
