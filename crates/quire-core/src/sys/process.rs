//! Starting a program as nobody's child: it is not seen by `wait`, sends no SIGCHLD, and takes no descriptor along but
//! those it is given.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::sys::area::interrupted;
use crate::{Error, Result};

/// A program with its arguments and environment, ready to be started without allocating.
pub struct Program {
    path: CString,
    argv: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    pub fn new(argv: Vec<Vec<u8>>, environment: Vec<Vec<u8>>) -> Result<Self> {
        let strings = |list: Vec<Vec<u8>>| -> Result<Vec<CString>> {
            list.into_iter()
                .map(|one| CString::new(one).map_err(|_| Error::Invalid("a zero byte in an argument".into())))
                .collect()
        };
        let argv = strings(argv)?;
        let path = argv.first().cloned().ok_or_else(|| Error::Invalid("no program is named".into()))?;
        Ok(Self { path, argv, environment: strings(environment)? })
    }
}

/// All signals held back from this thread, until dropped.
pub struct Blocked {
    before: libc::sigset_t,
}

impl Blocked {
    #[must_use]
    pub fn all() -> Self {
        Self::all_but(&[])
    }

    /// Those of a thread's own faults excepted, which end the process at once where they are blocked.
    #[must_use]
    pub fn all_but_faults() -> Self {
        Self::all_but(&[libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP])
    }

    fn all_but(except: &[i32]) -> Self {
        // SAFETY: both sets are plain C structs that outlive the calls.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            for signal in except {
                libc::sigdelset(&raw mut all, *signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
            Self { before }
        }
    }

    /// Take back a SIGPIPE that a write of this thread has raised, unless it was blocked before.
    pub fn discard_sigpipe(&self) {
        // SAFETY: the sets and the time outlive the calls; a SIGPIPE by a write is directed at this thread.
        unsafe {
            if libc::sigismember(&raw const self.before, libc::SIGPIPE) == 0 {
                let mut pipe: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut pipe);
                libc::sigaddset(&raw mut pipe, libc::SIGPIPE);
                let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
                libc::sigtimedwait(&raw const pipe, std::ptr::null_mut(), &raw const now);
            }
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set is the one that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}

/// A program that was started. Dropping it waits for its end if it became a child of ours after all, which happens
/// where this process adopts orphans (process 1 of a container). End it first.
pub struct Started {
    adopted: Option<OwnedFd>,
}

impl Drop for Started {
    fn drop(&mut self) {
        const PATIENCE_MS: i32 = 1000;
        let Some(pidfd) = &self.adopted else { return };
        let mut entry = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, which outlives the call.
        while unsafe { libc::poll(&raw mut entry, 1, PATIENCE_MS) } < 0 && interrupted() {}
        // SAFETY: an all-zero siginfo is a valid value, and outlives the call; P_PIDFD names this one child only.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let id = pidfd.as_raw_fd() as libc::id_t;
            libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED | libc::WNOHANG);
        }
    }
}

const STACK_BYTES: usize = 128 << 10;

/// What the two steps of a start share; they run in this process's memory while the caller waits.
struct Start {
    path: *const libc::c_char,
    argv: *const *const libc::c_char,
    environment: *const *const libc::c_char,
    fds: *const i32,
    count: i32,
    stack: *mut libc::c_void,
    pid: i32,
    errno: i32,
}

/// Start a program, in a session of its own, with `fds` as its descriptors 3, 4 and so on, standard output and error
/// as ours, and nothing to read. It ignores SIGINT; all other signals do what they do by default.
///
/// The kernel runs the steps in this process's memory, as `posix_spawn` does: neither locks nor handlers are involved,
/// and a large process is not copied. A step between us and the program ends at once, so that the program is adopted
/// by the system; it has no signal to send when it ends, so no `wait` of this process's other threads can catch it.
pub fn start(program: &Program, fds: &[BorrowedFd<'_>]) -> Result<Started> {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|one| one.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
    };
    let argv = pointers(&program.argv);
    let environment = pointers(&program.environment);
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let mut stacks = vec![0_u128; 2 * STACK_BYTES / 16];
    let bottom = stacks.as_mut_ptr().cast::<u8>();
    let mut start = Start {
        path: program.path.as_ptr(),
        argv: argv.as_ptr(),
        environment: environment.as_ptr(),
        fds: raw.as_ptr(),
        count: raw.len() as i32,
        // SAFETY: the end of the second half of the allocation.
        stack: unsafe { bottom.add(2 * STACK_BYTES) }.cast(),
        pid: 0,
        errno: 0,
    };
    let blocked = Blocked::all();
    // SAFETY: the step runs on the first half of the stacks while this thread is suspended (CLONE_VFORK), so all that
    // `start` points to is alive and nobody else uses it. Signals are blocked, so no handler runs there.
    let step = unsafe {
        let arg = (&raw mut start).cast();
        libc::clone(between, bottom.add(STACK_BYTES).cast(), libc::CLONE_VM | libc::CLONE_VFORK, arg)
    };
    let failed = Error::last_os("clone");
    drop(blocked);
    if step < 0 {
        return Err(failed);
    }
    // SAFETY: waits for this one child, which nobody else can see (__WCLONE) and which has ended.
    while unsafe { libc::waitpid(step, std::ptr::null_mut(), libc::__WCLONE) } < 0 && interrupted() {}
    // The steps wrote to it behind the compiler's back.
    // SAFETY: a local that is alive and initialised.
    let (pid, errno) = unsafe { ((&raw const start.pid).read_volatile(), (&raw const start.errno).read_volatile()) };
    if pid <= 0 || errno != 0 {
        return Err(Error::os("execve", errno));
    }
    Ok(Started { adopted: adopted(pid) })
}

/// A descriptor of the process if it is our child.
fn adopted(pid: i32) -> Option<OwnedFd> {
    // SAFETY: looks at one process and takes nothing (WNOWAIT); an all-zero siginfo is a valid value.
    let ours = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::waitid(libc::P_PID, pid as libc::id_t, &raw mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) == 0
    };
    if !ours {
        return None;
    }
    // SAFETY: plain system call.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as i32;
    // SAFETY: the descriptor is new and nobody else owns it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

extern "C" fn between(arg: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `start` passes a pointer to its own local and waits. Only system calls are made here and in `become_it`.
    unsafe {
        let start = arg.cast::<Start>();
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let pid = libc::clone(become_it, (*start).stack, flags, arg);
        (*start).pid = pid;
        if pid < 0 {
            (*start).errno = *libc::__errno_location();
        }
        libc::_exit(0)
    }
}

extern "C" fn become_it(arg: *mut libc::c_void) -> libc::c_int {
    // SAFETY: as in `between`. Descriptors and signal handlers are copies of this process; memory is shared, and
    // nothing is written but `errno`.
    unsafe {
        let start = arg.cast::<Start>();
        libc::setsid();
        let count = (*start).count;
        if !arrange((*start).fds, count) {
            (*start).errno = *libc::__errno_location();
            libc::_exit(127);
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        for signal in 1..=64 {
            action.sa_sigaction = if signal == libc::SIGINT { libc::SIG_IGN } else { libc::SIG_DFL };
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::execve((*start).path, (*start).argv, (*start).environment);
        (*start).errno = *libc::__errno_location();
        libc::_exit(127)
    }
}

/// Put the descriptors at 3 and up, nothing behind them, and nothing to read at 0.
///
/// # Safety
/// `fds` points to `count` descriptors, and this process's table of descriptors is its own to change.
unsafe fn arrange(fds: *const i32, count: i32) -> bool {
    const MOST: usize = 8;
    let mut high = [-1; MOST];
    // SAFETY: system calls on descriptors of a process that is about to become another program.
    unsafe {
        // Out of the way first, so that none is overwritten by another's place.
        for (i, place) in high.iter_mut().enumerate().take(count as usize) {
            *place = libc::fcntl(*fds.add(i), libc::F_DUPFD_CLOEXEC, 3 + count);
            if *place < 0 {
                return false;
            }
        }
        for i in 0..count {
            if libc::dup2(high[i as usize], 3 + i) < 0 {
                return false;
            }
        }
        let nothing = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY);
        if nothing < 0 || (nothing != 0 && libc::dup2(nothing, 0) < 0) {
            return false;
        }
        if libc::syscall(libc::SYS_close_range, 3 + count, u32::MAX, 0) != 0 {
            // Kernels before 5.9.
            let mut limit: libc::rlimit = std::mem::zeroed();
            libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
            for fd in 3 + count..limit.rlim_cur.min(1 << 20) as i32 {
                libc::close(fd);
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::sys::socket::{Received, message_pair, receive};

    fn program(script: &str) -> Program {
        let words = ["/bin/sh", "-c", script];
        Program::new(words.map(|w| w.as_bytes().to_vec()).to_vec(), vec![b"HELLO=there".to_vec()]).expect("a program")
    }

    #[test]
    fn a_program_gets_its_descriptors_and_is_no_child() {
        let (ours, theirs) = message_pair().expect("socketpair");
        let started = start(&program("ls /proc/$$/fd | tr '\\n' ' ' >&3; echo $HELLO >&3"), &[theirs.as_fd()]);
        drop(theirs);
        let mut seen = String::new();
        let mut buffer = [0; 256];
        let until = Instant::now() + Duration::from_secs(20);
        while let Received::Message(n) = receive(ours.as_fd(), &mut buffer, until) {
            seen.push_str(std::str::from_utf8(&buffer[..n]).expect("text"));
        }
        assert!(seen.contains("there"), "{seen}");
        assert!(seen.starts_with("0 1 2 3 "), "{seen}");
        drop(started.expect("started"));
        // SAFETY: looks for children of any kind, and takes none.
        let rc = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) };
        assert!(rc <= 0);
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let nothing = Program::new(vec![b"/nowhere/to/be/found".to_vec()], Vec::new()).expect("a program");
        assert_eq!(start(&nothing, &[]).err().map(|e| e.errno()), Some(libc::ENOENT));
    }
}
