//! Waiting for a number in memory to change, in a signal handler too.
#![allow(unsafe_code)]

use std::sync::atomic::AtomicU32;

/// Wait until `word` is no longer `seen`, or somebody wakes us, or a tenth of a second has passed. Spurious returns are
/// possible: look again. Allocates nothing and takes no lock.
pub fn wait(word: &AtomicU32, seen: u32) {
    let limit = libc::timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    // SAFETY: the word is valid for the call, and the kernel only reads it.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            seen,
            &raw const limit,
        )
    };
}

/// The same without the tenth of a second.
pub fn wait_long(word: &AtomicU32, seen: u32) {
    // SAFETY: the word is valid for the call, and the kernel only reads it.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            seen,
            std::ptr::null::<libc::timespec>(),
        )
    };
}

/// Wake everybody who waits on `word`.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: the word is only an address to the kernel here.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX) };
}
