//! `_native.Purgeable`, and `_native.PurgeableStore` with its entries.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use quire_core::PAGE;
use quire_core::purgeable::Counters;

use crate::door::Door;
use crate::errors::{Result, closed};

const UNLOCKED: &str = "the purgeable is unlocked, so its content may go at any time: lock() it first";

/// Values up to this length are copied without letting other Python threads run.
const SHORT: usize = 1 << 16;

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[pyclass(subclass, weakref, module = "quire._native")]
pub struct Purgeable {
    inner: Mutex<Option<Arc<Mutex<quire_core::Purgeable>>>>,
    door: Door,
}

impl Purgeable {
    fn get(&self) -> Result<Arc<Mutex<quire_core::Purgeable>>> {
        guard(&self.inner).clone().ok_or_else(|| closed("purgeable"))
    }
}

#[pymethods]
impl Purgeable {
    #[new]
    fn new(py: Python<'_>, size_bytes: u64) -> Result<Self> {
        let inner = py.detach(|| quire_core::Purgeable::new(size_bytes))?;
        let door = Door::new("purgeable", guard(&inner).address(), size_bytes);
        Ok(Self { inner: Mutex::new(Some(inner)), door })
    }

    #[getter]
    fn size(&self) -> u64 {
        self.door.len()
    }

    #[getter]
    fn address(&self) -> Result<usize> {
        self.door.address()
    }

    /// The door is barred and opened under the lock of the memory, so that the two never disagree.
    fn unlock(&self, py: Python<'_>) -> Result<()> {
        let inner = self.get()?;
        Ok(py.detach(|| {
            let mut memory = guard(&inner);
            self.door.bar(UNLOCKED)?;
            memory.unlock().inspect_err(|_| self.door.unbar())
        })?)
    }

    fn lock(&self, py: Python<'_>) -> Result<bool> {
        let inner = self.get()?;
        Ok(py.detach(|| {
            let mut memory = guard(&inner);
            let survived = memory.lock();
            self.door.unbar();
            survived
        }))
    }

    #[getter]
    fn is_locked(&self, py: Python<'_>) -> Result<bool> {
        let inner = self.get()?;
        Ok(py.detach(|| guard(&inner).is_locked()))
    }

    fn lost_native<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyBytes>> {
        let inner = self.get()?;
        let lost = py.detach(|| guard(&inner).lost().to_vec());
        let numbers = lost.iter().flat_map(|range| [range.start * PAGE, range.end() * PAGE]);
        Ok(PyBytes::new(py, &numbers.flat_map(u64::to_ne_bytes).collect::<Vec<u8>>()))
    }

    fn close(&self, py: Python<'_>) -> Result<()> {
        if self.door.shut()? {
            let inner = guard(&self.inner).take();
            py.detach(|| drop(inner));
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
        // SAFETY: CPython passes its view; the memory stays mapped until the door is shut or the object dies.
        unsafe { slf.borrow().door.export(&owner, view, flags, false) }
    }

    /// # Safety
    /// Called by CPython as `bf_releasebuffer`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.door.release();
    }
}

#[pyclass(frozen, module = "quire._native")]
pub struct PurgeableStore {
    inner: Arc<Mutex<quire_core::Store>>,
}

impl PurgeableStore {
    fn locked(&self) -> MutexGuard<'_, quire_core::Store> {
        guard(&self.inner)
    }
}

#[pymethods]
impl PurgeableStore {
    #[new]
    fn new() -> Result<Self> {
        Ok(Self { inner: quire_core::Store::new()? })
    }

    fn put(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> Result<PurgeableEntry> {
        if let Ok(bytes) = data.cast::<PyBytes>() {
            return self.copy_in(py, bytes.as_bytes());
        }
        let buffer = PyBuffer::<u8>::get(data)?;
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("the buffer is not C-contiguous").into());
        }
        if buffer.len_bytes() == 0 {
            return self.copy_in(py, &[]);
        }
        // SAFETY: the buffer is held for the whole call, so the memory stays; another thread may store to it
        // meanwhile, which can only make the copied bytes a mixture.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes()) };
        self.copy_in(py, bytes)
    }

    fn sweep(&self, py: Python<'_>) -> Result<()> {
        Ok(py.detach(|| self.locked().sweep())?)
    }

    fn check_invariants(&self, py: Python<'_>) -> Result<()> {
        Ok(py.detach(|| self.locked().check_invariants())?)
    }

    #[getter]
    fn value_bytes(&self) -> u64 {
        self.locked().value_bytes()
    }

    #[getter]
    fn page_bytes(&self) -> u64 {
        self.locked().page_bytes()
    }

    #[getter]
    fn resident_bytes(&self, py: Python<'_>) -> Result<u64> {
        Ok(py.detach(|| self.locked().resident_bytes())?)
    }

    fn count_miss(&self) {
        self.locked().counters.misses += 1;
    }

    fn count_purged(&self, values: u64) {
        self.locked().counters.purged += values;
    }

    fn count_evicted(&self, values: u64) {
        self.locked().counters.evicted += values;
    }

    #[getter]
    fn counters(&self) -> (u64, u64, u64, u64) {
        let Counters { hits, misses, purged, evicted } = self.locked().counters;
        (hits, misses, purged, evicted)
    }
}

impl PurgeableStore {
    fn copy_in(&self, py: Python<'_>, bytes: &[u8]) -> Result<PurgeableEntry> {
        let copy = || quire_core::Entry::new(&self.inner, bytes);
        let inner = if bytes.len() <= SHORT { copy()? } else { py.detach(copy)? };
        Ok(PurgeableEntry { inner })
    }
}

#[pyclass(frozen, module = "quire._native")]
pub struct PurgeableEntry {
    inner: quire_core::Entry,
}

#[pymethods]
impl PurgeableEntry {
    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// The value; None if some of it is gone.
    fn read<'py>(&self, py: Python<'py>) -> Result<Option<Bound<'py, PyBytes>>> {
        let len = self.inner.len();
        let size = ffi::Py_ssize_t::try_from(len).map_err(|_| PyBufferError::new_err("too large for bytes"))?;
        // SAFETY: with no source, CPython makes a new bytes object whose content nobody has seen and we may fill.
        let made = unsafe { ffi::PyBytes_FromStringAndSize(std::ptr::null(), size) };
        // SAFETY: a new reference or null with an exception set.
        let bytes = unsafe { Bound::from_owned_ptr_or_err(py, made)? };
        // SAFETY: it is a bytes object, so this is where its content lies, for as long as `bytes` lives.
        let start = unsafe { ffi::PyBytes_AsString(bytes.as_ptr()) }.cast::<MaybeUninit<u8>>();
        // SAFETY: `len` bytes at `start` that nobody else knows of, perhaps not initialised, as their type says.
        let to = unsafe { std::slice::from_raw_parts_mut(start, len) };
        let there = if len <= SHORT { self.inner.read(to)? } else { py.detach(|| self.inner.read(to))? };
        Ok(if there { Some(bytes.cast_into::<PyBytes>().map_err(PyErr::from)?) } else { None })
    }

    #[getter]
    fn lost(&self) -> bool {
        self.inner.is_lost()
    }
}

/// What the machine and the cgroup have left.
#[pyfunction]
pub fn available_bytes(py: Python<'_>) -> Option<u64> {
    py.detach(quire_core::sys::memory::available_bytes)
}
