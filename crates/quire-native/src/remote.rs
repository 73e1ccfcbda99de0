//! Sources whose bytes a helper process produces.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use quire_core::Error;
use quire_core::source::Plain;
use quire_core::source::remote::{Launch, Remote};
use quire_core::sys::process::Program;

use crate::errors::Result;
use crate::source::Source;

fn source(launch: Launch, size: u64, parallel: usize, timeout: f64, fetches: bool) -> Result<Source> {
    let timeout = Duration::try_from_secs_f64(timeout)
        .ok()
        .filter(|t| !t.is_zero() && t.as_secs() < 1 << 30)
        .ok_or_else(|| Error::Invalid(format!("timeout is {timeout}, it must be seconds, more than 0")))?;
    let cause = if fetches { "fetching failed" } else { "the function failed" };
    let remote = Arc::new(Remote::new(launch, size, parallel, timeout, cause)?);
    Ok(Source { inner: Arc::new(Plain(Arc::clone(&remote))), raw: Some(remote) })
}

/// A source served by a program, started when it is first read.
#[pyfunction]
#[pyo3(signature = (argv, environment, payload, *, size, parallel, timeout, fetches))]
pub fn program_source(
    argv: Vec<Vec<u8>>,
    environment: Vec<Vec<u8>>,
    payload: &[u8],
    size: u64,
    parallel: usize,
    timeout: f64,
    fetches: bool,
) -> Result<Source> {
    let launch = Launch::program(Program::new(argv, environment)?, payload)?;
    source(launch, size, parallel, timeout, fetches)
}

/// A source served by workers of a process that listens on `control`, which is duplicated.
#[pyfunction]
#[pyo3(signature = (control, *, size, parallel, timeout, fetches))]
pub fn zygote_source(control: i32, size: u64, parallel: usize, timeout: f64, fetches: bool) -> Result<Source> {
    if control < 0 {
        return Err(Error::Invalid(format!("{control} is no descriptor")).into());
    }
    // SAFETY: the caller holds the descriptor open during the call; a number that is none is refused by the kernel.
    #[allow(unsafe_code)]
    let control = unsafe { BorrowedFd::borrow_raw(control) }
        .try_clone_to_owned()
        .map_err(|error| Error::os("fcntl(F_DUPFD_CLOEXEC)", error.raw_os_error().unwrap_or(0)))?;
    source(Launch::Zygote { control }, size, parallel, timeout, fetches)
}
