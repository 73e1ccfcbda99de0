//! `_native.probe`.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use quire_core::sys::probe as core;

/// What this kernel and user can do, as a dict:
///
/// `checks`: name to what failed, `(errno, message)`, or to None if it works; errno is 0 if no system call failed.
/// `marked`: whether written pages are marked by the kernel in this process, and writers held by userfaultfd.
/// `tracking_override`: the value of `QUIRE_TRACKING`, or None.
#[pyfunction]
pub fn probe(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = py.detach(core::probe);
    let checks = PyDict::new(py);
    for check in found.checks {
        checks.set_item(check.name, check.result.err().map(|error| (error.errno(), error.to_string())))?;
    }
    let all = PyDict::new(py);
    all.set_item("checks", checks)?;
    all.set_item("marked", found.marked)?;
    all.set_item("tracking_override", found.tracking_override)?;
    Ok(all)
}
