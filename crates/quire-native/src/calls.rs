//! `_native.spawn_calls` and `_native.calls_code_address`.

use pyo3::prelude::*;
use quire_core::sys::calls as core;

/// Fork a child that makes the system calls of a list and nothing else; its pid, which the caller waits for.
///
/// See `quire_core::sys::calls` for the records.
#[pyfunction]
pub fn spawn_calls(first: usize) -> PyResult<i32> {
    Ok(core::spawn(first)?)
}

/// Address of the code that such a child runs, which lies in one page.
#[pyfunction]
#[must_use]
pub fn calls_code_address() -> usize {
    core::code_address()
}
