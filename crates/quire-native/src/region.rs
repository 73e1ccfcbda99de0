//! `_native.Region`.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::sync::Arc;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use quire_core::region::{Backend, Discard, Handle, Region as Core, RegionError, Settings};

use crate::door::Door;
use crate::errors::{PageError, Raised, Result, closed};
use crate::source::Source;

impl From<RegionError> for Raised {
    fn from(error: RegionError) -> Self {
        match error {
            RegionError::Page(failure) => PageError::new_err(failure.to_string()).into(),
            RegionError::Core(error) => error.into(),
        }
    }
}

#[pyclass(subclass, weakref, module = "quire._native")]
pub struct Region {
    inner: std::sync::Mutex<Option<Handle>>,
    door: Door,
}

impl Region {
    fn get(&self) -> Result<Arc<Core>> {
        let inner = self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(Arc::clone(inner.as_ref().ok_or_else(|| closed("region"))?))
    }
}

fn backend(name: &str) -> Result<Backend> {
    Ok(match name {
        "thread" => Backend::Thread,
        "signal" => Backend::Signal,
        "sigsegv" => Backend::Sigsegv,
        "eager" => Backend::Eager,
        _ => return Err(quire_core::Error::Invalid(format!("no backend is called {name:?}")).into()),
    })
}

fn discard(name: &str) -> Result<Discard> {
    Ok(match name {
        "kernel" => Discard::Kernel,
        "pressure" => Discard::Pressure,
        "never" => Discard::Never,
        _ => return Err(quire_core::Error::Invalid(format!("no way to discard is called {name:?}")).into()),
    })
}

/// Note, for later processes, what was touched of the shared objects that this one loaded.
#[pyfunction]
pub fn remember_touched(py: Python<'_>) {
    py.detach(quire_core::region::remember_all);
}

/// Make the file of a shared region; the descriptor is the caller's.
#[pyfunction]
pub fn region_file(size: u64) -> Result<i32> {
    Ok(quire_core::region::shared_file(c"quire-region", size)?.into_raw_fd())
}

#[pymethods]
impl Region {
    #[new]
    #[pyo3(signature = (source, name, window_bytes, discard_mode, faults, executable, shared_fd, budget_bytes))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        source: &Source,
        name: String,
        window_bytes: u64,
        discard_mode: &str,
        faults: &str,
        executable: bool,
        shared_fd: Option<i32>,
        budget_bytes: Option<u64>,
    ) -> Result<Self> {
        let shared = match shared_fd {
            Some(fd) if fd >= 0 => {
                // SAFETY: the caller, quire.region, keeps the descriptor open during this call.
                let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
                Some(borrowed.try_clone_to_owned().map_err(|error| {
                    quire_core::Error::os("fcntl(F_DUPFD_CLOEXEC)", error.raw_os_error().unwrap_or(0))
                })?)
            }
            _ => None,
        };
        let settings = Settings {
            name,
            window_bytes,
            discard: discard(discard_mode)?,
            backend: backend(faults)?,
            executable,
            shared,
            budget_bytes,
            sparse: false,
        };
        let source = Arc::clone(&source.inner);
        let region = py.detach(|| Core::open(source, settings))?;
        let door = Door::new("region", region.address(), region.size());
        Ok(Self { inner: std::sync::Mutex::new(Some(region)), door })
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
    fn window_bytes(&self) -> Result<usize> {
        Ok(self.get()?.window_bytes())
    }

    #[getter]
    fn faults(&self) -> Result<&'static str> {
        Ok(match self.get()?.backend() {
            Backend::Thread => "thread",
            Backend::Signal => "signal",
            Backend::Sigsegv => "sigsegv",
            Backend::Eager => "eager",
        })
    }

    #[getter]
    fn discard_mode(&self) -> Result<&'static str> {
        Ok(match self.get()?.discard_mode() {
            Discard::Kernel => "kernel",
            Discard::Pressure => "pressure",
            Discard::Never => "never",
        })
    }

    #[getter]
    fn serves_system_calls(&self) -> Result<bool> {
        Ok(self.get()?.serves_system_calls())
    }

    /// The descriptor of a shared region's file, which stays the region's; None for others.
    fn shared_fileno(&self) -> Result<Option<i32>> {
        Ok(self.get()?.shared_file().map(|file| file.as_raw_fd()))
    }

    fn read<'py>(&self, py: Python<'py>, offset: u64, length: usize) -> Result<Bound<'py, PyBytes>> {
        let region = self.get()?;
        region.check_range(offset, length as u64)?;
        let mut failure = None;
        let bytes = PyBytes::new_with(py, length, |buffer| {
            failure = py.detach(|| region.read(offset, buffer)).err();
            Ok(())
        })?;
        match failure {
            Some(error) => Err(error.into()),
            None => Ok(bytes),
        }
    }

    fn pin_native(&self, py: Python<'_>, offset: u64, length: u64) -> Result<()> {
        let region = self.get()?;
        Ok(py.detach(|| region.pin(offset, length))?)
    }

    fn unpin_native(&self, py: Python<'_>, offset: u64, length: u64) -> Result<()> {
        let region = self.get()?;
        Ok(py.detach(|| region.unpin(offset, length))?)
    }

    fn prefetch_native(&self, py: Python<'_>, offset: u64, length: u64, wait: bool) -> Result<()> {
        let region = self.get()?;
        if wait {
            return Ok(py.detach(|| region.prefetch(offset, length))?);
        }
        Ok(py.detach(|| region.prefetch_later(offset, length))?)
    }

    fn discard_native(&self, py: Python<'_>, offset: u64, length: u64) -> Result<usize> {
        let region = self.get()?;
        Ok(py.detach(|| region.discard(offset, length))?)
    }

    /// Starts and stops in bytes, native-endian u64, in turn.
    fn resident_native<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyBytes>> {
        let region = self.get()?;
        let found = py.detach(|| region.resident())?;
        let mut packed = Vec::with_capacity(found.len() * 16);
        for range in found {
            packed.extend((range.start * quire_core::PAGE).to_ne_bytes());
            packed.extend((range.end() * quire_core::PAGE).to_ne_bytes());
        }
        Ok(PyBytes::new(py, &packed))
    }

    fn touched(&self, py: Python<'_>) -> Result<Vec<usize>> {
        let region = self.get()?;
        Ok(py.detach(|| region.touched()))
    }

    /// faults, fills, bytes, refills, failures, evictions, latency buckets.
    #[allow(clippy::type_complexity)]
    fn figures(&self) -> Result<(u64, u64, u64, u64, u64, u64, Vec<u64>)> {
        let figures = self.get()?.figures();
        Ok((
            figures.faults,
            figures.fills,
            figures.bytes,
            figures.refills,
            figures.failures,
            figures.evictions,
            figures.latency.to_vec(),
        ))
    }

    fn close(&self, py: Python<'_>) -> Result<()> {
        if self.door.shut()? {
            let region = self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            py.detach(|| drop(region));
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
        // SAFETY: CPython passes its view; the region stays until the door is shut or the object dies.
        unsafe { this.door.export(&owner, view, flags, true) }
    }

    /// # Safety
    /// Called by CPython as `bf_releasebuffer`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.door.release();
    }
}
