//! Core errors as Python exceptions. The classes of our own are defined, with their documentation, in `quire.errors`.

use pyo3::exceptions::{PyBufferError, PyMemoryError, PyOSError, PyValueError};
use pyo3::prelude::*;
use quire_core::Error;

pyo3::import_exception!(quire.errors, NotImmutable);
pyo3::import_exception!(quire.errors, Malformed);
pyo3::import_exception!(quire.errors, ForkedError);
pyo3::import_exception!(quire.errors, Unsupported);
pyo3::import_exception!(quire.errors, PageError);

/// `?` turns a core error into the Python exception it stands for.
pub struct Raised(PyErr);

impl From<Error> for Raised {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        Self(match error {
            Error::NotImmutable(_) => NotImmutable::new_err(text),
            Error::Malformed(_) => Malformed::new_err(text),
            Error::Page(_) => PageError::new_err(text),
            Error::Forked(_) => ForkedError::new_err(text),
            Error::Unsupported(_) => Unsupported::new_err(text),
            Error::Invalid(_) => PyValueError::new_err(text),
            Error::Exported(_) => PyBufferError::new_err(text),
            Error::Memory(_) => PyMemoryError::new_err(text),
            Error::Os { errno, .. } => PyOSError::new_err((errno, text)),
        })
    }
}

impl From<PyErr> for Raised {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

impl From<Raised> for PyErr {
    fn from(raised: Raised) -> Self {
        raised.0
    }
}

pub type Result<T> = std::result::Result<T, Raised>;

/// An operation on something that was closed.
pub fn closed(what: &str) -> Raised {
    Raised(PyValueError::new_err(format!("the {what} is closed")))
}
