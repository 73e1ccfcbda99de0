"""One client's connection: frames in, frames out, and the limits that keep it from disturbing others."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
import termios
import time
from collections import deque
from typing import TYPE_CHECKING

from quire.ancillary import ROOM_BYTES, discard, received, rights
from quire.broker.protocol import MAX_OUTSTANDING, WITH_DESCRIPTORS, FrameReader, decode_request, encode
from quire.broker.rates import Rate
from quire.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.broker.protocol import ClientMessage, Message
    from quire.broker.sessions import Session
    from quire.broker.turns import Turns

__all__ = ["Connection", "Limits"]

_READ_BYTES = 1 << 16
_WRITE_BYTES = 1 << 14
_MAX_UNSENT_BYTES = 4 << 20
_MAX_UNREAD_DESCRIPTORS = 128
_RETRY_SECONDS = 0.005
SO_PEERPIDFD = 77


class Limits:
    """What one client may do."""

    def __init__(
        self,
        *,
        rate: float = 20_000.0,
        handles: int = 4096,
        leases: int = 1024,
        names: int = 256,
        connections: int = 256,
        frame_seconds: float = 5.0,
    ) -> None:
        """Set them.

        Args:
            rate: Requests a second; who sends more is read more slowly, not refused.
            handles: That a session may hold.
            leases: That a session may hold.
            names: That a user may have published.
            connections: That a user may have open.
            frame_seconds: For a frame, from its first byte to its last, and for the first one to begin.
        """
        self.rate = rate
        self.handles = handles
        self.leases = leases
        self.names = names
        self.connections = connections
        self.frame_seconds = frame_seconds


class Connection:
    """A connected client. Requests are carried out one after another, in order."""

    def __init__(
        self,
        sock: socket.socket,
        limits: Limits,
        turns: Turns,
        serve: Callable[[Connection, ClientMessage, list[int]], None],
        closed: Callable[[Connection], None],
    ) -> None:
        """Take a socket over and start reading.

        Args:
            sock: Accepted; non-blocking from now on.
            limits: What the client may do.
            turns: Decides when a frame of it is served.
            serve: Is given each message, with descriptors that are its own from then on.
            closed: Is told once, when the connection is gone.

        Raises:
            OSError: The peer has gone already.
        """
        self._sock = sock
        # The loop makes a text of what it does not know; that of a number is short.
        self._number = sock.fileno()
        self._limits = limits
        self._turns = turns
        self._serve = serve
        self._closed_callback = closed
        self._loop = asyncio.get_running_loop()
        self._frames = FrameReader()
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._unsent_bytes = 0
        self._in_flight = 0
        self._rate = Rate(limits.rate)
        # Something can be read, as the loop has said.
        self._come = False
        self._reading = False
        self._writing = False
        self._paused = False
        self._deadline: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._slowed: asyncio.TimerHandle | None = None
        self._held_back = False
        self.closed = False
        self.offended = False
        self.outstanding = 0
        self.why = ""
        self.session: Session | None = None
        sock.setblocking(False)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid, self.uid, _ = struct.unpack("3i", credentials)
        self.pidfd = self._peer_pidfd()
        self._expect()
        self._read_on()

    def _peer_pidfd(self) -> int:
        """A pidfd of the peer; -1 where its process cannot be told from a later one of the same number."""
        try:
            data = self._sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, struct.calcsize("i"))
            return int(struct.unpack("i", data)[0])
        except OSError:
            # Before Linux 6.5: as long as the connection is open the peer most likely lives.
            try:
                return os.pidfd_open(self.pid) if self.pid > 0 else -1
            except OSError:
                return -1

    # Reading

    def _expect(self) -> None:
        """Give the peer its time for a frame."""
        if self._deadline is None:
            self._deadline = self._loop.call_later(
                self._limits.frame_seconds, self.drop, "it did not complete a message in time"
            )

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _read_on(self) -> None:
        if not self._reading and not self.closed and not self._paused:
            self._reading = True
            self._loop.add_reader(self._number, self._readable)

    def _read_no_more(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._number)

    def _readable(self) -> None:
        if self._come or self._turns.waits(self):
            # What has come is served before more is read, and the loop would say again that there is more.
            self._read_no_more()
        self._come = True
        self._turns.arrive(self)

    def _receive(self) -> None:
        """Read what has come: in this connection's turn, as reading takes time too."""
        self._come = False
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(_READ_BYTES, ROOM_BYTES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError as error:
            self.drop(f"recvmsg: {error}")
            return
        self._frames.feed(data, received(ancillary))
        if flags & socket.MSG_CTRUNC:
            self.offend("it sent more descriptors than may come")
        elif not data:
            self.drop("")

    def work(self) -> None:
        """Have the frames that have come served, when it is this connection's turn and its rate allows."""
        if not self.closed and self._slowed is None:
            self._paused = False
            self._turns.join(self)

    def hold_off(self, seconds: float) -> None:
        """Read nothing for a while; for a connection that was just accepted. It has its time from then on."""
        self._expect_nothing()
        self._pause()

        def go_on() -> None:
            if not self.closed:
                self._expect()
                self._paused = False
                self._read_on()

        self._loop.call_later(seconds, go_on)

    def serve(self, until_ns: int) -> bool:
        """Serve frames that have come, as far as the client's limits allow; their replies are sent together.

        Args:
            until_ns: When to stop, on the monotonic clock; one frame is served in any case.

        Returns:
            Whether there may be more that may be served now.
        """
        began = time.thread_time_ns()
        served = 0
        self._held_back = True
        try:
            while more := self._serve_one():
                served += 1
                if time.monotonic_ns() >= until_ns:
                    break
        finally:
            self._held_back = False
            if self._unsent and not self._writing and self._retry is None:
                self._writable()
        wait = self._rate.take(served, time.thread_time_ns() - began)
        if wait > 0 and not self.closed and not self._paused:
            self._pause()
            self._slowed = self._loop.call_later(wait, self._go_on)
            return False
        return more

    def _go_on(self) -> None:
        self._slowed = None
        self.work()

    def _serve_one(self) -> bool:
        """Serve one frame that has come; False if none is left for now."""
        if self.closed or self._paused:
            return False
        try:
            frame = self._frames.take()
            if frame is None and self._come:
                self._receive()
                if self._gone():
                    return False
                frame = self._frames.take()
            if frame is None:
                if self._frames.partial:
                    self._expect()
                self._read_on()
                return False
            payload, descriptors = frame
            if self._deadline is not None:
                self._expect_nothing()
            try:
                message = decode_request(payload)
            except BaseException:
                discard(descriptors)
                raise
            if descriptors and not isinstance(message, WITH_DESCRIPTORS):
                discard(descriptors)
                raise Malformed(f"{type(message).__name__} comes without descriptors")
            self._serve(self, message, descriptors)
        except Malformed as error:
            self.offend(str(error))
            return False
        if self._gone():
            return False
        if self.outstanding >= MAX_OUTSTANDING:
            # Whoever answers calls `work` again.
            self._pause()
            return False
        return True

    def _gone(self) -> bool:
        """Whether serving a message has closed the connection."""
        return self.closed

    def _pause(self) -> None:
        self._paused = True
        self._read_no_more()

    # Writing

    def post(self, message: Message, descriptors: list[int]) -> None:
        """Send a message, now or as soon as the client reads; the descriptors are closed afterwards."""
        self.post_frame(encode(message, len(descriptors)), descriptors)

    def post_frame(self, frame: bytes, descriptors: list[int]) -> None:
        """Send a frame that is encoded already."""
        if self.closed:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        self._unsent.append((memoryview(frame), descriptors))
        self._unsent_bytes += len(frame)
        if self._unsent_bytes > _MAX_UNSENT_BYTES:
            self.drop("it does not read what it is sent")
        elif len(self._unsent) == 1 and not self._held_back:
            self._writable()

    def _join(self) -> None:
        """Make one of the frames at the head that have no descriptors: they are sent with one call."""
        count, size = 0, 0
        for rest, descriptors in self._unsent:
            if descriptors or size > _WRITE_BYTES:
                break
            count += 1
            size += len(rest)
        if count > 1:
            whole = b"".join([self._unsent.popleft()[0] for _ in range(count)])
            self._unsent.appendleft((memoryview(whole), []))

    def _writable(self) -> None:
        while self._unsent:
            if len(self._unsent) > 1:
                self._join()
            rest, descriptors = self._unsent[0]
            if descriptors and not self._may_fly(len(descriptors)):
                self._try_later()
                return
            try:
                if descriptors:
                    sent = self._sock.sendmsg([rest], rights(descriptors), socket.MSG_NOSIGNAL)
                else:
                    sent = self._sock.send(rest, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._write_on()
                return
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    self._try_later()
                    return
                self.drop(f"sendmsg: {error}" if error.errno not in (errno.EPIPE, errno.ECONNRESET) else "")
                return
            self._in_flight += len(descriptors)
            self._unsent_bytes -= sent
            for descriptor in descriptors:
                os.close(descriptor)
            if sent == len(rest):
                self._unsent.popleft()
            else:
                self._unsent[0] = rest[sent:], []
        self._write_no_more()

    def _write_on(self) -> None:
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._number, self._writable)

    def _write_no_more(self) -> None:
        # The loop takes long to find that there is nothing to remove, and most replies are sent at once.
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._number)

    def _may_fly(self, count: int) -> bool:
        """Whether so many descriptors more may wait in the client's queue.

        The kernel counts what waits there against the broker's user, so a client that does not read must not
        use that up.
        """
        if self._in_flight and self._in_flight + count > _MAX_UNREAD_DESCRIPTORS:
            (unread,) = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, b"\0\0\0\0"))
            if unread:
                return False
            self._in_flight = 0
        return True

    def _try_later(self) -> None:
        self._write_no_more()
        if self._retry is None:
            self._retry = self._loop.call_later(_RETRY_SECONDS, self._retry_now)

    def _retry_now(self) -> None:
        self._retry = None
        if not self.closed:
            self._writable()

    # The end

    def offend(self, why: str) -> None:
        """Close the connection of somebody who does not keep to the protocol."""
        self.offended = True
        self.drop(why)

    def drop(self, why: str) -> None:
        """Close the connection; ``why`` is empty where the client closed it."""
        if self.closed:
            return
        self.closed = True
        self.why = why
        self._expect_nothing()
        for timer in (self._retry, self._slowed):
            if timer is not None:
                timer.cancel()
        self._read_no_more()
        self._write_no_more()
        self._sock.close()
        discard(list(self._frames.descriptors))
        self._frames.descriptors.clear()
        for _, descriptors in self._unsent:
            for descriptor in descriptors:
                os.close(descriptor)
        self._unsent.clear()
        self._closed_callback(self)
