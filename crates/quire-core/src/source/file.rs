//! A range of a file.

use std::os::fd::{AsFd, OwnedFd};

use super::{Failure, Filled, ReadAt};
use crate::sys::file::{Stamp, read_at, stamp};
use crate::{Error, Result};

/// Bytes of an open file that must not change while it is a source; a change is noticed and fails the read.
#[derive(Debug)]
pub struct File {
    fd: OwnedFd,
    offset: u64,
    length: u64,
    opened: Stamp,
}

impl File {
    /// `length` bytes from `offset` on; None means up to the end.
    ///
    /// # Errors
    /// The range does not lie within the file, or the kernel refused.
    pub fn new(fd: OwnedFd, offset: u64, length: Option<u64>) -> Result<Self> {
        let opened = stamp(fd.as_fd()).map_err(|errno| Error::os("fstat", errno))?;
        let length = length.unwrap_or(opened.size.saturating_sub(offset));
        if offset.checked_add(length).is_none_or(|end| end > opened.size) {
            return Err(Error::Invalid(format!(
                "bytes {offset} to {offset}+{length} are outside a file of {} bytes",
                opened.size
            )));
        }
        Ok(Self { fd, offset, length, opened })
    }
}

impl ReadAt for File {
    fn size(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Filled {
        let n = read_at(self.fd.as_fd(), self.offset + offset, into)
            .map_err(|errno| Failure::os("pread failed", offset, errno))?;
        // After the read: a change that came before it shows in what is looked at now.
        let now = stamp(self.fd.as_fd()).map_err(|errno| Failure::os("fstat failed", offset, errno))?;
        if now != self.opened {
            return Err(Failure::new("the file changed after it was opened", offset));
        }
        if n < into.len() { Err(Failure::new("short read", offset + n as u64)) } else { Ok(()) }
    }

    fn is_signal_safe(&self) -> bool {
        true
    }

    fn identity(&self) -> Option<[u8; 32]> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"file");
        for number in [self.opened.dev, self.opened.ino, self.opened.size, self.offset, self.length] {
            hasher.update(&number.to_le_bytes());
        }
        hasher.update(&self.opened.mtime_ns.to_le_bytes());
        Some(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memfd;

    fn file(bytes: &[u8]) -> OwnedFd {
        let fd = memfd::create(c"test").unwrap();
        memfd::write_pieces(fd.as_fd(), 0, &[memfd::Piece::of(bytes)]).unwrap();
        fd
    }

    #[test]
    fn a_range_is_read_and_its_ends_are_kept() {
        let source = File::new(file(b"0123456789"), 2, Some(5)).unwrap();
        let mut got = [0; 3];
        source.read_at(2, &mut got).unwrap();
        assert_eq!((&got, source.size()), (b"456", 5));
        assert!(File::new(file(b"0123"), 2, Some(3)).is_err());
        assert!(File::new(file(b"0123"), u64::MAX, Some(2)).is_err());
    }

    #[test]
    fn a_file_that_shrank_or_grew_fails() {
        for size in [4, 20] {
            let fd = file(b"0123456789");
            let again = fd.try_clone().unwrap();
            let source = File::new(fd, 0, None).unwrap();
            memfd::truncate(again.as_fd(), size).unwrap();
            assert_eq!(source.read_at(0, &mut [0; 8]).unwrap_err().cause, "the file changed after it was opened");
        }
    }
}
