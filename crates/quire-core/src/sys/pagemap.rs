//! /proc/self/pagemap: which pages were written, and which are private copies.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::pages::{PAGE, PageRange, push_merged};
use crate::sys::memfd;
use crate::{Error, Result};
use std::os::fd::AsFd;

const WRITTEN: u64 = 1 << 1;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const PFN_ZERO: u64 = 1 << 5;

const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;

/// `_IOWR('f', 16, struct pm_scan_arg)`
const IOC_SCAN: u64 = 3 << 30 | (size_of::<ScanArg>() as u64) << 16 | (b'f' as u64) << 8 | 16;

#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// What to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// Pages without the write-protect mark, unpopulated ones included: for ranges that are armed throughout.
    Written,
    /// Populated pages without the mark that are not the zero page: for sparse ranges of zero memory.
    WrittenPopulated,
}

impl Query {
    /// (inverted, mask, any of, returned)
    const fn masks(self) -> (u64, u64, u64, u64) {
        match self {
            Self::Written => (0, WRITTEN, 0, WRITTEN),
            Self::WrittenPopulated => (PFN_ZERO, WRITTEN | PFN_ZERO, PRESENT | SWAPPED, WRITTEN),
        }
    }
}

/// This process's page map. Belongs to the process that opened it.
#[derive(Debug)]
pub struct Pagemap(OwnedFd);

impl Pagemap {
    pub fn open() -> Result<Self> {
        // SAFETY: the path is a NUL-terminated literal.
        let fd = unsafe { libc::open(c"/proc/self/pagemap".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last_os("open(/proc/self/pagemap)"));
        }
        // SAFETY: the descriptor is new and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Append the pages that match, numbered from `base`, and, if `arm`, protect them again in the same step.
    pub fn scan(&self, base: usize, range: PageRange, query: Query, arm: bool, out: &mut Vec<PageRange>) -> Result<()> {
        let mut regions = vec![Region::default(); 4096];
        let (category_inverted, category_mask, category_anyof_mask, return_mask) = query.masks();
        let end = base as u64 + range.end() * PAGE;
        let mut start = base as u64 + range.start * PAGE;
        while start < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: if arm { WP_MATCHING | CHECK_WPASYNC } else { 0 },
                start,
                end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                max_pages: 0,
                category_inverted,
                category_mask,
                category_anyof_mask,
                return_mask,
            };
            // SAFETY: the argument has the layout and size the number encodes; `vec` describes `regions`.
            let n = unsafe { libc::ioctl(self.0.as_raw_fd(), IOC_SCAN as _, &raw mut arg) };
            if n < 0 {
                let error = Error::last_os("ioctl(PAGEMAP_SCAN)");
                if error.errno() == libc::EINTR {
                    continue;
                }
                return Err(error);
            }
            for region in &regions[..n as usize] {
                let first = (region.start - base as u64) / PAGE;
                push_merged(out, PageRange::between(first, (region.end - base as u64) / PAGE));
            }
            if arg.walk_end <= start {
                return Err(Error::Unsupported("PAGEMAP_SCAN makes no progress".to_owned()));
            }
            start = arg.walk_end;
        }
        Ok(())
    }

    /// Whether this process has any page of a range in its page table.
    pub fn any_present(&self, base: usize, range: PageRange) -> Result<bool> {
        const IS_PRESENT: u8 = 1 << 7;
        let mut words = vec![0u8; (range.len * 8) as usize];
        if !memfd::read_exact(self.0.as_fd(), &mut words, (base as u64 / PAGE + range.start) * 8)? {
            return Err(Error::Unsupported("/proc/self/pagemap ends early".to_owned()));
        }
        Ok(words.chunks_exact(8).any(|word| word[7] & IS_PRESENT != 0))
    }

    /// Append the private copies of a range, in memory or swapped out, as the older interface tells them.
    ///
    /// Zero pages of anonymous memory are among them. So are, for users who are not shown swap entries, unpopulated
    /// pages that are armed: the two look alike to them.
    pub fn private_pages(&self, base: usize, range: PageRange, out: &mut Vec<PageRange>) -> Result<()> {
        const CHUNK: u64 = 1 << 15;
        let mut bytes = vec![0u8; (CHUNK * 8) as usize];
        let mut page = range.start;
        while page < range.end() {
            let n = CHUNK.min(range.end() - page);
            let buf = &mut bytes[..(n * 8) as usize];
            if !memfd::read_exact(self.0.as_fd(), buf, (base as u64 / PAGE + page) * 8)? {
                return Err(Error::Unsupported("/proc/self/pagemap ends early".to_owned()));
            }
            for (i, word) in buf.chunks_exact(8).enumerate() {
                let word = u64::from_le_bytes(word.try_into().expect("chunks of eight"));
                if is_private_copy(word) {
                    push_merged(out, PageRange::new(page + i as u64, 1));
                }
            }
            page += n;
        }
        Ok(())
    }
}

/// Decode one word of the page map.
fn is_private_copy(word: u64) -> bool {
    const IS_PRESENT: u64 = 1 << 63;
    const IS_SWAPPED: u64 = 1 << 62;
    const IS_FILE: u64 = 1 << 61;
    const SWAP_TYPE: u64 = 0x1f;
    /// The highest swap type is no swap device but a marker left by arming an unpopulated page.
    const MARKER: u64 = 0x1f;
    if word & IS_PRESENT != 0 {
        return word & IS_FILE == 0;
    }
    word & IS_SWAPPED != 0 && word & SWAP_TYPE != MARKER
}
