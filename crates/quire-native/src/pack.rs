//! `_native.FrameEncoder`: zstandard frames.

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use quire_core::pack::FrameEncoder as CoreEncoder;

use crate::errors::Result;

#[pyclass(frozen, module = "quire._native")]
pub struct FrameEncoder(CoreEncoder);

#[pymethods]
impl FrameEncoder {
    #[new]
    fn new(level: i32) -> Result<Self> {
        Ok(Self(CoreEncoder::new(level)?))
    }

    /// Only `bytes`, which nobody can change while they are read without the GIL.
    fn frame<'py>(&self, data: &Bound<'py, PyBytes>) -> Result<Bound<'py, PyBytes>> {
        let py = data.py();
        let bytes = data.as_bytes();
        let frame = py.detach(|| self.0.frame(bytes))?;
        Ok(PyBytes::new(py, &frame))
    }
}
