//! Long tables of zeros that take memory only where something is written to them.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed};
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, AtomicU32};

use crate::{Error, Result};

/// Types that are valid as all zeros.
///
/// # Safety
/// All-zero bytes are a value of the type, and it has a size.
pub unsafe trait Zeros {}
// SAFETY: an atomic integer has the layout of the integer.
unsafe impl Zeros for AtomicU8 {}
// SAFETY: as above.
unsafe impl Zeros for AtomicU32 {}

/// A table of fixed length. The allocator takes long ones from the kernel, which gives pages when they are written.
pub struct Zeroed<T>(Box<[T]>);

impl<T: Zeros> Zeroed<T> {
    /// # Errors
    /// There is no memory for it.
    pub fn new(count: usize) -> Result<Self> {
        let none = || Error::os("malloc", libc::ENOMEM).hinted("a region needs nine bytes for each of its windows");
        let layout = Layout::array::<T>(count).map_err(|_| none())?;
        if layout.size() == 0 {
            return Ok(Self(Box::default()));
        }
        // SAFETY: the layout has a size.
        let first = unsafe { alloc_zeroed(layout) }.cast::<T>();
        if first.is_null() {
            return Err(none());
        }
        // SAFETY: the allocation is that of a boxed slice of `count` items, each of which is valid as zeros.
        Ok(Self(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(first, count)) }))
    }
}

impl<T> Deref for Zeroed<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}
