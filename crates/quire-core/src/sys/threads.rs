//! Threads of the library's own.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::AssertUnwindSafe;

use crate::sys::process::Blocked;
use crate::{Error, Result};

type Work = Box<dyn FnOnce() + Send>;

/// Start a thread to which no signal is sent but those of its own faults.
///
/// One that is blocked in the threads of the program, to be waited for with `sigwait`, would otherwise be delivered to
/// ours, and end the process.
///
/// Not a thread of the standard library's: in a Rust program these note themselves behind a lock, which another thread may
/// have had when this process was forked.
pub fn start(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let _inherited = Blocked::all_but_faults();
    let work: Work = Box::new(move || {
        set_name(name);
        work();
    });
    let passed = Box::into_raw(Box::new(work));
    let mut thread = MaybeUninit::uninit();
    // SAFETY: the attributes are initialized before they are used, and destroyed after; the thread gets what was passed,
    // and nobody else has it.
    let errno = unsafe {
        let mut attributes = MaybeUninit::uninit();
        libc::pthread_attr_init(attributes.as_mut_ptr());
        libc::pthread_attr_setdetachstate(attributes.as_mut_ptr(), libc::PTHREAD_CREATE_DETACHED);
        // Refused where thread-local variables need more: then it is what the system gives.
        libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK_BYTES);
        let errno = libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), run, passed.cast());
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        errno
    };
    if errno != 0 {
        // SAFETY: no thread was made, so it is ours again.
        drop(unsafe { Box::from_raw(passed) });
        return Err(Error::os("pthread_create", errno));
    }
    Ok(())
}

/// As large as those of the standard library's threads.
const STACK_BYTES: usize = 2 << 20;

extern "C" fn run(passed: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: made by `start` for this thread alone.
    let work = unsafe { Box::from_raw(passed.cast::<Work>()) };
    // A panic was told by the hook, and ends this thread only.
    let _panicked = std::panic::catch_unwind(AssertUnwindSafe(*work));
    std::ptr::null_mut()
}

/// Name this thread, as far as the kernel takes it.
fn set_name(name: &str) {
    let mut text = [0u8; 16];
    let len = name.len().min(text.len() - 1);
    text[..len].copy_from_slice(&name.as_bytes()[..len]);
    // SAFETY: a string of the kernel's length, ended by zero.
    unsafe { libc::prctl(libc::PR_SET_NAME, text.as_ptr()) };
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_thread_has_its_name_and_may_panic() {
        let (tell, told) = mpsc::channel();
        let name = move || {
            tell.send(std::fs::read_to_string("/proc/thread-self/comm")).expect("listened to");
            std::panic::resume_unwind(Box::new("quietly"));
        };
        start("quire-with-a-long-name", name).expect("started");
        assert_eq!(told.recv().expect("told").expect("readable"), "quire-with-a-lo\n");
        assert!(told.recv().is_err(), "what the thread had is dropped");
    }
}
