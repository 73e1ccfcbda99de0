//! `_native.Snapshot`.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use quire_core::{PAGE, Stats, table};

use crate::errors::{Result, closed};

#[pyclass(frozen, weakref, module = "quire._native")]
pub struct Snapshot {
    inner: Mutex<Option<Arc<quire_core::Snapshot>>>,
    stats: Stats,
}

impl Snapshot {
    pub fn wrap((snapshot, stats): (Arc<quire_core::Snapshot>, Stats)) -> Self {
        Self { inner: Mutex::new(Some(snapshot)), stats }
    }

    pub fn get(&self) -> Result<Arc<quire_core::Snapshot>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(|| closed("snapshot"))
    }
}

#[pymethods]
impl Snapshot {
    #[staticmethod]
    fn from_fds(py: Python<'_>, fds: Vec<RawFd>) -> Result<Self> {
        // SAFETY: the caller gives these descriptors away; each is closed exactly once, here or by a layer.
        let fds: Vec<OwnedFd> = fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
        let snapshot = py.detach(|| quire_core::Snapshot::receive(fds))?;
        Ok(Self::wrap((Arc::new(snapshot), Stats::default())))
    }

    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf, copy: bool, check: bool) -> Result<Self> {
        let snapshot = py.detach(|| quire_core::save::load(&path, copy, check))?;
        Ok(Self::wrap((Arc::new(snapshot), Stats::default())))
    }

    #[getter]
    fn size(&self) -> Result<u64> {
        Ok(self.get()?.size_bytes())
    }

    #[getter]
    fn layer_count(&self) -> Result<usize> {
        Ok(self.get()?.layers().len())
    }

    fn layer_fds(&self) -> Result<Vec<RawFd>> {
        Ok(self.get()?.layers().iter().map(|layer| layer.fd().as_raw_fd()).collect())
    }

    fn layer_ids<'py>(&self, py: Python<'py>) -> Result<Vec<Bound<'py, PyBytes>>> {
        Ok(self.get()?.layers().iter().map(|layer| PyBytes::new(py, &layer.trailer().id.0)).collect())
    }

    fn layer_keys(&self) -> Result<Vec<(u64, u64)>> {
        Ok(self.get()?.layers().iter().map(|layer| (layer.key().dev, layer.key().ino)).collect())
    }

    fn verify(&self, py: Python<'_>) -> Result<()> {
        let snapshot = self.get()?;
        Ok(py.detach(|| snapshot.verify())?)
    }

    fn diff<'py>(&self, py: Python<'py>, other: &Self) -> Result<Bound<'py, PyBytes>> {
        let (a, b) = (self.get()?, other.get()?);
        let ranges = py.detach(|| table::diff::diff(&a, &b))?;
        let mut bytes = Vec::with_capacity(ranges.len() * 16);
        for range in ranges {
            bytes.extend_from_slice(&(range.start * PAGE).to_ne_bytes());
            bytes.extend_from_slice(&(range.end() * PAGE).to_ne_bytes());
        }
        Ok(PyBytes::new(py, &bytes))
    }

    fn save(&self, py: Python<'_>, path: PathBuf) -> Result<()> {
        let snapshot = self.get()?;
        Ok(py.detach(|| quire_core::save::save(&snapshot, &path))?)
    }

    #[getter]
    fn stats(&self) -> (u64, u64, u64, u64) {
        let Stats { pages_scanned, pages_copied, nodes_written, duration_ns } = self.stats;
        (pages_scanned, pages_copied, nodes_written, duration_ns)
    }

    fn check_invariants(&self, py: Python<'_>) -> Result<u64> {
        let snapshot = self.get()?;
        let counts = py.detach(|| snapshot.check())?;
        Ok(counts.iter().map(|count| count.data).sum())
    }

    fn memory(&self) -> Result<Vec<(u64, u64)>> {
        let snapshot = self.get()?;
        let mut out = Vec::new();
        for (layer, count) in snapshot.layers().iter().zip(snapshot.counts()) {
            out.push((layer.allocated_bytes()?, count.data * PAGE));
        }
        Ok(out)
    }

    fn close(&self, py: Python<'_>) {
        let snapshot = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Giving a gigabyte back takes a while.
        py.detach(|| drop(snapshot));
    }

    #[getter]
    fn closed(&self) -> bool {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}
