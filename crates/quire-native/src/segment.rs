//! `_native.Segment`.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;

use crate::door::Door;
use crate::errors::{Result, closed};
use crate::snapshot::Snapshot;

#[pyclass(subclass, weakref, module = "quire._native")]
pub struct Segment {
    inner: Mutex<Option<Arc<quire_core::Segment>>>,
    door: Door,
}

impl Segment {
    fn get(&self) -> Result<Arc<quire_core::Segment>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(|| closed("segment"))
    }
}

#[pymethods]
impl Segment {
    #[new]
    #[pyo3(signature = (size_bytes, *, start=None))]
    fn new(py: Python<'_>, size_bytes: u64, start: Option<&Snapshot>) -> Result<Self> {
        let start = start.map(Snapshot::get).transpose()?;
        if start.as_ref().is_some_and(|start| start.size_bytes() != size_bytes) {
            return Err(PyValueError::new_err("the size is not that of the snapshot").into());
        }
        let segment = py.detach(|| match &start {
            Some(snapshot) => quire_core::Segment::start_as(snapshot),
            None => quire_core::Segment::new(size_bytes),
        })?;
        let door = Door::new("segment", segment.address(), size_bytes);
        Ok(Self { inner: Mutex::new(Some(Arc::new(segment))), door })
    }

    #[getter]
    fn size(&self) -> u64 {
        self.door.len()
    }

    #[getter]
    fn address(&self) -> Result<usize> {
        self.door.address()
    }

    fn snapshot_native(&self, py: Python<'_>) -> Result<Snapshot> {
        let segment = self.get()?;
        Ok(Snapshot::wrap(py.detach(|| segment.snapshot())?))
    }

    fn sever_native(&self, py: Python<'_>) -> Result<Snapshot> {
        let segment = self.get()?;
        Ok(Snapshot::wrap(py.detach(|| segment.sever())?))
    }

    fn grow(&self, py: Python<'_>, size_bytes: u64) -> Result<()> {
        let segment = self.get()?;
        // In place first, with other threads running; moving needs that nobody can take a view meanwhile.
        match py.detach(|| segment.grow(size_bytes, false)) {
            Err(quire_core::Error::Exported(_)) if !self.door.has_views() => {
                segment.grow(size_bytes, true)?;
            }
            other => {
                other?;
            }
        }
        self.door.set(segment.address(), segment.size_bytes());
        Ok(())
    }

    fn write_at(&self, py: Python<'_>, offset: u64, data: &Bound<'_, PyAny>) -> Result<()> {
        let segment = self.get()?;
        let buffer = PyBuffer::<u8>::get(data)?;
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("the buffer is not C-contiguous").into());
        }
        // SAFETY: the buffer is held for the whole call, so the memory stays; another thread may store to it
        // meanwhile, which can only make the copied bytes a mixture.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes()) };
        Ok(py.detach(|| segment.write(offset, bytes))?)
    }

    fn check_invariants(&self, py: Python<'_>) -> Result<()> {
        let segment = self.get()?;
        Ok(py.detach(|| segment.check_invariants())?)
    }

    fn memory(&self, py: Python<'_>) -> Result<HashMap<&'static str, u64>> {
        let segment = self.get()?;
        let memory = py.detach(|| segment.memory())?;
        Ok(HashMap::from([
            ("private", memory.private_bytes),
            ("duplicate", memory.duplicate_bytes),
            ("layers", memory.layer_bytes),
            ("live", memory.live_bytes),
        ]))
    }

    fn close(&self, py: Python<'_>) -> Result<()> {
        if self.door.shut()? {
            let segment = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
            py.detach(|| drop(segment));
        }
        Ok(())
    }

    #[getter]
    fn closed(&self) -> bool {
        !self.door.is_open()
    }

    #[getter]
    fn forked(&self) -> Result<bool> {
        Ok(self.get()?.is_forked())
    }

    /// # Safety
    /// Called by CPython as `bf_getbuffer`.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let owner = slf.clone().into_any();
        // SAFETY: CPython passes its view; the segment stays mapped until the door is shut or the object dies.
        unsafe { slf.borrow().door.export(&owner, view, flags, false) }
    }

    /// # Safety
    /// Called by CPython as `bf_releasebuffer`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.door.release();
    }
}
