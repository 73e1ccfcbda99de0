//! `_native.Library`.

use std::ffi::{CString, OsString};
use std::os::raw::c_int;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use quire_core::loader::{Library as Core, OpenError};

use crate::errors::{Raised, Result};
use crate::source::Source;

/// A shared object, laid out for the dynamic linker.
#[pyclass(frozen, module = "quire._native")]
pub struct Library {
    inner: Core,
}

type Strings = (Option<OsString>, Vec<OsString>, Option<OsString>, Option<OsString>);

/// Whether the dynamic linker would take an object that it has for this name.
#[pyfunction]
pub fn is_loaded(name: OsString) -> bool {
    // A name with a NUL in it is nobody's.
    CString::new(name.into_vec()).is_ok_and(|name| quire_core::sys::dl::Handle::find(&name).is_some())
}

#[pymethods]
impl Library {
    #[new]
    #[pyo3(signature = (source, name, window_bytes, whole = None, crc = None))]
    fn new(
        py: Python<'_>,
        source: &Source,
        name: &str,
        window_bytes: u64,
        whole: Option<String>,
        crc: Option<u32>,
    ) -> Result<Self> {
        let source = Arc::clone(&source.inner);
        Ok(Self { inner: py.detach(|| Core::prepare(source, name, window_bytes, whole, crc))? })
    }

    /// What the dynamic linker opens, and calls it.
    #[getter]
    fn path(&self) -> String {
        self.inner.path().to_string_lossy().into_owned()
    }

    /// soname, needed, rpath, runpath.
    fn linkage(&self) -> Strings {
        let found = self.inner.linkage().clone();
        let needed = found.needed.into_iter().map(OsString::from_vec).collect();
        let text = |name: Option<Vec<u8>>| name.map(OsString::from_vec);
        (text(found.soname), needed, text(found.rpath), text(found.runpath))
    }

    /// With the GIL held, as CPython opens what it imports: constructors may count on it. Filling does not need it.
    fn open(&self, mode: c_int) -> Result<usize> {
        match self.inner.open(mode) {
            Ok(handle) => Ok(handle.address()),
            Err(OpenError::Linker(text)) => Err(Raised::from(PyOSError::new_err(text))),
            Err(OpenError::Region(error)) => Err(error.into()),
        }
    }

    fn close(&self) -> Result<bool> {
        self.inner.close().map_err(|text| Raised::from(PyOSError::new_err(text)))
    }

    fn fill(&self, py: Python<'_>) -> Result<()> {
        Ok(py.detach(|| self.inner.fill())?)
    }

    fn discard(&self, py: Python<'_>) -> Result<u64> {
        Ok(py.detach(|| self.inner.discard())?)
    }

    /// reason, size, lazy bytes, filled bytes, faults, refills, evictions.
    fn share(&self, py: Python<'_>) -> Result<(String, u64, u64, u64, u64, u64, u64)> {
        let share = py.detach(|| self.inner.share())?;
        let (faults, refills, evictions) =
            share.figures.map_or((0, 0, 0), |figures| (figures.faults, figures.refills, figures.evictions));
        Ok((share.reason, share.size, share.lazy_bytes, share.filled_bytes, faults, refills, evictions))
    }
}
