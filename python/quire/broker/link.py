"""A client's connection to the broker: a thread that reads, and comes back when the broker was restarted."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeAlias

from quire.ancillary import ROOM_BYTES, received, rights
from quire.broker import protocol
from quire.errors import ForkedError, Malformed, NotImmutable, QuotaExceeded, Revoked, Stalled, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Finish: TypeAlias = Callable[[Any, list[int]], Any]

__all__ = ["Link"]

_log = logging.getLogger("quire.client")
_RETRY_SECONDS = 0.02
_WITHOUT_WAITING = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)


def exception_of(fault: protocol.Fault) -> Exception:
    """Make the exception that a fault stands for."""
    kinds: dict[str, type[Exception]] = {
        "quota": QuotaExceeded,
        "notimmutable": NotImmutable,
        "malformed": Malformed,
        "revoked": Revoked,
        "unsupported": Unsupported,
        "unknown": LookupError,
        "denied": PermissionError,
        "invalid": ValueError,
    }
    if fault.fault == "exists":
        return FileExistsError(errno.EEXIST, fault.message)
    if fault.fault == "kernel":
        return OSError(fault.errno, f"the broker: {fault.message}")
    return kinds.get(fault.fault, RuntimeError)(fault.message)


def only_reply(reply: protocol.Reply, descriptors: list[int]) -> protocol.Reply:
    """Finish a request whose reply brings no descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
    return reply


class _Asked:
    """A request without its reply. Whoever reads settles it."""

    __slots__ = ("descriptors", "finish", "frame", "future", "reply")

    def __init__(self, frame: bytes, descriptors: list[int], finish: Finish) -> None:
        self.frame = frame
        self.descriptors = descriptors
        self.finish = finish
        self.reply: protocol.Reply | None = None
        # None as long as the one who asked reads himself.
        self.future: Future[Any] | None = None

    def promise(self) -> Future[Any]:
        """Let somebody else settle it."""
        self.future = Future()
        # A request that was sent cannot be cancelled.
        self.future.set_running_or_notify_cancel()
        return self.future

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    def settle(self, reply: protocol.Reply, descriptors: list[int]) -> None:
        """Make the result; the descriptors belong to what finishes."""
        self.close()
        if self.future is None or self.future.done():
            # It is done already where a signal handler came between, so that it was asked again.
            self.reply = only_reply(reply, descriptors)
        elif isinstance(reply, protocol.Fault):
            self.future.set_exception(exception_of(reply))
        else:
            try:
                result = self.finish(reply, descriptors)
            except Exception as error:  # noqa: BLE001 - given to whoever asked
                self.future.set_exception(error)
            else:
                self.future.set_result(result)


class Link:
    """Sends requests from any thread; replies are futures, events go to a callback in the link's thread."""

    def __init__(
        self, path: str, timeout: float, on_event: Callable[[protocol.Message, list[int]], None]
    ) -> None:
        """Connect and begin a session; blocks until the broker has answered.

        Args:
            path: Where the broker listens.
            timeout: In seconds: for the first answer, and for coming back when the connection has broken.
            on_event: Is given every event, with descriptors that are its own from then on.

        Raises:
            OSError: Nobody listens there.
            Stalled: The broker does not answer.
            QuireError: It refuses.
        """
        self._path = path
        self._timeout = timeout
        self._on_event = on_event
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # Fewer requests are without their reply, or the connection has ended.
        self._changed = threading.Condition(self._lock)
        self._asked: dict[int, _Asked] = {}
        self._last = 0
        self._token = b""
        self._closing = threading.Event()
        self.failure: Exception | None = None
        self._sock, self.welcome = self._connect_first()
        self._token = self.welcome.session
        # Whoever reads holds the lock. The thread waits for the socket, unless somebody else reads.
        self._reading = threading.Lock()
        self._ready = select.epoll()
        self._poller = select.poll()
        self._watch()
        self._frames = protocol.FrameReader()
        # Frames that were read by somebody else and are the thread's to take.
        self._left: deque[tuple[bytearray, list[int]]] = deque()
        self._thread = threading.Thread(target=self._run, name="quire-client", daemon=True)
        self._thread.start()

    def _connect_first(self) -> tuple[socket.socket, protocol.Welcome]:
        """Connect, again where the broker is restarted at this moment."""
        end = time.monotonic() + self._timeout
        while True:
            try:
                return self._connect()
            except (ConnectionResetError, BrokenPipeError):
                if time.monotonic() > end:
                    raise

    def _connect(self) -> tuple[socket.socket, protocol.Welcome]:
        """Connect and say Hello."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(self._timeout)
            try:
                sock.connect(self._path)
                hello = protocol.Hello(0, protocol.VERSION, self._token)
                sock.sendall(protocol.encode(hello))
                frames = protocol.FrameReader()
                replies: list[tuple[bytearray, list[int]]] = []
                while not replies:
                    # Byte for byte, so that nothing of what follows is taken: the header, then the rest.
                    more = frames.missing_bytes
                    data = sock.recv(more)
                    if not data:
                        raise ConnectionResetError(errno.ECONNRESET, "the broker closed the connection")
                    frames.feed(data, [])
                    replies = list(frames.frames())
            except TimeoutError as error:
                raise Stalled(
                    f"the broker at {self._path} did not answer within {self._timeout} s"
                ) from error
            reply = protocol.decode_reply(replies[0][0])
            if isinstance(reply, protocol.Fault):
                raise exception_of(reply)
            if not isinstance(reply, protocol.Welcome):
                raise Malformed(f"the broker answered {type(reply).__name__} to Hello")
            sock.settimeout(None)
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", max(1, int(self._timeout)), 0)
            )
        except BaseException:
            sock.close()
            raise
        return sock, reply

    # Sending

    def submit(
        self,
        kind: type[protocol.Request],
        fields: Mapping[str, object],
        descriptors: Sequence[int] = (),
        finish: Finish | None = None,
    ) -> Future[Any]:
        """Send a request; blocks only while as many as may be are without their reply.

        Args:
            kind: The type of the request.
            fields: All of it but the id.
            descriptors: Go with it; borrowed for the call.
            finish: Makes the result out of the reply and the descriptors that came with it, which it owns. It
                runs in the link's thread, before any event that the broker sent later is looked at.

        Returns:
            What ``finish`` returned; without it, the reply.

        Raises:
            ForkedError: This process was forked from the one that connected.
            Revoked: The connection has ended for good.
        """
        self._check_caller()
        with self._lock:
            while not self.has_room and self.failure is None:
                self._changed.wait()
            asked = self._ask(kind, fields, descriptors, finish or only_reply)
            future = asked.promise()
            self._send(asked.frame, asked.descriptors)
        return future

    def ask(
        self,
        kind: type[protocol.Request],
        fields: Mapping[str, object],
        descriptors: Sequence[int] = (),
        finish: Finish | None = None,
    ) -> Any:
        """Send a request and wait for its result.

        Arguments and errors are those of `submit`; besides, it raises what the broker answered.

        Unless somebody reads already, the one who waits reads: to wake the thread, and that this one, takes
        longer than the broker does. The thread does not notice, as its epoll does not watch the socket
        meanwhile. Events, and replies that are to be finished, are left to it with all that comes behind.
        """
        if finish is not None or not self.has_room or not self._reading.acquire(blocking=False):
            return self.submit(kind, fields, descriptors, finish).result()
        try:
            self._check_caller()
            with self._lock:
                asked = self._ask(kind, fields, descriptors, only_reply)
            # Before it sends: the broker may answer before this thread runs again.
            self._ready.unregister(self._sock)
            try:
                with self._lock:
                    self._send(asked.frame, asked.descriptors)
                self._read_for(asked)
            finally:
                # A socket is writable, so the thread wakes up if there is something for it.
                left = select.EPOLLOUT if self._left else 0
                self._ready.register(self._sock, select.EPOLLIN | left)
            reply = asked.reply
            future = asked.promise() if reply is None else None
        finally:
            self._reading.release()
        if future is not None:
            return future.result()
        if isinstance(reply, protocol.Fault):
            raise exception_of(reply)
        return reply

    def tell(self, kind: type[protocol.Request], fields: Mapping[str, object]) -> None:
        """Send a request whose reply nobody waits for; the thread may do that too, when it cannot finish one.

        It does not wait for room: others leave one place free.
        """
        with self._lock:
            if self.failure is None:
                asked = self._ask(kind, fields, (), only_reply)
                self._send(asked.frame, asked.descriptors)

    def _check_caller(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError("a connection to the broker belongs to the process that made it: connect again")
        if threading.get_ident() == self._thread.ident:
            raise RuntimeError("a callback runs in the thread that reads the replies: it cannot ask for one")

    def _ask(
        self,
        kind: type[protocol.Request],
        fields: Mapping[str, object],
        descriptors: Sequence[int],
        finish: Finish,
    ) -> _Asked:
        """Enter a request, with the lock held."""
        if self.failure is not None:
            raise Revoked(f"the connection to the broker has ended: {self.failure}") from self.failure
        self._last = self._last % (2**32 - 1) + 1
        frame = protocol.encode(kind(id=self._last, **fields), len(descriptors))
        asked = _Asked(frame, [os.dup(descriptor) for descriptor in descriptors], finish)
        self._asked[self._last] = asked
        return asked

    def _answered(self, number: int) -> _Asked | None:
        """Take a request out whose reply has come."""
        with self._lock:
            asked = self._asked.pop(number, None)
            self._changed.notify()
        return asked

    @property
    def has_room(self) -> bool:
        """Whether `submit` would most likely not block."""
        return len(self._asked) < protocol.MAX_OUTSTANDING - 1

    def acknowledge(self, serial: int, done: bool = True) -> None:
        """Answer an event."""
        with self._lock:
            if self.failure is None:
                self._send(protocol.encode(protocol.Acknowledge(serial, done)), [])

    def _send(self, frame: bytes, descriptors: list[int]) -> None:
        """Send with the lock held. What cannot be sent is sent again by the thread when it has come back."""
        rest = memoryview(frame)
        ancillary = rights(descriptors)
        try:
            while rest:
                sent = self._sock.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL)
                rest, ancillary = rest[sent:], []
        except OSError:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    # The thread

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._read()
            except (OSError, Malformed) as error:
                if not self._come_back(error):
                    return

    def _read(self) -> None:
        """Take what comes until the connection breaks.

        Raises:
            OSError: It broke.
            Malformed: The broker sent what is no message.
        """
        while True:
            self._ready.poll()
            with self._reading:
                if self._left:
                    self._ready.modify(self._sock, select.EPOLLIN)
                while self._left:
                    self._take(*self._left.popleft())
                    self._take_all()
                # Where there is nothing, somebody who waited for a reply has read it.
                with contextlib.suppress(BlockingIOError):
                    self._receive()
                    self._take_all()

    def _take_all(self) -> None:
        while (frame := self._frames.take()) is not None:
            self._take(*frame)

    def _receive(self) -> None:
        """Read what is there.

        Raises:
            BlockingIOError: Nothing is.
            OSError: The connection broke.
        """
        data, ancillary, _, _ = self._sock.recvmsg(1 << 16, ROOM_BYTES, _WITHOUT_WAITING)
        self._frames.feed(data, received(ancillary))
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the broker closed the connection")

    def _read_for(self, asked: _Asked) -> None:
        """Read in place of the thread until a reply has come, or something that is the thread's."""
        while asked.reply is None and not self._left:
            # A signal handler may raise here.
            self._poller.poll()
            try:
                self._receive()
                while not self._left and (frame := self._frames.take()) is not None:
                    self._take_plain(*frame)
            except (OSError, Malformed):
                # The thread will find the same, and come back.
                return
            except BaseException:
                # A signal handler raised: what was read may be lost, so the thread begins anew.
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
                raise

    def _take_plain(self, payload: bytearray, descriptors: list[int]) -> None:
        """Take a reply that needs no finishing; leave anything else to the thread."""
        try:
            message = protocol.decode_reply(payload)
        except Malformed:
            # The thread raises it again.
            message = None
        if isinstance(message, protocol.Reply) and not descriptors:
            asked = self._asked.get(message.id)
            if asked is not None and asked.finish is only_reply:
                # First of all: a signal handler may raise at any time, and what is entered is asked again.
                asked.settle(message, descriptors)
                self._answered(message.id)
                return
        self._left.append((payload, descriptors))

    def _take(self, payload: bytearray, descriptors: list[int]) -> None:
        try:
            message = protocol.decode_reply(payload)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        if not isinstance(message, protocol.Reply):
            try:
                self._on_event(message, descriptors)
            except Exception:  # noqa: BLE001 - the thread must go on
                _log.exception("an event of the broker could not be handled: %r", message)
            return
        asked = self._answered(message.id)
        if asked is None:
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            asked.settle(message, descriptors)

    def _come_back(self, cause: Exception) -> bool:
        """Connect again and ask again what has no reply; False if that is not to be."""
        end = time.monotonic() + self._timeout
        with self._reading, self._lock:
            self._sock.close()
            self._drop_frames()
            while not self._closing.is_set():
                try:
                    sock, welcome = self._connect()
                except (OSError, Stalled, Malformed, QuotaExceeded) as error:
                    # Nothing tells when somebody listens again, so it is tried now and then.
                    if time.monotonic() > end or self._closing.wait(_RETRY_SECONDS):
                        self._fail(error)
                        return False
                    continue
                if not welcome.resumed:
                    sock.close()
                    self._fail(cause)
                    return False
                self._sock = sock
                self._watch()
                for number in sorted(self._asked, key=lambda number: (number - self._last) % 2**32):
                    self._send(self._asked[number].frame, self._asked[number].descriptors)
                return True
            self._fail(cause)
            return False

    def _watch(self) -> None:
        """Have a new connection watched. The kernel forgets the one before when it is closed."""
        self._ready.register(self._sock, select.EPOLLIN)
        self._poller = select.poll()
        self._poller.register(self._sock, select.POLLIN)

    def _drop_frames(self) -> None:
        """Forget what was read of a connection that has broken."""
        for descriptors in (self._frames.descriptors, *(own for _, own in self._left)):
            for descriptor in descriptors:
                os.close(descriptor)
        self._left.clear()
        self._frames = protocol.FrameReader()

    def _fail(self, cause: Exception) -> None:
        """End for good, with the lock held."""
        self.failure = cause
        for asked in self._asked.values():
            asked.close()
            if asked.future is not None and not asked.future.done():
                asked.future.set_exception(Revoked(f"the connection to the broker has ended: {cause}"))
        self._asked.clear()
        self._changed.notify_all()

    def _said_bye(self, _reply: protocol.Reply, _descriptors: list[int]) -> None:
        self._closing.set()

    def close(self) -> None:
        """End the connection and wait for the thread. Idempotent."""
        if os.getpid() != self._pid:
            self._sock.close()
            self._ready.close()
            return
        if not self._closing.is_set() and threading.current_thread() is not self._thread:
            # The thread must know before it sees the broker close the connection.
            with contextlib.suppress(Revoked, TimeoutError):
                self.submit(protocol.Bye, {}, (), self._said_bye).result(self._timeout)
        self._closing.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join(self._timeout)
        with self._reading:
            self._sock.close()
            self._ready.close()
