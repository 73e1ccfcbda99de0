//! `_native.Source`: an opaque handle on something that fills memory.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use quire_core::source::{ReadAt, Source as CoreSource};

use crate::errors::{PageError, Result};

/// What a region shows and, for sources whose bytes are shown as they are, the raw bytes that a codec can sit on.
#[pyclass(frozen, module = "quire._native")]
pub struct Source {
    pub inner: Arc<dyn CoreSource>,
    pub raw: Option<Arc<dyn ReadAt>>,
}

#[pymethods]
impl Source {
    #[getter]
    fn size(&self) -> u64 {
        self.inner.size()
    }

    /// Produce bytes directly, with no region.
    fn read<'py>(&self, py: Python<'py>, offset: u64, length: usize) -> Result<Bound<'py, PyBytes>> {
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > self.inner.size()) {
            return Err(quire_core::Error::Invalid(format!(
                "bytes {offset} to {offset}+{length} are outside a source of {} bytes",
                self.inner.size()
            ))
            .into());
        }
        let mut buffer = vec![0; length];
        py.detach(|| self.inner.fill(offset, &mut buffer))
            .map_err(|failure| PageError::new_err(failure.to_string()))?;
        Ok(PyBytes::new(py, &buffer))
    }
}
