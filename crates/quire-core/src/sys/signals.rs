//! SIGSEGV and SIGBUS: one handler for each, which asks those who may know the address, and else passes the fault on to
//! the handler that was there before.
#![allow(unsafe_code)]

use std::fmt::{self, Write};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicUsize, Ordering};

use crate::sys::file::errno;
use crate::{Error, Result};

/// Looks at the address of a fault. True: the cause is gone, repeat the access. Runs in a signal handler: it may not
/// allocate, nor take a lock that interrupted code may hold.
pub type Claim = fn(address: usize) -> bool;

/// A signal with its claimants and the action that was installed before ours.
pub struct Signal {
    number: i32,
    claims: [AtomicUsize; 4],
    /// Leaked when replaced, because a handler may be reading it.
    previous: AtomicPtr<libc::sigaction>,
    /// The thread in which the previous handler runs.
    passing: AtomicI32,
}

impl Signal {
    const fn new(number: i32) -> Self {
        Self {
            number,
            claims: [const { AtomicUsize::new(0) }; 4],
            previous: AtomicPtr::new(std::ptr::null_mut()),
            passing: AtomicI32::new(0),
        }
    }

    /// Have `claim` asked about faults, and install our handler unless it is the current one.
    ///
    /// Takes no lock, which forked children could not trust. Threads that are here at once may each install our handler:
    /// they do the same thing.
    pub fn claim(&self, claim: Claim) -> Result<()> {
        let own = claim as usize;
        let placed = self.claims.iter().any(|place| {
            let taken = place.compare_exchange(0, own, Ordering::AcqRel, Ordering::Acquire);
            taken.map_or_else(|other| other == own, |_| true)
        });
        assert!(placed, "a place for every claimant of this crate");
        self.install()
    }

    fn install(&self) -> Result<()> {
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: asking for the current action only writes `old`.
        if unsafe { libc::sigaction(self.number, std::ptr::null(), old.as_mut_ptr()) } != 0 {
            return Err(Error::last_os("sigaction"));
        }
        // SAFETY: zeroed, then filled by the call above; the struct is plain data.
        let old = unsafe { old.assume_init() };
        let ours: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
        if old.sa_sigaction == ours as usize {
            return Ok(());
        }
        self.previous.store(Box::into_raw(Box::new(old)), Ordering::Release);
        // SAFETY: an all-zero sigaction is valid; the fields that matter are set below.
        let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
        new.sa_sigaction = ours as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: the handler is async-signal-safe: what claimants do, and what the previous handler does.
        if unsafe { libc::sigaction(self.number, &raw const new, std::ptr::null_mut()) } != 0 {
            return Err(Error::last_os("sigaction"));
        }
        Ok(())
    }

    fn is_claimed(&self, address: usize) -> bool {
        self.claims.iter().any(|place| {
            let claim = place.load(Ordering::Acquire);
            // SAFETY: only `Claim` functions are stored, which live as long as the process.
            claim != 0 && unsafe { std::mem::transmute::<usize, Claim>(claim) }(address)
        })
    }

    fn pass_on(&self, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let previous = self.previous.load(Ordering::Acquire);
        // SAFETY: either null or a leaked box that is never freed.
        let action = if previous.is_null() { None } else { Some(unsafe { &*previous }) };
        // A handler that was installed between two of our installations has us as the one before it, and sends the
        // signal again when it is done. Passed on to it once more, the two would call each other without end.
        // SAFETY: the kernel passes a valid siginfo; gettid only returns a number.
        let (sent, thread) = unsafe { ((*info).si_code <= 0, libc::gettid()) };
        let before = self.passing.swap(thread, Ordering::AcqRel);
        let action = action.filter(|_| !(sent && before == thread));
        match action {
            Some(action) if action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN => {
                if action.sa_flags & libc::SA_SIGINFO != 0 {
                    // SAFETY: the action was installed with SA_SIGINFO, so its handler has this type.
                    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                        unsafe { std::mem::transmute(action.sa_sigaction) };
                    handler(self.number, info, context);
                } else {
                    // SAFETY: the action was installed without SA_SIGINFO, so its handler has this type.
                    let handler: extern "C" fn(i32) = unsafe { std::mem::transmute(action.sa_sigaction) };
                    handler(self.number);
                }
                self.passing.store(before, Ordering::Release);
            }
            _ => {
                // SAFETY: restoring the default action; returning then repeats the fault, which ends the process. One that
                // was sent (kill, raise) is no fault and would not come again, so it is sent again.
                unsafe {
                    libc::signal(self.number, libc::SIG_DFL);
                    if sent {
                        libc::raise(self.number);
                    }
                }
            }
        }
    }
}

pub static SEGV: Signal = Signal::new(libc::SIGSEGV);
pub static BUS: Signal = Signal::new(libc::SIGBUS);

extern "C" fn on_fault(number: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let signal = if number == libc::SIGBUS { &BUS } else { &SEGV };
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler of a fault; a code above zero says that the
    // kernel sent it because of an access, and not somebody with kill, in which case there is no address.
    let address = unsafe { if (*info).si_code > 0 { (*info).si_addr() as usize } else { 0 } };
    let before = errno();
    let repeat = address != 0 && signal.is_claimed(address);
    set_errno(before);
    if !repeat {
        signal.pass_on(info, context);
    }
}

fn set_errno(value: i32) {
    // SAFETY: the location is this thread's errno.
    unsafe { *libc::__errno_location() = value };
}

/// Accesses that were repeated without anything having been done for them, by what they touched: a place for each of a
/// few hashes, so that threads that touch different things do not reset each other's count.
struct Repeats {
    last: [AtomicUsize; 64],
    times: [AtomicUsize; 64],
}

static REPEATS: Repeats =
    Repeats { last: [const { AtomicUsize::new(0) }; 64], times: [const { AtomicUsize::new(0) }; 64] };

fn place_of(touched: usize) -> usize {
    // A multiplicative hash: the upper bits of the product depend on all bits.
    (touched.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (usize::BITS - 6)) % 64
}

/// Count an access that faulted though what it touched, a page or a window, was there. False once that happens again and
/// again: then the fault is real, for example a store to memory that is only readable.
pub fn repeats_are_few(touched: usize) -> bool {
    const MANY: usize = 1000;
    let (last, times) = (&REPEATS.last[place_of(touched)], &REPEATS.times[place_of(touched)]);
    if last.swap(touched, Ordering::AcqRel) != touched {
        times.store(0, Ordering::Release);
    }
    times.fetch_add(1, Ordering::AcqRel) < MANY
}

/// Something was done for an access: those before it were no repetitions.
pub fn forget_repeats(touched: usize) {
    REPEATS.times[place_of(touched)].store(0, Ordering::Release);
}

/// Sleep for a moment; callable in a signal handler.
pub fn pause(nanoseconds: i64) {
    let pause = libc::timespec { tv_sec: 0, tv_nsec: nanoseconds };
    // SAFETY: async-signal-safe; `pause` outlives the call.
    unsafe { libc::nanosleep(&raw const pause, std::ptr::null_mut()) };
}

/// Send this thread SIGBUS, as a fault would; callable in a signal handler.
pub fn raise_bus() {
    // Twice, because handlers that expect the access to be repeated restore the default action and return.
    for _ in 0..2 {
        // SAFETY: async-signal-safe; what follows is the business of whoever handles SIGBUS.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}

/// Write to standard error as far as it goes; callable in a signal handler.
pub fn complain(text: &[u8]) {
    // SAFETY: async-signal-safe; the slice is valid. Nothing can be done if nobody can be told.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}

/// Text of bounded length, which a signal handler can compose: what is too long is cut, and reported as an error.
pub struct Line {
    text: [u8; 512],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { text: [0; 512], len: 0 }
    }
}

impl Line {
    #[must_use]
    pub fn text(&self) -> &[u8] {
        &self.text[..self.len]
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let take = text.len().min(self.text.len() - self.len);
        self.text[self.len..self.len + take].copy_from_slice(&text.as_bytes()[..take]);
        self.len += take;
        if take == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}
