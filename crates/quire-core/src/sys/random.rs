//! Random identities from `getrandom`.
#![allow(unsafe_code)]

use crate::{Error, Result};

/// 16 random bytes, never all zero.
pub fn id128() -> Result<[u8; 16]> {
    loop {
        let mut id = [0u8; 16];
        // SAFETY: the pointer and length describe `id`, which outlives the call.
        let n = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
        if n == 16 && id != [0; 16] {
            return Ok(id);
        }
        if n < 0 && std::io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return Err(Error::last_os("getrandom"));
        }
    }
}
