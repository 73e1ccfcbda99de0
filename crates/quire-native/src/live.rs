//! `_native.LiveSegment`, its writable alias, and `_native.MirrorView`.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use quire_core::live::{Backend, verify_mirror};
use quire_core::sys::sysv::SharedId;

use crate::door::Door;
use crate::errors::{Result, closed};
use crate::snapshot::Snapshot;

#[pyclass(subclass, weakref, module = "quire._native")]
pub struct LiveSegment {
    inner: Mutex<Option<Arc<quire_core::LiveSegment>>>,
    door: Door,
    /// Writable aliases that were handed out and not released; each keeps the memory.
    aliases: Arc<Mutex<usize>>,
}

impl LiveSegment {
    fn get(&self) -> Result<Arc<quire_core::LiveSegment>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(|| closed("live segment"))
    }
}

#[pymethods]
impl LiveSegment {
    #[new]
    #[pyo3(signature = (size_bytes, *, backend="memfd"))]
    fn new(py: Python<'_>, size_bytes: u64, backend: &str) -> Result<Self> {
        let backend = match backend {
            "memfd" => Backend::Memfd,
            "sysv" => Backend::SystemV,
            other => {
                let text = format!("backend {other:?} is neither 'memfd' nor 'sysv'");
                return Err(PyValueError::new_err(text).into());
            }
        };
        let live = py.detach(|| quire_core::LiveSegment::new(size_bytes, backend))?;
        let door = Door::new("live segment", live.ro_address(), size_bytes);
        Ok(Self { inner: Mutex::new(Some(Arc::new(live))), door, aliases: Arc::default() })
    }

    #[getter]
    fn size(&self) -> u64 {
        self.door.len()
    }

    #[getter]
    fn ro_address(&self) -> Result<usize> {
        self.door.address()
    }

    #[getter]
    fn rw_address(&self) -> Result<usize> {
        Ok(self.get()?.rw_address())
    }

    #[getter]
    fn fd(&self) -> Result<RawFd> {
        Ok(self.get()?.fd().map_or(-1, |fd| fd.as_raw_fd()))
    }

    #[getter]
    fn shmid(&self) -> Result<i32> {
        Ok(self.get()?.shared_id().map_or(-1, |id| id.0))
    }

    fn snapshot_native(&self, py: Python<'_>) -> Result<Snapshot> {
        let live = self.get()?;
        Ok(Snapshot::wrap(py.detach(|| live.snapshot())?))
    }

    fn writable(&self) -> Result<WritableAlias> {
        let live = self.get()?;
        if live.is_forked() {
            return Err(quire_core::Error::Forked("writable()").into());
        }
        *self.aliases.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let door = Door::new("writable alias", live.rw_address(), live.size_bytes());
        Ok(WritableAlias { _live: live, door, aliases: Arc::clone(&self.aliases) })
    }

    fn close(&self, py: Python<'_>) -> Result<()> {
        if *self.aliases.lock().unwrap_or_else(PoisonError::into_inner) > 0 {
            let text = "the live segment cannot be closed: its writable alias is in use";
            return Err(pyo3::exceptions::PyBufferError::new_err(text).into());
        }
        if self.door.shut()? {
            let live = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
            py.detach(|| drop(live));
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
        // SAFETY: CPython passes its view; the memory stays mapped until the door is shut or the object dies.
        unsafe { slf.borrow().door.export(&owner, view, flags, true) }
    }

    /// # Safety
    /// Called by CPython as `bf_releasebuffer`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.door.release();
    }
}

#[pyclass(subclass, weakref, module = "quire._native")]
pub struct WritableAlias {
    _live: Arc<quire_core::LiveSegment>,
    door: Door,
    aliases: Arc<Mutex<usize>>,
}

#[pymethods]
impl WritableAlias {
    #[new]
    fn new(segment: &LiveSegment) -> Result<Self> {
        segment.writable()
    }

    #[getter]
    fn size(&self) -> u64 {
        self.door.len()
    }

    #[getter]
    fn address(&self) -> Result<usize> {
        self.door.address()
    }

    fn release(&self) -> Result<()> {
        if self.door.shut()? {
            *self.aliases.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        }
        Ok(())
    }

    /// # Safety
    /// Called by CPython as `bf_getbuffer`.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let owner = slf.clone().into_any();
        // SAFETY: CPython passes its view; this object keeps the live segment, and so the memory.
        unsafe { slf.borrow().door.export(&owner, view, flags, false) }
    }

    /// # Safety
    /// Called by CPython as `bf_releasebuffer`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.door.release();
    }
}

impl Drop for WritableAlias {
    fn drop(&mut self) {
        if self.door.is_open() {
            *self.aliases.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        }
    }
}

#[pyclass(subclass, weakref, module = "quire._native")]
pub struct MirrorView {
    inner: Mutex<Option<quire_core::MirrorView>>,
    door: Door,
}

/// Borrow a descriptor number for the length of a call.
fn borrow_fd(fd: &RawFd) -> Result<BorrowedFd<'_>> {
    if *fd < 0 {
        return Err(quire_core::Error::Invalid(format!("descriptor {fd}")).into());
    }
    // SAFETY: the caller keeps the descriptor open during the call; a wrong number makes the system calls fail.
    Ok(unsafe { BorrowedFd::borrow_raw(*fd) })
}

#[pymethods]
impl MirrorView {
    #[staticmethod]
    fn verify_fd(fd: RawFd) -> Result<u64> {
        Ok(verify_mirror(borrow_fd(&fd)?)?)
    }

    #[new]
    #[pyo3(signature = (*, fd=-1, shmid=-1, size_bytes=0))]
    fn new(py: Python<'_>, fd: RawFd, shmid: i32, size_bytes: u64) -> Result<Self> {
        let view = if shmid >= 0 {
            py.detach(|| quire_core::MirrorView::of_shared(SharedId(shmid), size_bytes))?
        } else {
            let borrowed = borrow_fd(&fd)?;
            py.detach(|| quire_core::MirrorView::of_fd(borrowed, size_bytes))?
        };
        let door = Door::new("mirror", view.address(), view.size_bytes());
        Ok(Self { inner: Mutex::new(Some(view)), door })
    }

    #[getter]
    fn size(&self) -> u64 {
        self.door.len()
    }

    #[getter]
    fn address(&self) -> Result<usize> {
        self.door.address()
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
        // SAFETY: CPython passes its view; the mapping stays until the door is shut or the object dies.
        unsafe { slf.borrow().door.export(&owner, view, flags, true) }
    }

    /// # Safety
    /// Called by CPython as `bf_releasebuffer`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.door.release();
    }
}
