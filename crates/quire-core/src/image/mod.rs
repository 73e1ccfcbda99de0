//! Program files as tables: what `object` finds in them, read by parts and bounded.
//!
//! Nothing is mapped: a file that shrinks under a mapping would stop its reader. A table is read when it is asked for,
//! and what one question may read and return is bounded by the size of the file.

pub mod elf;
pub mod macho;
pub mod names;
pub mod pe;

use std::cell::RefCell;
use std::sync::Arc;

use object::read::{ReadCache, ReadCacheOps};

use crate::source::{Failure, Source};
use crate::{Error, Result, region};

/// How often one question may read what amounts to the whole file, and how much more. Tables of a file do not overlap;
/// in one that was made to waste memory they do.
const READS_OF_THE_FILE: u64 = 4;
const READS_ALWAYS: u64 = 1 << 20;

/// A range of a source that holds a program.
#[derive(Clone)]
pub struct Window {
    source: Arc<dyn Source>,
    start: u64,
    size: u64,
}

impl Window {
    /// # Errors
    /// Invalid: the range is not within the source.
    pub fn new(source: Arc<dyn Source>, start: u64, size: u64) -> Result<Self> {
        if start.checked_add(size).is_none_or(|end| end > source.size()) {
            return Err(Error::Invalid(format!(
                "bytes {start} to {start}+{size} are outside a source of {} bytes",
                source.size()
            )));
        }
        Ok(Self { source, start, size })
    }

    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Answer one question. What was read for it is forgotten afterwards.
    ///
    /// # Errors
    /// Page, if the source failed; otherwise what the question raises.
    pub fn ask<T>(&self, question: impl FnOnce(&ReadCache<Reader<'_>>) -> Result<T>) -> Result<T> {
        let failure = RefCell::new(None);
        let allowed = self.size.saturating_mul(READS_OF_THE_FILE).saturating_add(READS_ALWAYS);
        let cache = ReadCache::new(Reader { window: self, at: 0, allowed, failure: &failure });
        let answer = region::reading(|| question(&cache))?;
        match failure.take() {
            Some(failure) => Err(Error::Page(failure)),
            None => answer,
        }
    }
}

/// Reads a window at a position of its own.
pub struct Reader<'w> {
    window: &'w Window,
    at: u64,
    allowed: u64,
    /// `object` does not say why a read failed.
    failure: &'w RefCell<Option<Failure>>,
}

impl ReadCacheOps for Reader<'_> {
    fn len(&mut self) -> std::result::Result<u64, ()> {
        Ok(self.window.size)
    }

    fn seek(&mut self, pos: u64) -> std::result::Result<u64, ()> {
        self.at = pos;
        Ok(pos)
    }

    fn read(&mut self, buf: &mut [u8]) -> std::result::Result<usize, ()> {
        let left = self.window.size.saturating_sub(self.at);
        let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.read_exact(&mut buf[..len])?;
        Ok(len)
    }

    fn read_exact(&mut self, buf: &mut [u8]) -> std::result::Result<(), ()> {
        let len = buf.len() as u64;
        let end = self.at.checked_add(len).filter(|end| *end <= self.window.size).ok_or(())?;
        self.allowed = self.allowed.checked_sub(len).ok_or(())?;
        self.window.source.fill(self.window.start + self.at, buf).map_err(|failure| {
            self.failure.replace(Some(failure));
        })?;
        self.at = end;
        Ok(())
    }
}

/// What a format has that `object`, or this page, does not accept: which field of the file, and why.
fn malformed(field: impl std::fmt::Display, why: impl std::fmt::Display) -> Error {
    Error::Malformed(format!("{field}: {why}"))
}

/// Copies names, as long as they are no more than a few times what the file holds: in honest files, names are shared by
/// two or three; in one that was made to waste memory all have the same long one.
struct Names {
    left: u64,
}

impl Names {
    fn of<'d>(data: impl object::ReadRef<'d>) -> Self {
        Self { left: data.len().unwrap_or(0).saturating_mul(READS_OF_THE_FILE).saturating_add(READS_ALWAYS) }
    }

    fn take(&mut self, name: &[u8], field: &str) -> Result<Vec<u8>> {
        // What keeps a name costs memory too, if it is empty.
        let cost = name.len() as u64 + 1;
        self.left =
            self.left.checked_sub(cost).ok_or_else(|| malformed(field, "more names than the file has room for"))?;
        Ok(name.to_vec())
    }
}
