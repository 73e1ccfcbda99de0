//! Bytes in memory, of our own or of somebody who may go on changing them.
#![allow(unsafe_code)]

use std::any::Any;

use super::{Filled, ReadAt};

/// Bytes that something keeps in place.
pub struct Memory {
    address: usize,
    length: usize,
    /// Keeps the bytes where they are.
    _owner: Box<dyn Any + Send + Sync>,
}

impl Memory {
    /// # Safety
    /// `length` bytes at `address` stay readable as long as `owner` lives. They may change at any time.
    #[must_use]
    pub unsafe fn borrowed(address: usize, length: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        Self { address, length, _owner: owner }
    }
}

impl From<Box<[u8]>> for Memory {
    fn from(bytes: Box<[u8]>) -> Self {
        Self { address: bytes.as_ptr() as usize, length: bytes.len(), _owner: Box::new(bytes) }
    }
}

impl ReadAt for Memory {
    fn size(&self) -> u64 {
        self.length as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Filled {
        assert!(offset + into.len() as u64 <= self.length as u64, "a read outside the memory");
        // SAFETY: the range was checked just now, the owner keeps it readable, and `into` is a reference to memory of
        // its own. No reference to the source is made, since others may write to it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (self.address as *const u8).add(offset as usize),
                into.as_mut_ptr(),
                into.len(),
            );
        }
        Ok(())
    }

    fn address_of(&self, offset: u64, len: usize) -> Option<usize> {
        (offset + len as u64 <= self.length as u64).then(|| self.address + offset as usize)
    }

    fn is_signal_safe(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_bytes_are_read() {
        let memory = Memory::from(b"hello world".to_vec().into_boxed_slice());
        let mut got = [0; 5];
        memory.read_at(6, &mut got).unwrap();
        assert_eq!((&got, memory.size()), (b"world", 11));
    }
}
