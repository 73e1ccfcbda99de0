//! Forked children whose outcome is waited for, but not for ever.

use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// What no child takes, be the machine as loaded as it may.
const PATIENCE_MS: i32 = 60_000;

/// Run something in a forked child; returns its wait status: 0 if it was true.
///
/// # Panics
/// The child does not end: it waits for a lock that somebody had when it was forked.
pub fn in_child(work: impl FnOnce() -> bool) -> i32 {
    // SAFETY: the child touches memory of regions, which is what is tested, and leaves by _exit.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0, "{}", Error::last_os_error());
        if pid == 0 {
            libc::_exit(i32::from(!work()));
        }
        let raw = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(raw >= 0, "{}", Error::last_os_error());
        let child = OwnedFd::from_raw_fd(raw as i32);
        let mut ended = libc::pollfd { fd: child.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let ends = loop {
            match libc::poll(&raw mut ended, 1, PATIENCE_MS) {
                -1 => assert_eq!(Error::last_os_error().raw_os_error(), Some(libc::EINTR)),
                count => break count > 0,
            }
        };
        if !ends {
            libc::kill(pid, libc::SIGKILL);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
        assert!(ends, "the child hangs");
        status
    }
}

/// Tells other threads to stop when it is dropped, also by a panic, which would wait for them.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
