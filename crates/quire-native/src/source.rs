//! `_native.Source`: an opaque handle on something that fills memory.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};
use quire_core::source::{
    Cache, Deflate, Failure, File, Gzip, Memory, Part, Plain, ReadAt, Slice, SnapshotBytes, Source as CoreSource, Zstd,
};

use crate::errors::{PageError, Raised, Result};
use crate::snapshot::Snapshot;

/// What a region shows and, for sources whose bytes are shown as they are, the raw bytes that a codec can sit on.
#[pyclass(frozen, module = "quire._native")]
pub struct Source {
    pub inner: Arc<dyn CoreSource>,
    pub raw: Option<Arc<dyn ReadAt>>,
}

fn page_error(failure: &Failure) -> Raised {
    PageError::new_err(failure.to_string()).into()
}

fn invalid(text: impl Into<String>) -> Raised {
    quire_core::Error::Invalid(text.into()).into()
}

/// Take a first pass to its end, with an ear for Ctrl-C.
fn pass(py: Python<'_>, step: impl Fn() -> std::result::Result<bool, Failure> + Send + Sync) -> Result<()> {
    while !py.detach(&step).map_err(|failure| page_error(&failure))? {
        py.check_signals()?;
    }
    Ok(())
}

impl Source {
    /// Raw bytes, shown as they are.
    pub fn plain(raw: impl ReadAt + 'static) -> Self {
        let raw: Arc<dyn ReadAt> = Arc::new(raw);
        Self { inner: Arc::new(Plain(Arc::clone(&raw))), raw: Some(raw) }
    }

    fn decoded(inner: impl CoreSource + 'static) -> Self {
        Self { inner: Arc::new(inner), raw: None }
    }

    fn raw(&self) -> Result<Arc<dyn ReadAt>> {
        self.raw.clone().ok_or_else(|| invalid("a codec needs a source of raw bytes, not one that is decoded already"))
    }
}

#[pymethods]
impl Source {
    #[staticmethod]
    #[pyo3(signature = (fd, offset = 0, length = None))]
    fn file(fd: RawFd, offset: u64, length: Option<u64>) -> Result<Self> {
        if fd < 0 {
            return Err(invalid(format!("{fd} is no descriptor")));
        }
        // SAFETY: not -1, and borrowed for this call only; the kernel refuses one that is not open.
        let own = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
        let own =
            own.map_err(|error| quire_core::Error::os("fcntl(F_DUPFD_CLOEXEC)", error.raw_os_error().unwrap_or(0)))?;
        Ok(Self::plain(File::new(own, offset, length)?))
    }

    #[staticmethod]
    fn buffer(obj: &Bound<'_, PyAny>) -> Result<Self> {
        // Held as an object, whose end can wait for a thread that has the GIL. A buffer would ask for it where it is
        // dropped, which may be a thread that others wait for with the GIL in hand.
        let view = PyMemoryView::from(obj)?;
        let buffer: PyBuffer<u8> = PyBuffer::get(&view)?;
        if !buffer.is_c_contiguous() {
            return Err(invalid("the buffer is not contiguous"));
        }
        let (address, length) = (buffer.buf_ptr() as usize, buffer.len_bytes());
        let owner: Py<PyMemoryView> = view.unbind();
        // SAFETY: the exporter keeps the bytes in place while a view is held, and nobody else has this one to release
        // it; it is held as long as the source lives.
        Ok(Self::plain(unsafe { Memory::borrowed(address, length, Box::new(owner)) }))
    }

    #[staticmethod]
    fn snapshot(py: Python<'_>, snapshot: &Snapshot) -> Result<Self> {
        let snapshot = snapshot.get()?;
        Ok(Self::plain(py.detach(|| SnapshotBytes::new(snapshot))?))
    }

    fn slice(&self, offset: u64, length: u64) -> Result<Self> {
        Ok(Self::plain(Slice::new(self.raw()?, offset, length)?))
    }

    /// A range of what this shows, decoded or not.
    fn part(&self, offset: u64, length: u64) -> Result<Self> {
        Ok(Self::decoded(Part::new(Arc::clone(&self.inner), offset, length)?))
    }

    #[pyo3(signature = (size, crc, cache = None))]
    fn deflate(&self, py: Python<'_>, size: u64, crc: u32, cache: Option<PathBuf>) -> Result<Self> {
        let raw = self.raw()?;
        let source = py.detach(|| Deflate::new(raw, size, crc, cache.map(Cache::new)));
        if size == 0 {
            // Nothing would ever be asked of it, so its end is looked at now.
            pass(py, || source.pass())?;
        }
        Ok(Self::decoded(source))
    }

    #[pyo3(signature = (cache = None))]
    fn gzip(&self, py: Python<'_>, cache: Option<PathBuf>) -> Result<Self> {
        let raw = self.raw()?;
        let source = py.detach(|| Gzip::new(raw, cache.map(Cache::new)));
        pass(py, || source.pass())?;
        Ok(Self::decoded(source))
    }

    #[pyo3(signature = (cache = None))]
    fn zstd(&self, py: Python<'_>, cache: Option<PathBuf>) -> Result<Self> {
        let raw = self.raw()?;
        let source = py.detach(|| Zstd::new(raw, cache.map(Cache::new))).map_err(|failure| page_error(&failure))?;
        pass(py, || source.pass())?;
        Ok(Self::decoded(source))
    }

    /// Whether `gzip` or `zstd` would need no first pass.
    #[pyo3(signature = (codec, cache = None))]
    fn opens_at_once(&self, py: Python<'_>, codec: &str, cache: Option<PathBuf>) -> Result<bool> {
        let raw = self.raw()?;
        let cache = cache.map(Cache::new);
        match codec {
            "gzip" => Ok(py.detach(|| Gzip::new(raw, cache).is_passed())),
            "zstd" => {
                let source = py.detach(|| Zstd::new(raw, cache)).map_err(|failure| page_error(&failure))?;
                Ok(source.is_passed())
            }
            other => Err(invalid(format!("{other:?} is none of gzip and zstd"))),
        }
    }

    #[getter]
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn unit(&self, offset: u64) -> (u64, u64) {
        let unit = self.inner.unit(offset);
        (unit.start, unit.end)
    }

    /// Produce bytes directly, with no region.
    fn read<'py>(&self, py: Python<'py>, offset: u64, length: usize) -> Result<Bound<'py, PyBytes>> {
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > self.inner.size()) {
            return Err(invalid(format!(
                "bytes {offset} to {offset}+{length} are outside a source of {} bytes",
                self.inner.size()
            )));
        }
        PyBytes::new_with(py, length, |buffer| {
            let read = py.detach(|| quire_core::region::reading(|| self.inner.fill(offset, buffer)));
            let filled = read.map_err(Raised::from)?;
            filled.map_err(|failure| page_error(&failure).into())
        })
        .map_err(Raised::from)
    }
}
