//! Who we are to the kernel.
#![allow(unsafe_code)]

/// The effective user id, which owns the files that we make.
#[must_use]
pub fn effective_id() -> u32 {
    // SAFETY: the call takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}
