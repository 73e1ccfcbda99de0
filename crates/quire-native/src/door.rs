//! The door through which Python takes views of memory: it counts them, and shuts only when none is out.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::errors::{Raised, closed};

#[derive(Debug)]
struct State {
    address: usize,
    len: u64,
    views: usize,
    open: bool,
    /// Why no view may be taken for now.
    barred: Option<&'static str>,
}

/// Counts exported buffers of one piece of memory. Nobody waits for anything while using it, so its lock never waits
/// long.
#[derive(Debug)]
pub struct Door {
    what: &'static str,
    state: Mutex<State>,
}

impl Door {
    pub fn new(what: &'static str, address: usize, len: u64) -> Self {
        Self { what, state: Mutex::new(State { address, len, views: 0, open: true, barred: None }) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_open(&self) -> bool {
        self.lock().open
    }

    pub fn address(&self) -> Result<usize, Raised> {
        let state = self.lock();
        if state.open { Ok(state.address) } else { Err(closed(self.what)) }
    }

    pub fn len(&self) -> u64 {
        self.lock().len
    }

    pub fn has_views(&self) -> bool {
        self.lock().views > 0
    }

    /// The memory has grown, or has moved while nobody held a view.
    pub fn set(&self, address: usize, len: u64) {
        let mut state = self.lock();
        debug_assert!(state.views == 0 || state.address == address);
        (state.address, state.len) = (address, len);
    }

    /// Close for good; false if it was closed before. BufferError while views are out.
    pub fn shut(&self) -> Result<bool, Raised> {
        let mut state = self.lock();
        if state.views > 0 {
            return Err(PyBufferError::new_err(format!(
                "the {} cannot be closed: {} exported views exist (arrays or memoryviews); delete them first",
                self.what, state.views
            ))
            .into());
        }
        Ok(std::mem::replace(&mut state.open, false))
    }

    /// Refuse views until `unbar`, with this reason. Fails while views are out.
    pub fn bar(&self, reason: &'static str) -> quire_core::Result<()> {
        let mut state = self.lock();
        if state.views > 0 {
            return Err(quire_core::Error::Exported(format!(
                "{} exported views of the {} exist (arrays or memoryviews); delete them first",
                state.views, self.what
            )));
        }
        state.barred = Some(reason);
        Ok(())
    }

    pub fn unbar(&self) {
        self.lock().barred = None;
    }

    /// Fill in a Py_buffer for `owner`.
    ///
    /// # Safety
    /// `view` must be what CPython passed to `bf_getbuffer` of `owner`, and the memory must stay mapped as long as
    /// `owner` lives or until `shut` succeeds.
    pub unsafe fn export(
        &self,
        owner: &Bound<'_, PyAny>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
        readonly: bool,
    ) -> PyResult<()> {
        let mut state = self.lock();
        if !state.open {
            return Err(closed(self.what).into());
        }
        if let Some(reason) = state.barred {
            return Err(PyBufferError::new_err(reason));
        }
        let len = isize::try_from(state.len).map_err(|_| PyBufferError::new_err("too large for a buffer"))?;
        // SAFETY: the view is CPython's; address and length describe memory that the caller keeps mapped.
        let rc = unsafe {
            ffi::PyBuffer_FillInfo(view, owner.as_ptr(), state.address as *mut _, len, c_int::from(readonly), flags)
        };
        if rc != 0 {
            return Err(PyErr::fetch(owner.py()));
        }
        state.views += 1;
        Ok(())
    }

    pub fn release(&self) {
        self.lock().views -= 1;
    }
}
