//! Threads of the library's own.

use crate::sys::process::Blocked;
use crate::{Error, Result};

/// Start a thread to which no signal is sent but those of its own faults.
///
/// One that is blocked in the threads of the program, to be waited for with `sigwait`, would otherwise be delivered to
/// ours, and end the process.
pub fn start(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let _inherited = Blocked::all_but_faults();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map(drop).map_err(|error| Error::os("pthread_create", error.raw_os_error().unwrap_or(0)))
}
