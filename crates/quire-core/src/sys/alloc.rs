//! Memory for Rust: large pieces from the kernel, and back to it at once.
//!
//! glibc learns from large pieces that are freed to keep them, in the arena of each thread that once used one. Threads that
//! decode use many for a moment and then none for long.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;

/// From so many bytes on, a mapping costs little compared to what is done with it.
const LARGE: usize = 32 << 10;
/// What `mmap` aligns to everywhere.
const ALIGN: usize = 4096;

/// The allocator of the extension.
#[derive(Debug)]
pub struct Large;

const fn is_large(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= ALIGN
}

fn map(len: usize) -> *mut u8 {
    // SAFETY: a new private mapping touches nothing that exists.
    let at = unsafe {
        libc::mmap(null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    if at == libc::MAP_FAILED { null_mut() } else { at.cast() }
}

// SAFETY: small pieces are the system allocator's. Large ones are mappings of their own, page-aligned, of the layout's size
// rounded up to pages; which kind a piece is follows from its layout alone, which callers pass unchanged.
unsafe impl GlobalAlloc for Large {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return map(layout.size());
        }
        // SAFETY: the caller's promises are those of the trait.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return map(layout.size()); // zeroed by the kernel
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        if is_large(layout) {
            // SAFETY: a mapping of this size made by `map`, which the caller gives up.
            unsafe { libc::munmap(piece.cast(), layout.size()) };
            return;
        }
        // SAFETY: as above.
        unsafe { System.dealloc(piece, layout) }
    }

    unsafe fn realloc(&self, piece: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size, rounded up to the alignment, does not overflow.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (is_large(layout), is_large(new)) {
            (true, true) => {
                // SAFETY: a mapping of this size made by `map`, which the caller gives up for what is returned.
                let at = unsafe { libc::mremap(piece.cast(), layout.size(), size, libc::MREMAP_MAYMOVE) };
                if at == libc::MAP_FAILED { null_mut() } else { at.cast() }
            }
            // SAFETY: as above.
            (false, false) => unsafe { System.realloc(piece, layout, size) },
            _ => {
                // SAFETY: as for the trait's own way of doing it: a new piece, a copy of what fits, the old one freed.
                unsafe {
                    let moved = self.alloc(new);
                    if !moved.is_null() {
                        std::ptr::copy_nonoverlapping(piece, moved, layout.size().min(size));
                        self.dealloc(piece, layout);
                    }
                    moved
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_their_content_over_the_border_and_back() {
        let sizes = [100, LARGE - 1, LARGE, 3 * LARGE + 7, LARGE, LARGE - 5, 10];
        let mut layout = Layout::from_size_align(sizes[0], 16).unwrap();
        // SAFETY: the layout is not empty; the piece is used within its size, and freed once.
        unsafe {
            let mut piece = Large.alloc(layout);
            std::slice::from_raw_parts_mut(piece, 10).copy_from_slice(b"0123456789");
            for size in sizes {
                piece = Large.realloc(piece, layout, size);
                assert!(!piece.is_null() && piece.addr() % 16 == 0);
                assert_eq!(std::slice::from_raw_parts(piece, 10), b"0123456789");
                layout = Layout::from_size_align(size, 16).unwrap();
                piece.add(size - 1).write(b'9');
            }
            Large.dealloc(piece, layout);
            let layout = Layout::from_size_align(2 * LARGE, 64).unwrap();
            let zeroed = Large.alloc_zeroed(layout);
            assert!(std::slice::from_raw_parts(zeroed, 2 * LARGE).iter().all(|byte| *byte == 0));
            Large.dealloc(zeroed, layout);
        }
    }
}
