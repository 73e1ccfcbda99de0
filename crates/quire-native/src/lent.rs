//! `_native.Lent`.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use quire_core::lent as core;

use crate::errors::Result;

/// Addresses of lent memory, entered for the signal handlers.
#[pyclass(frozen, module = "quire._native")]
pub struct Lent {
    inner: core::Lent,
}

#[pymethods]
impl Lent {
    #[new]
    fn new(address: usize, length: usize, base: usize, size: usize, number: u64) -> Result<Self> {
        let end = address.checked_add(length).ok_or_else(|| PyValueError::new_err("the range wraps around"))?;
        Ok(Self { inner: core::Lent::new(address..end, base, size, number)? })
    }

    fn close(&self) {
        self.inner.close();
    }
}
