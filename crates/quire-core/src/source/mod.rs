//! Where the bytes of a region come from.
//!
//! Two layers. `ReadAt` is raw bytes with random access: a part of a file, memory, something remote. `Source` is what a
//! region shows: raw bytes as they are, or what a codec makes of them. Neither knows who asks, nor where the bytes go.

mod checkpoint;
mod deflate;
mod file;
mod frames;
mod inflate;
mod kept;
mod memory;
mod notes;
pub mod remote;
mod snapshot;
mod stream;
mod zstd;

pub use checkpoint::Cache;
pub use deflate::{Deflate, Gzip};
pub use file::File;
pub(crate) use kept::lock_kept;
pub use kept::trim;
pub use memory::Memory;
pub use notes::Notes;
pub use snapshot::SnapshotBytes;
pub use zstd::Zstd;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Why bytes could not be had. Made without allocating unless there is a detail, so that a signal handler can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What went wrong, in a few words: "short read", "CRC mismatch".
    pub cause: &'static str,
    /// Where in the source, in bytes.
    pub offset: u64,
    /// The system call's error, or 0.
    pub errno: i32,
    /// What a remote side said, in one line.
    pub detail: Option<Arc<str>>,
}

impl Failure {
    #[must_use]
    pub const fn new(cause: &'static str, offset: u64) -> Self {
        Self { cause, offset, errno: 0, detail: None }
    }

    #[must_use]
    pub const fn os(cause: &'static str, offset: u64, errno: i32) -> Self {
        Self { cause, offset, errno, detail: None }
    }

    #[must_use]
    pub fn detailed(cause: &'static str, offset: u64, detail: &str) -> Self {
        Self { cause, offset, errno: 0, detail: Some(Arc::from(detail)) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.cause, self.offset)?;
        if self.errno != 0 {
            write!(f, ": {}", std::io::Error::from_raw_os_error(self.errno))?;
        }
        if let Some(detail) = &self.detail {
            write!(f, ": {detail}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

pub type Filled = std::result::Result<(), Failure>;

/// Raw bytes with random access. Called from any thread, several at once, never with the GIL held.
pub trait ReadAt: Send + Sync {
    /// Length in bytes; never changes.
    fn size(&self) -> u64;

    /// Fill all of `into` with the bytes from `offset` on. The range lies within the size.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Filled;

    /// Where a range lies in this process's memory, if it does and stays there as long as the object lives.
    fn address_of(&self, _offset: u64, _len: usize) -> Option<usize> {
        None
    }

    /// Whether `read_at` may be called in a signal handler: it allocates nothing and takes no lock.
    fn is_signal_safe(&self) -> bool {
        false
    }

    /// How many reads in flight at once pay off.
    fn parallel_reads(&self) -> usize {
        1
    }

    /// Called in a forked child before anything else runs there, with no read under way. Only notes may be taken:
    /// connections and threads are the parent's.
    fn enter_child(&self) {}

    /// What names these very bytes to every process, as long as they do not change; None where nothing does. What was
    /// learned of them is kept under it.
    fn identity(&self) -> Option<[u8; 32]> {
        None
    }
}

/// Refuse a range that does not lie within `size` bytes.
fn check_range(start: u64, length: u64, size: u64) -> crate::Result<()> {
    if start.checked_add(length).is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(crate::Error::Invalid(format!("bytes {start} to {start}+{length} are outside {size} bytes")))
}

/// A range of other raw bytes.
pub struct Slice<R> {
    inner: R,
    start: u64,
    length: u64,
}

impl<R: ReadAt> Slice<R> {
    /// # Errors
    /// The range does not lie within `inner`.
    pub fn new(inner: R, start: u64, length: u64) -> crate::Result<Self> {
        check_range(start, length, inner.size())?;
        Ok(Self { inner, start, length })
    }
}

impl<R: ReadAt> ReadAt for Slice<R> {
    fn size(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Filled {
        self.inner.read_at(self.start + offset, into)
    }

    fn address_of(&self, offset: u64, len: usize) -> Option<usize> {
        self.inner.address_of(self.start + offset, len)
    }

    fn is_signal_safe(&self) -> bool {
        self.inner.is_signal_safe()
    }

    fn parallel_reads(&self) -> usize {
        self.inner.parallel_reads()
    }

    fn enter_child(&self) {
        self.inner.enter_child();
    }

    fn identity(&self) -> Option<[u8; 32]> {
        let inner = self.inner.identity()?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"slice").update(&inner);
        hasher.update(&self.start.to_le_bytes()).update(&self.length.to_le_bytes());
        Some(*hasher.finalize().as_bytes())
    }
}

/// What a region shows. Called from any thread, several at once, never with the GIL held.
pub trait Source: Send + Sync {
    /// Length in bytes; never changes.
    fn size(&self) -> u64;

    /// Fill all of `into` with the bytes from `offset` on. The range lies within the size. Whatever is written to `into`
    /// before a failure is not used.
    fn fill(&self, offset: u64, into: &mut [u8]) -> Filled;

    /// The range that is produced together with the byte at `offset`, in bytes, half-open, within the size: a frame of a
    /// compressed file. Empty ranges mean that any range is as good as any other.
    fn unit(&self, offset: u64) -> Range<u64> {
        offset..offset
    }

    /// As `ReadAt::address_of`.
    fn address_of(&self, _offset: u64, _len: usize) -> Option<usize> {
        None
    }

    /// Whether `fill` may be called in a signal handler: it allocates nothing and takes no lock.
    fn is_signal_safe(&self) -> bool {
        false
    }

    /// How many fills in flight at once pay off.
    fn parallel_fills(&self) -> usize {
        1
    }

    /// Where to keep, for later processes, which pages were touched; None where filling them touch by touch costs no more.
    fn notes(&self) -> Option<Notes> {
        None
    }

    /// Nothing will be asked for a while: give up what is held only to go on faster.
    fn rest(&self) {}

    /// As `ReadAt::enter_child`.
    fn enter_child(&self) {}
}

/// A range of what another source shows.
pub struct Part {
    inner: Arc<dyn Source>,
    start: u64,
    length: u64,
}

impl Part {
    /// # Errors
    /// The range does not lie within `inner`.
    pub fn new(inner: Arc<dyn Source>, start: u64, length: u64) -> crate::Result<Self> {
        check_range(start, length, inner.size())?;
        Ok(Self { inner, start, length })
    }
}

impl Source for Part {
    fn size(&self) -> u64 {
        self.length
    }

    fn fill(&self, offset: u64, into: &mut [u8]) -> Filled {
        self.inner.fill(self.start + offset, into)
    }

    fn unit(&self, offset: u64) -> Range<u64> {
        let unit = self.inner.unit(self.start + offset);
        let within = |at: u64| at.saturating_sub(self.start).min(self.length);
        within(unit.start)..within(unit.end)
    }

    fn address_of(&self, offset: u64, len: usize) -> Option<usize> {
        self.inner.address_of(self.start + offset, len)
    }

    fn is_signal_safe(&self) -> bool {
        self.inner.is_signal_safe()
    }

    fn parallel_fills(&self) -> usize {
        self.inner.parallel_fills()
    }

    fn rest(&self) {
        self.inner.rest();
    }

    fn enter_child(&self) {
        self.inner.enter_child();
    }
}

/// Raw bytes shown as they are.
pub struct Plain<R>(pub R);

impl<R: ReadAt> Source for Plain<R> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn fill(&self, offset: u64, into: &mut [u8]) -> Filled {
        self.0.read_at(offset, into)
    }

    fn address_of(&self, offset: u64, len: usize) -> Option<usize> {
        self.0.address_of(offset, len)
    }

    fn is_signal_safe(&self) -> bool {
        self.0.is_signal_safe()
    }

    fn parallel_fills(&self) -> usize {
        self.0.parallel_reads()
    }

    fn enter_child(&self) {
        self.0.enter_child();
    }
}

impl<R: ReadAt + ?Sized> ReadAt for Arc<R> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Filled {
        (**self).read_at(offset, into)
    }

    fn address_of(&self, offset: u64, len: usize) -> Option<usize> {
        (**self).address_of(offset, len)
    }

    fn is_signal_safe(&self) -> bool {
        (**self).is_signal_safe()
    }

    fn parallel_reads(&self) -> usize {
        (**self).parallel_reads()
    }

    fn enter_child(&self) {
        (**self).enter_child();
    }

    fn identity(&self) -> Option<[u8; 32]> {
        (**self).identity()
    }
}
