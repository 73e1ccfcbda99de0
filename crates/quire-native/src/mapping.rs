//! `_native.Mapping`.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::{Mutex, PoisonError};

use pyo3::ffi;
use pyo3::prelude::*;

use crate::door::Door;
use crate::errors::{Result, closed};
use crate::snapshot::Snapshot;

#[pyclass(subclass, weakref, module = "quire._native")]
pub struct Mapping {
    inner: Mutex<Option<quire_core::Mapping>>,
    door: Door,
    private: bool,
}

impl Mapping {
    fn with<T>(&self, f: impl FnOnce(&mut quire_core::Mapping) -> quire_core::Result<T>) -> Result<T> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(f(inner.as_mut().ok_or_else(|| closed("mapping"))?)?)
    }
}

#[pymethods]
impl Mapping {
    #[new]
    #[pyo3(signature = (snapshot, *, private=false))]
    fn new(py: Python<'_>, snapshot: &Snapshot, private: bool) -> Result<Self> {
        let snapshot = snapshot.get()?;
        let mapping = py.detach(|| quire_core::Mapping::new(snapshot, private))?;
        let door = Door::new("mapping", mapping.address(), mapping.size_bytes());
        Ok(Self { inner: Mutex::new(Some(mapping)), door, private })
    }

    #[getter]
    fn size(&self) -> u64 {
        self.door.len()
    }

    #[getter]
    fn address(&self) -> Result<usize> {
        self.door.address()
    }

    #[getter]
    fn private(&self) -> bool {
        self.private
    }

    #[getter]
    fn vma_budget(&self) -> usize {
        quire_core::layout::vma_budget()
    }

    #[getter]
    fn copied_pages(&self, py: Python<'_>) -> Result<u64> {
        py.detach(|| self.with(|mapping| Ok(mapping.copied_pages())))
    }

    fn advance_native(&self, py: Python<'_>, snapshot: &Snapshot) -> Result<()> {
        let snapshot = snapshot.get()?;
        py.detach(|| self.with(|mapping| mapping.advance(&snapshot)))
    }

    fn close(&self, py: Python<'_>) -> Result<()> {
        if self.door.shut()? {
            py.detach(|| drop(self.inner.lock().unwrap_or_else(PoisonError::into_inner).take()));
        }
        Ok(())
    }

    #[getter]
    fn closed(&self) -> bool {
        !self.door.is_open()
    }

    /// # Safety
    /// Called by CPython as `bf_getbuffer`.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let owner = slf.clone().into_any();
        let this = slf.borrow();
        // SAFETY: CPython passes its view; the mapping stays until the door is shut or the object dies.
        unsafe { this.door.export(&owner, view, flags, !this.private) }
    }

    /// # Safety
    /// Called by CPython as `bf_releasebuffer`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.door.release();
    }
}
