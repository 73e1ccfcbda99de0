//! `_native.Library`.

use std::ffi::{CString, OsString};
use std::os::raw::c_int;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use quire_core::loader::{Group as CoreGroup, Library as Core, OpenError};

use crate::errors::{Raised, Result};
use crate::source::Source;

/// A shared object, laid out for the dynamic linker.
#[pyclass(frozen, module = "quire._native")]
pub struct Library {
    inner: Arc<Core>,
}

type Strings = (Option<OsString>, Vec<OsString>, Option<OsString>, Option<OsString>);

/// Whether the dynamic linker would take an object that it has for this name.
#[pyfunction]
pub fn is_loaded(name: OsString) -> bool {
    // A name with a NUL in it is nobody's.
    CString::new(name.into_vec()).is_ok_and(|name| quire_core::sys::dl::Handle::find(&name).is_some())
}

fn refused(error: OpenError) -> Raised {
    match error {
        OpenError::Linker(text) => Raised::from(PyOSError::new_err(text)),
        OpenError::Region(error) => error.into(),
    }
}

#[pymethods]
impl Library {
    #[new]
    #[pyo3(signature = (source, name, window_bytes, whole = None, crc = None, hide = false))]
    fn new(
        py: Python<'_>,
        source: &Source,
        name: &str,
        window_bytes: u64,
        whole: Option<String>,
        crc: Option<u32>,
        hide: bool,
    ) -> Result<Self> {
        let source = Arc::clone(&source.inner);
        let inner = py.detach(|| Core::prepare(source, name, window_bytes, whole, crc, hide))?;
        Ok(Self { inner: Arc::new(inner) })
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
        Ok(self.inner.open(mode).map_err(refused)?.address())
    }

    #[getter]
    fn has_resolvers(&self) -> bool {
        self.inner.has_resolvers()
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

/// Shared objects that are linked, and unloaded, together.
#[pyclass(frozen, module = "quire._native")]
pub struct Group {
    inner: CoreGroup,
}

#[pymethods]
impl Group {
    /// With the GIL held, as for one.
    #[new]
    fn new(members: Vec<Py<Library>>, needed: Vec<OsString>, order: Vec<usize>, mode: c_int) -> Result<Self> {
        let members = members.iter().map(|member| Arc::clone(&member.get().inner)).collect();
        let needed =
            needed.into_iter().map(|name| CString::new(name.into_vec())).collect::<std::result::Result<_, _>>();
        let needed: Vec<_> = needed.map_err(|error| Raised::from(PyValueError::new_err(error.to_string())))?;
        Ok(Self { inner: CoreGroup::link(members, &needed, &order, mode).map_err(refused)? })
    }

    fn close(&self) -> Result<bool> {
        self.inner.close().map_err(|text| Raised::from(PyOSError::new_err(text)))
    }
}
