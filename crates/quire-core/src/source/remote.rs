//! Bytes that a helper process produces: what runs Python functions and fetches from remote stores.
//!
//! Requests and answers are small messages on a socket, the bytes themselves travel in shared memory. Nothing here
//! needs the GIL of the process that asks, also when the helper has to be started again. docs/helper.md has the
//! protocol, and what happens when who dies.
//!
//! There is no thread that listens. Of the threads that wait for an answer one receives, for all of them; the others
//! sleep until it has something for them, or until it is satisfied and one of them takes its place.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Failure, Filled, ReadAt};
use crate::sys::memfd::{self, Piece};
use crate::sys::private::{PerProcess, PrivateFd};
use crate::sys::process::{self, Program, Started};
use crate::sys::socket::{self, Received};
use crate::{Error, Result};

/// The most bytes of one request; longer reads are several.
pub const SLOT_BYTES: usize = 4 << 20;
/// The most requests in flight.
pub const MAX_PARALLEL: usize = 64;
/// So many helpers may die with a request in hand before it fails.
pub const MAX_DEATHS: u32 = 5;

const REQUEST_BYTES: usize = 24;
const ANSWER_BYTES: usize = 16;
const TEXT_BYTES: usize = 1000;

const TIMED_OUT: &str = "timed out";
const DIED: &str = "the helper process died";

/// How a helper comes to be.
pub enum Launch {
    /// A program, which finds what to do in a sealed memfd at descriptor 6.
    Program { program: Program, payload: OwnedFd },
    /// A process that forks a worker for each connection sent to it.
    Zygote { control: OwnedFd },
}

impl Launch {
    /// A program whose payload is these bytes.
    pub fn program(program: Program, payload: &[u8]) -> Result<Self> {
        let file = memfd::create(c"quire-payload")?;
        memfd::write_pieces(file.as_fd(), 0, &[Piece::of(payload)])?;
        memfd::add_seals(file.as_fd(), memfd::SEALS_IMMUTABLE)?;
        Ok(Self::Program { program, payload: file })
    }
}

/// The client of a helper process, which is started when it is first asked. Every process has a helper of its own: a
/// forked child starts another one.
pub struct Remote {
    launch: Launch,
    size: u64,
    parallel: usize,
    timeout: Duration,
    cause: &'static str,
    session: PerProcess<Session>,
}

impl Remote {
    /// Ask for `size` bytes, `parallel` requests at a time; a reader gets an error after `timeout`. Failures that the
    /// helper reports begin with `cause`.
    pub fn new(launch: Launch, size: u64, parallel: usize, timeout: Duration, cause: &'static str) -> Result<Self> {
        if parallel == 0 || parallel > MAX_PARALLEL {
            return Err(Error::Invalid(format!("parallel is {parallel}, it must be 1 to {MAX_PARALLEL}")));
        }
        if i64::try_from(size).is_err() {
            return Err(Error::Invalid(format!("size {size} is too large")));
        }
        Ok(Self { launch, size, parallel, timeout, cause, session: PerProcess::new() })
    }

    fn connect(&self) -> Result<Connection> {
        let (socket, their_socket) = socket::message_pair()?;
        let (their_lifeline, lifeline) = socket::pipe()?;
        let memory = memfd::create(c"quire-helper")?;
        memfd::truncate(memory.as_fd(), (self.parallel * SLOT_BYTES) as u64)?;
        // Cut short, reads of it would give too little; that is all a seal can prevent here.
        memfd::add_seals(memory.as_fd(), libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL)?;
        let fds = [their_socket.as_fd(), memory.as_fd(), their_lifeline.as_fd()];
        let started = match &self.launch {
            Launch::Program { program, payload } => {
                Some(process::start(program, &[fds[0], fds[1], fds[2], payload.as_fd()])?)
            }
            Launch::Zygote { control } => {
                socket::send(control.as_fd(), b"w", &fds).map_err(|error| match error.errno() {
                    libc::EPIPE | libc::ECONNRESET | libc::ECONNREFUSED => {
                        error.hinted("the process that holds the function is gone; make the source again")
                    }
                    _ => error,
                })?;
                None
            }
        };
        Ok(Connection {
            socket: PrivateFd::new(socket)?,
            memory: PrivateFd::new(memory)?,
            lifeline: PrivateFd::new(lifeline)?,
            _started: started,
        })
    }

    fn ask(&self, offset: u64, into: &mut [u8]) -> Filled {
        let session = self.session.get(|| Session::new(self.parallel));
        let deadline = Instant::now() + self.timeout;
        let late = || Failure::detailed(TIMED_OUT, offset, &format!("no answer within {:?}", self.timeout));
        let mut state = session.lock();
        let slot = loop {
            if let Some(free) = state.slots.iter().position(|slot| matches!(slot, Slot::Free)) {
                break free;
            }
            if Instant::now() >= deadline {
                return Err(late());
            }
            state = session.wait(state, deadline);
        };
        state.last_id += 1;
        let id = state.last_id;
        state.slots[slot] = Slot::Waiting(Pending { id, offset, length: into.len(), sent: false, deaths: 0 });
        loop {
            match &state.slots[slot] {
                Slot::Done(connection) => {
                    let connection = Arc::clone(connection);
                    drop(state);
                    let whole = memfd::read_exact(connection.memory.get(), into, (slot * SLOT_BYTES) as u64);
                    session.free(session.lock(), slot);
                    return match whole {
                        Ok(true) => Ok(()),
                        Ok(false) => Err(Failure::new("the shared memory is too short", offset)),
                        Err(error) => Err(Failure::os("the shared memory cannot be read", offset, error.errno())),
                    };
                }
                Slot::Failed(failure) => {
                    let failure = failure.clone();
                    session.free(state, slot);
                    return Err(failure);
                }
                Slot::Waiting(_) | Slot::Free => {}
            }
            if Instant::now() >= deadline {
                let dead = state.give_up(slot);
                session.free(state, slot);
                drop(dead);
                return Err(late());
            }
            if state.connection.is_none() {
                match self.connect() {
                    Ok(connection) => state.connection = Some(Arc::new(connection)),
                    Err(error) => {
                        let detail = error.to_string();
                        state.slots[slot] =
                            Slot::Failed(Failure::detailed("the helper process cannot be started", offset, &detail));
                        continue;
                    }
                }
            }
            if let Err(dead) = state.send_waiting() {
                session.changed.notify_all();
                drop(dead);
                continue;
            }
            if state.receiving {
                state = session.wait(state, deadline);
                continue;
            }
            let Some(connection) = state.connection.clone() else { continue };
            state.receiving = true;
            drop(state);
            let mut buffer = [0; ANSWER_BYTES + TEXT_BYTES];
            let received = socket::receive(connection.socket.get(), &mut buffer, deadline);
            state = session.lock();
            state.receiving = false;
            let current = state.connection.as_ref().is_some_and(|now| Arc::ptr_eq(now, &connection));
            let dead = match received {
                _ if !current => None,
                Received::Message(bytes) => state.deliver(&connection, &buffer[..bytes], self.cause),
                Received::Closed => state.lose(),
                Received::Late => None,
            };
            session.changed.notify_all();
            // The last reference ends the helper, and may wait for its end.
            drop((dead, connection));
        }
    }
}

impl ReadAt for Remote {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Filled {
        let mut at = offset;
        for part in into.chunks_mut(SLOT_BYTES) {
            self.ask(at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn parallel_reads(&self) -> usize {
        self.parallel
    }
}

/// A helper, as long as somebody holds on to it.
struct Connection {
    socket: PrivateFd,
    memory: PrivateFd,
    lifeline: PrivateFd,
    _started: Option<Started>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The helper asked the kernel to kill it, and all it has started, when anything happens to this pipe.
        socket::poke(self.lifeline.get());
    }
}

struct Pending {
    id: u64,
    offset: u64,
    length: usize,
    sent: bool,
    deaths: u32,
}

/// One request at most, and its part of the shared memory.
enum Slot {
    Free,
    Waiting(Pending),
    Done(Arc<Connection>),
    Failed(Failure),
}

struct State {
    connection: Option<Arc<Connection>>,
    slots: Vec<Slot>,
    last_id: u64,
    receiving: bool,
    /// A helper died: one request at a time, until it is known which of them does that.
    careful: bool,
}

struct Session {
    state: Mutex<State>,
    changed: Condvar,
}

impl Session {
    fn new(parallel: usize) -> Self {
        let slots = (0..parallel).map(|_| Slot::Free).collect();
        Self {
            state: Mutex::new(State { connection: None, slots, last_id: 0, receiving: false, careful: false }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, until: Instant) -> MutexGuard<'a, State> {
        let left = until.saturating_duration_since(Instant::now());
        self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
    }

    fn free(&self, mut state: MutexGuard<'_, State>, slot: usize) {
        state.slots[slot] = Slot::Free;
        drop(state);
        self.changed.notify_all();
    }
}

/// A helper that is not to be used any more. Drop it without the lock: its end may be waited for.
type Dead = Option<Arc<Connection>>;

impl State {
    fn waiting(&mut self) -> impl Iterator<Item = (usize, &mut Pending)> {
        self.slots.iter_mut().enumerate().filter_map(|(i, slot)| match slot {
            Slot::Waiting(pending) => Some((i, pending)),
            _ => None,
        })
    }

    /// Send what has not been sent, oldest first.
    fn send_waiting(&mut self) -> std::result::Result<(), Dead> {
        loop {
            if self.careful && self.waiting().any(|(_, pending)| pending.sent) {
                return Ok(());
            }
            let Some(connection) = self.connection.clone() else { return Ok(()) };
            let next = self.waiting().filter(|(_, pending)| !pending.sent).min_by_key(|(_, pending)| pending.id);
            let Some((slot, pending)) = next else { return Ok(()) };
            pending.sent = true;
            let mut message = [0; REQUEST_BYTES];
            message[..8].copy_from_slice(&pending.id.to_le_bytes());
            message[8..16].copy_from_slice(&pending.offset.to_le_bytes());
            message[16..20].copy_from_slice(&(pending.length as u32).to_le_bytes());
            message[20..].copy_from_slice(&(slot as u32).to_le_bytes());
            match socket::send(connection.socket.get(), &message, &[]) {
                Ok(()) => {}
                // It is gone, but what it said last is still to be read; then comes the end.
                Err(error) if matches!(error.errno(), libc::EPIPE | libc::ECONNRESET) => return Ok(()),
                Err(_) => {
                    drop(connection);
                    return Err(self.lose());
                }
            }
        }
    }

    /// The helper died: what it was asked is sent again to the next one, unless that was done often enough.
    fn lose(&mut self) -> Dead {
        self.careful = true;
        for slot in &mut self.slots {
            let Slot::Waiting(pending) = slot else { continue };
            if std::mem::take(&mut pending.sent) {
                pending.deaths += 1;
                if pending.deaths >= MAX_DEATHS {
                    let detail = format!("{MAX_DEATHS} times with this request in hand");
                    *slot = Slot::Failed(Failure::detailed(DIED, pending.offset, &detail));
                }
            }
        }
        self.connection.take()
    }

    /// Nobody waits for this slot any more. If the helper may still write to it, there is no more use for the helper.
    fn give_up(&mut self, slot: usize) -> Dead {
        let sent = matches!(&self.slots[slot], Slot::Waiting(pending) if pending.sent);
        if !sent {
            return None;
        }
        self.careful = true;
        self.waiting().for_each(|(_, pending)| pending.sent = false);
        self.connection.take()
    }

    fn deliver(&mut self, connection: &Arc<Connection>, message: &[u8], cause: &'static str) -> Dead {
        let Some((id, status, length)) = header(message) else { return self.lose() };
        let text = one_line(&message[ANSWER_BYTES..]);
        if id == 0 {
            if status == 0 {
                return None;
            }
            for slot in &mut self.slots {
                if let Slot::Waiting(pending) = slot {
                    *slot = Slot::Failed(Failure::detailed("the helper process cannot begin", pending.offset, &text));
                }
            }
            return self.connection.take();
        }
        let found = self.waiting().find(|(_, pending)| pending.id == id && pending.sent);
        let Some((slot, pending)) = found else { return self.lose() };
        let (offset, wanted) = (pending.offset, pending.length);
        if status == 0 && length as usize != wanted {
            return self.lose();
        }
        self.careful = false;
        self.slots[slot] = match status {
            0 => Slot::Done(Arc::clone(connection)),
            _ => Slot::Failed(Failure::detailed(cause, offset, &text)),
        };
        None
    }
}

/// Id, status and length of an answer.
fn header(message: &[u8]) -> Option<(u64, u32, u32)> {
    let (id, rest) = message.split_first_chunk::<8>()?;
    let (status, rest) = rest.split_first_chunk::<4>()?;
    let (length, _) = rest.split_first_chunk::<4>()?;
    Some((u64::from_le_bytes(*id), u32::from_le_bytes(*status), u32::from_le_bytes(*length)))
}

/// What another process said, fit to be part of a message.
fn one_line(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(script: &str, parallel: usize, timeout: Duration) -> Remote {
        let words = ["/bin/sh", "-c", script];
        let program = Program::new(words.map(|w| w.as_bytes().to_vec()).to_vec(), Vec::new()).expect("a program");
        let launch = Launch::program(program, b"payload").expect("a payload");
        Remote::new(launch, 1 << 20, parallel, timeout, "it failed").expect("a source")
    }

    #[test]
    fn a_helper_that_always_dies_is_started_five_times() {
        let failure = program("exit 1", 1, Duration::from_secs(60)).read_at(0, &mut [0; 8]).expect_err("it dies");
        assert_eq!(failure.cause, DIED);
    }

    #[test]
    fn a_helper_that_does_not_answer_is_given_up() {
        let source = program("exec cat <&5 >/dev/null", 1, Duration::from_millis(50));
        assert_eq!(source.read_at(0, &mut [0; 8]).expect_err("it only listens").cause, TIMED_OUT);
    }

    #[test]
    fn a_helper_that_cannot_begin_says_why() {
        let source =
            program("printf '\\0\\0\\0\\0\\0\\0\\0\\0\\1\\0\\0\\0\\0\\0\\0\\0no\\n' >&3", 1, Duration::from_secs(60));
        let failure = source.read_at(5, &mut [0; 8]).expect_err("it said so");
        assert_eq!(failure.to_string(), "the helper process cannot begin at byte 5: no ");
    }

    #[test]
    fn answers_are_read_with_care() {
        assert_eq!(header(&[0; 15]), None);
        assert_eq!(header(&[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]), Some((1, 2, 3)));
        assert_eq!(one_line(b"a\nb\xff\x1b"), "a b\u{fffd} ");
    }
}
