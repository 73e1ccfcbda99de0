//! Pairs of sockets that keep messages apart, pipes, and descriptors sent along.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::sys::area::interrupted;
use crate::{Error, Result};

/// Two ends of a connection on which each message arrives whole or not at all.
pub fn message_pair() -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: the array has room for the two descriptors.
    let rc = unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, (&raw mut ends).cast())
    };
    if rc != 0 {
        return Err(Error::last_os("socketpair"));
    }
    // SAFETY: both descriptors are new and nobody else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// A pipe: the reading end, then the writing end.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: the array has room for the two descriptors.
    if unsafe { libc::pipe2((&raw mut ends).cast(), libc::O_CLOEXEC) } != 0 {
        return Err(Error::last_os("pipe2"));
    }
    // SAFETY: both descriptors are new and nobody else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Write one byte to a pipe; a reader that is gone already is no error.
pub fn poke(pipe: BorrowedFd<'_>) {
    let set = crate::sys::process::Blocked::all();
    // SAFETY: one byte from a static; SIGPIPE is blocked in this thread and taken back below if it came.
    let rc = unsafe { libc::write(pipe.as_raw_fd(), b"x".as_ptr().cast(), 1) };
    if rc < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EPIPE) {
        set.discard_sigpipe();
    }
}

/// Send one message without waiting, with copies of descriptors.
pub fn send(socket: BorrowedFd<'_>, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
    const MOST: usize = 4;
    assert!(fds.len() <= MOST, "too many descriptors for one message");
    let mut part = libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
    // Room for one header and four descriptors, aligned as the header wants it.
    let mut control = [0_u64; 8];
    // SAFETY: an all-zero msghdr is a valid value of the plain C struct.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = size_of_val(fds) as u32;
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: plain arithmetic.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as _;
        // SAFETY: the buffer holds a header and MOST descriptors, so the first header and its data lie within it.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(bytes) as _;
            let data = libc::CMSG_DATA(first).cast::<i32>();
            for (i, fd) in fds.iter().enumerate() {
                data.add(i).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    loop {
        // SAFETY: the header describes memory that outlives the call.
        let sent =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        if sent >= 0 {
            return Ok(());
        }
        if !interrupted() {
            return Err(Error::last_os("sendmsg"));
        }
    }
}

/// What came of waiting for a message.
pub enum Received {
    /// A message of this many bytes is in the buffer.
    Message(usize),
    /// The other side is gone.
    Closed,
    /// Nothing came until the deadline.
    Late,
}

/// Wait for one message. What does not fit the buffer is cut off.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], until: Instant) -> Received {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut entry = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // Rounded up, so that the last millisecond is waited and not spun away.
        let left_ms = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // SAFETY: one entry, which outlives the call.
        let ready = unsafe { libc::poll(&raw mut entry, 1, left_ms) };
        if ready == 0 {
            if left == Duration::ZERO {
                return Received::Late;
            }
            continue;
        }
        // SAFETY: the pointer and length describe the buffer.
        let got =
            unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
        match got {
            0 => return Received::Closed,
            n if n > 0 => return Received::Message(n as usize),
            _ => match std::io::Error::last_os_error().raw_os_error() {
                // ECONNRESET is told once, before what the other side said last.
                Some(libc::EINTR | libc::EAGAIN | libc::ECONNRESET) => {}
                _ => return Received::Closed,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn last_words_are_heard() {
        let (a, b) = message_pair().expect("socketpair");
        send(b.as_fd(), b"why", &[]).expect("send");
        send(a.as_fd(), b"unread", &[]).expect("send");
        drop(b);
        assert!(send(a.as_fd(), b"too late", &[]).is_err());
        let soon = Instant::now() + Duration::from_secs(5);
        let mut buffer = [0; 16];
        assert!(matches!(receive(a.as_fd(), &mut buffer, soon), Received::Message(3)));
        assert!(matches!(receive(a.as_fd(), &mut buffer, soon), Received::Closed));
    }

    #[test]
    fn messages_stay_apart_and_the_end_is_seen() {
        let (a, b) = message_pair().expect("socketpair");
        send(a.as_fd(), b"one", &[]).expect("send");
        send(a.as_fd(), b"three", &[a.as_fd()]).expect("send with a descriptor");
        let soon = Instant::now() + Duration::from_secs(5);
        let mut buffer = [0; 16];
        assert!(matches!(receive(b.as_fd(), &mut buffer, soon), Received::Message(3)));
        assert!(matches!(receive(b.as_fd(), &mut buffer, soon), Received::Message(5)));
        assert!(matches!(receive(b.as_fd(), &mut buffer, Instant::now()), Received::Late));
        drop(a);
        assert!(matches!(receive(b.as_fd(), &mut buffer, soon), Received::Closed));
        assert_eq!(send(b.as_fd(), b"x", &[]).expect_err("nobody is there").errno(), libc::EPIPE);
    }

    #[test]
    fn poking_a_pipe_that_nobody_reads_raises_no_signal() {
        let (reading, writing) = pipe().expect("pipe");
        drop(reading);
        poke(writing.as_fd());
    }
}
