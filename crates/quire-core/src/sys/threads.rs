//! Threads of the library's own.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::sys::process::Blocked;
use crate::{Error, Result};

/// Start a thread to which no signal is sent but those of its own faults.
///
/// One that is blocked in the threads of the program, to be waited for with `sigwait`, would otherwise be delivered to
/// ours, and end the process.
pub fn start(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let _inherited = Blocked::all_but_faults();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map(drop).map_err(|error| Error::os("pthread_create", error.raw_os_error().unwrap_or(0)))
}

/// Keep a file open until the process ends, whatever its threads close: a thread with a table of descriptors of its own
/// has this one and no other. Where the kernel has no `close_range` (before Linux 5.9) nothing is kept.
///
/// The descriptor must be open until the thread has started, which this waits for.
pub fn keep_open(name: &'static str, file: BorrowedFd<'_>) -> Result<()> {
    /// Of linux/close_range.h.
    const CLOSE_RANGE_UNSHARE: u32 = 2;
    let number = file.as_raw_fd() as u32;
    let (told, tell) = std::sync::mpsc::sync_channel(1);
    start(name, move || {
        let close = |first: u32, last: u32, flags: u32| {
            // SAFETY: the first call gives this thread a table of its own; what is closed in it stays open in the others'.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) == 0 }
        };
        let alone = close(number + 1, u32::MAX, CLOSE_RANGE_UNSHARE);
        // Files that others close are not to be kept open by this table.
        let kept = alone && (number == 0 || close(0, number - 1, 0));
        let _nobody_listens = told.send(());
        if kept {
            loop {
                std::thread::park();
            }
        }
    })?;
    let _ended = tell.recv();
    Ok(())
}
