//! The threads that serve touches reported by userfaultfd, and the process's two userfaultfds.
//!
//! Threads take turns: one, the leader, waits for the next touch. If the touch's source is quick the leader serves it and
//! goes on; otherwise it first lets another thread lead, so that a slow source holds up nobody else.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::{Backend, Region, handler, lock, registry};
use crate::sys::fork::PerProcess;
use crate::sys::uffd::{self, Uffd};
use crate::sys::{signals, threads};
use crate::{Error, Result};

/// Threads at once; touches that find all of them busy wait.
const MOST_THREADS: usize = 32;

const CLOSED: &str = "quire: a page is missing and cannot be filled: this program has closed the descriptor of \
                      userfaultfd, which is not its own; a daemon closes its descriptors before it opens regions or \
                      imports wheels, or loads libraries whole (QUIRE_LIBRARIES=whole)\n";

struct Pager {
    uffd: Uffd,
    leader: Mutex<()>,
    threads: AtomicUsize,
    /// Threads that wait to lead.
    spare: AtomicUsize,
}

static PAGER: PerProcess<Pager> = PerProcess::new();
static SIGNAL: PerProcess<Uffd> = PerProcess::new();

/// The userfaultfd whose touches are served by threads.
pub fn thread_uffd() -> Result<&'static Uffd> {
    let pager = PAGER.get_or_make(|| {
        Ok(Pager {
            uffd: open(uffd::FEATURE_MISSING_SHMEM)?,
            leader: Mutex::new(()),
            threads: AtomicUsize::new(0),
            spare: AtomicUsize::new(0),
        })
    })?;
    // Not before it is known to be the one: that of a thread that came second is closed again.
    pager.uffd.keep_open()?;
    Ok(&pager.uffd)
}

/// The userfaultfd whose touches raise SIGBUS.
pub fn signal_uffd() -> Result<&'static Uffd> {
    let uffd = SIGNAL.get_or_make(|| open(uffd::FEATURE_MISSING_SHMEM | uffd::FEATURE_SIGBUS))?;
    uffd.keep_open()?;
    Ok(uffd)
}

fn open(features: u64) -> Result<Uffd> {
    Uffd::open(features).map_err(|error| {
        Error::Unsupported(format!(
            "{error}: this user may not use userfaultfd; access to /dev/userfaultfd, CAP_SYS_PTRACE or \
             vm.unprivileged_userfaultfd=1 allows it, and a seccomp filter may forbid it"
        ))
    })
}

/// Make sure that touches of a region are served from now on.
pub fn serve_for(region: &Arc<Region>) -> Result<()> {
    match region.backend() {
        Backend::Thread => {
            thread_uffd()?;
            match PAGER.get() {
                Some(pager) if pager.threads.load(Ordering::Acquire) == 0 => start(pager),
                _ => Ok(()),
            }
        }
        Backend::Signal | Backend::Sigsegv => handler::serve_for(region),
        Backend::Eager => Ok(()),
    }
}

fn start(pager: &'static Pager) -> Result<()> {
    pager.threads.fetch_add(1, Ordering::AcqRel);
    threads::start("quire-pager", move || run(pager)).inspect_err(|_| {
        pager.threads.fetch_sub(1, Ordering::AcqRel);
    })
}

fn run(pager: &'static Pager) {
    loop {
        pager.spare.fetch_add(1, Ordering::AcqRel);
        let mut leading = Some(lock(&pager.leader));
        pager.spare.fetch_sub(1, Ordering::AcqRel);
        while leading.is_some() {
            let address = match pager.uffd.wait_fault() {
                Ok(address) => address,
                Err(error) => {
                    signals::complain(format!("quire: the pager stops: {error}\n").as_bytes());
                    return;
                }
            };
            if !pager.uffd.is_open() {
                // The toucher would wait for ever, and nobody can fill the page any more.
                signals::complain(CLOSED.as_bytes());
                std::process::abort();
            }
            let Some((region, offset)) = registry::find(address) else {
                // Closed in between; nobody can wait for it but by a pointer that dangles.
                continue;
            };
            if region.nested || !region.source.is_signal_safe() {
                leading = None;
                let threads = pager.threads.load(Ordering::Acquire);
                if pager.spare.load(Ordering::Acquire) == 0 && threads < MOST_THREADS {
                    // Failing, the next touch waits until this one is served.
                    let _later = start(pager);
                }
            }
            region.serve(offset);
        }
    }
}

/// In a forked child: the userfaultfds speak of the parent's memory, and no thread is there.
pub fn enter_child() {
    if let Some(old) = PAGER.forget() {
        old.uffd.abandon();
    }
    if let Some(old) = SIGNAL.forget() {
        old.abandon();
    }
}
