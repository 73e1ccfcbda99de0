//! `_native.digest`.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// The first 16 bytes of the BLAKE3 hash: a name for what it was made of. Imports nothing, unlike `hashlib`.
#[pyfunction]
pub fn digest<'py>(py: Python<'py>, data: &[u8]) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &blake3::hash(data).as_bytes()[..16])
}
