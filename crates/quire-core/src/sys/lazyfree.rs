//! MADV_FREE: private pages that the kernel may take when memory is short, and how to find out whether it did.
//!
//! A page that was released keeps its content until the kernel needs the memory; then it is gone, and reads zero. A
//! store to it before that takes it back: it is dirty, and the kernel takes dirty pages never. `hold` is a store that
//! changes nothing, done as one atomic step with a load. So a word that was not zero tells the truth: if it still is
//! not, the page was there and is held from the store on; if it is zero, the page was taken before it.
//!
//! A load cannot tell as much, for the page could go right after it, or have gone while another processor's
//! translation still shows it.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use crate::Result;
use crate::pages::PAGE;
use crate::sys::area::Area;

const WORDS: usize = PAGE as usize / 8;

/// Zero, but unknown to the compiler, which may turn a read-modify-write with a known zero into a mere load.
static NOTHING: u64 = 0;

/// Let the kernel take the pages of a range from now on; until it does, they keep their content.
pub fn release(area: &Area, offset: usize, len: usize) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    area.free_lazily(offset, len).map_err(|error| match error.errno() {
        libc::EINVAL => error.hinted("memory that is locked, as mlockall does, cannot be purged"),
        _ => error,
    })
}

/// Take the page of a word back from the kernel, and return the word: zero if the page was taken before.
pub fn hold(area: &Area, word_offset: usize) -> u64 {
    assert!(word_offset % 8 == 0, "a word that is not aligned");
    let word = area.at(word_offset, 8).cast::<u64>();
    // SAFETY: a static is valid for reads; volatile, so that its value stays unknown.
    let nothing = unsafe { (&raw const NOTHING).read_volatile() };
    // SAFETY: an aligned word of an area that is ours and mapped writable. Callers serialise, so nobody stores to it
    // meanwhile by other means than atomically.
    unsafe { AtomicU64::from_ptr(word) }.fetch_or(nothing, Ordering::SeqCst)
}

/// The number of the first word of a page that is not zero; None if the page is all zero.
#[must_use]
pub fn first_word(area: &Area, page_offset: usize) -> Option<u16> {
    let words = area.at(page_offset, PAGE as usize).cast::<u64>().cast_const();
    // SAFETY: 512 aligned words of a readable page in this area, read as volatile because others may store to it.
    (0..WORDS).find(|&i| unsafe { words.add(i).read_volatile() } != 0).map(|i| i as u16)
}

/// Which pages of a range are in memory, one bool each. Pages that were swapped out count as absent; the kernel never
/// swaps what was released.
pub fn resident(area: &Area, offset: usize, len: usize) -> Result<Vec<bool>> {
    let mut bytes = vec![0u8; len.div_ceil(PAGE as usize)];
    area.residency(offset, len, &mut bytes)?;
    Ok(bytes.into_iter().map(|byte| byte & 1 == 1).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::area::Access;

    const BYTES: usize = PAGE as usize;

    fn area(pages: usize) -> Area {
        let area = Area::reserve(pages * BYTES).expect("address space");
        area.map_zero(0, area.len(), Access::ReadWrite).expect("memory");
        area
    }

    #[test]
    fn a_page_that_went_reads_zero_and_one_that_stayed_is_held() {
        let area = area(2);
        area.store(8, &[7]);
        area.store(BYTES + 16, &[9]);
        release(&area, 0, area.len()).expect("MADV_FREE");
        // What the kernel does when memory is short, done by hand.
        area.drop_private(0, BYTES).expect("MADV_DONTNEED");
        assert_eq!(hold(&area, 8), 0);
        assert_eq!(hold(&area, BYTES + 16), 9);
    }

    #[test]
    fn the_first_word_is_found() {
        let area = area(1);
        assert_eq!(first_word(&area, 0), None);
        area.store(BYTES - 1, &[1]);
        assert_eq!(first_word(&area, 0), Some(511));
        area.store(17, &[1]);
        assert_eq!(first_word(&area, 0), Some(2));
    }

    #[test]
    fn residency_is_told_page_by_page() {
        let area = area(3);
        area.store(BYTES, &[1]);
        assert_eq!(resident(&area, 0, area.len()).expect("mincore"), [false, true, false]);
    }

    #[test]
    fn holding_is_a_store() {
        // A load would show the shared zero page and leave no page of our own; a store that writes zeros makes one.
        // The two look alike to mincore, so the page map is asked.
        use crate::pages::PageRange;
        use crate::sys::pagemap::{Pagemap, Query};
        let area = area(1);
        assert_eq!(hold(&area, 0), 0);
        let mut found = Vec::new();
        let all = PageRange::new(0, 1);
        match Pagemap::open().and_then(|map| map.scan(area.addr(), all, Query::WrittenPopulated, false, &mut found)) {
            Ok(()) => assert_eq!(found, [all]),
            Err(error) => eprintln!("skipped: {error}"),
        }
    }
}
