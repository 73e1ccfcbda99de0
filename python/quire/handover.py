"""Pickling of objects that are descriptors, through every channel of multiprocessing.

A pickle carries no descriptor, so it carries a way to fetch them, and what is fetched is the message of
``docs/formats.md`` that a socket would carry. There are two ways:

* An object that is pickled while a process is launched (its arguments, under spawn and forkserver) goes as
  one end of a socket pair with the message queued in it; the new process inherits it.
* Any other is left at this process's *counter*, a listening socket that exists while something waits there.
  The pickle names it and holds a random token; whoever shows the token is given the message. What waits
  costs no descriptor, so thousands of pickles may be on their way.

A pickle can be loaded once, by a process of the same user, while the process that made it runs. A child
process that ends lingers until what it left was fetched, for 10 seconds at most.

multiprocessing is imported when something is pickled, not before.
"""

# multiprocessing and logging are imported when something is pickled or goes wrong.
# ruff: noqa: PLC0415

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import sys
import termios
import threading
import time
from typing import TYPE_CHECKING

from quire import transport
from quire.errors import Malformed, QuireError, Stalled

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess
    from typing import Any

    Send = Callable[[socket.socket], None]

__all__ = ["Tickets", "check_pickler", "collect", "offer"]

_TIMEOUT = 10.0
_LINGER = 10.0
_GLANCE_MS = 500
_BACKLOG = 1024
_TOKEN_BYTES = 16


def check_pickler(what: str, instead: str) -> None:
    """Refuse a plain ``pickle.dumps``, whose result nobody could be sure to load.

    The picklers that hand objects to another process live in modules called ``reduction``
    (``multiprocessing.reduction`` and those that follow it); one of their functions is then on the stack.

    Args:
        what: The kind of object, for the message.
        instead: What to do instead, for the message.

    Raises:
        TypeError: No such pickler is at work.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).endswith(".reduction"):
            return
        frame = frame.f_back  # type: ignore[assignment]
    raise TypeError(f"a {what} can be pickled only on its way through multiprocessing; {instead}")


class Tickets:
    """Socket ends that processes being launched inherit, kept open until they were read."""

    __slots__ = ("_descriptors",)

    def __init__(self) -> None:
        """Start with none."""
        self._descriptors: list[int] = []

    def write(self, send: Send) -> int:
        """Queue one message; return the end to inherit, which stays owned by this object."""
        self._sweep()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            send(ours)
            descriptor = theirs.detach()
        self._descriptors.append(descriptor)
        return descriptor

    def _sweep(self) -> None:
        """Close the ends that were read."""
        unread = []
        for descriptor in self._descriptors:
            (queued_bytes,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0\0\0\0"))
            if queued_bytes:
                unread.append(descriptor)
            else:
                os.close(descriptor)
        self._descriptors = unread

    def close(self) -> None:
        """Close every end; a process that was launched has its own copies."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    __del__ = close


class _Counter:
    """Where pickled objects wait to be fetched."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._reset()

    def _reset(self) -> None:
        """Start empty; in a forked child nothing waits, and the listener is the parent's."""
        self._lock = threading.Lock()
        self._waiting: dict[bytes, Send] = {}
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def leave(self, send: Send) -> tuple[bytes, bytes]:
        """Leave a message to be fetched; return the address and the token."""
        token = os.urandom(_TOKEN_BYTES)
        with self._lock:
            if self._listener is None:
                self._listener = self._open()
            self._waiting[token] = send
            address: bytes = self._listener.getsockname()
        return address, token

    def _open(self) -> socket.socket:
        """Listen on a name of no file system, so nothing is left behind by a process that is killed."""
        from multiprocessing import parent_process

        # The end of a process waits for threads that are no daemons. A child's is none, so what it left can
        # be fetched; the one at the top has nobody who would fetch after its end.
        parent = parent_process()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(True)
            listener.bind(b"\0quire-" + os.urandom(16).hex().encode())
            listener.listen(_BACKLOG)
            threading.Thread(
                target=self._serve, args=(listener, parent), name="quire-counter", daemon=parent is None
            ).start()
        except BaseException:
            listener.close()
            raise
        return listener

    def _serve(self, listener: socket.socket, parent: BaseProcess | None) -> None:
        """Serve until nothing waits any more; once this process is ending, for 10 seconds at most."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        end = None
        while True:
            if poller.poll(None if parent is None else _GLANCE_MS):
                self._accept(listener)
            if parent is not None and end is None and not threading.main_thread().is_alive():
                end = time.monotonic() + _LINGER
            with self._lock:
                if (
                    end is not None
                    and parent is not None
                    and (time.monotonic() > end or not parent.is_alive())
                ):
                    self._waiting.clear()
                if not self._waiting:
                    self._listener = None
                    listener.close()
                    return

    def _accept(self, listener: socket.socket) -> None:
        """Serve one process."""
        try:
            connection, _ = listener.accept()
            with connection:
                self._serve_one(connection)
        except (OSError, EOFError, QuireError):
            # The one who asked sees the connection close; the others are served on.
            import logging

            logging.getLogger("quire").warning("a pickled object could not be handed over", exc_info=True)
            time.sleep(0.01)

    def _serve_one(self, connection: socket.socket) -> None:
        """Give one process what its token stands for."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, user, _ = struct.unpack("3i", credentials)
        if user not in (os.getuid(), 0):
            return
        connection.settimeout(_TIMEOUT)
        token = b""
        while len(token) < _TOKEN_BYTES:
            more = connection.recv(_TOKEN_BYTES - len(token))
            if not more:
                return
            token += more
        with self._lock:
            send = self._waiting.pop(token, None)
        if send is not None:
            send(connection)


_counter = _Counter()
os.register_at_fork(after_in_child=_counter._reset)


def offer(send: Send, tickets: Tickets) -> tuple[Any, ...]:
    """Make a message fetchable from another process.

    Args:
        send: Writes the message, with its descriptors, to a socket; called once, perhaps from another thread.
        tickets: Owned by the object that is pickled.

    Returns:
        What ``collect`` takes; made of things that multiprocessing pickles.

    Raises:
        OSError: The kernel refused.
    """
    from multiprocessing import context, reduction

    if context.get_spawning_popen() is not None:
        return (reduction.DupFd(tickets.write(send)),)
    return _counter.leave(send)


def collect(*where: Any) -> transport.Message:
    """Fetch the message that ``offer`` left.

    Blocks until it came, for 10 seconds at most.

    Returns:
        The message; it owns its descriptors.

    Raises:
        Malformed: The pickle was loaded before.
        ConnectionRefusedError: The process that pickled the object has ended.
        Stalled: That process does not answer.
    """
    if len(where) == 1:
        with socket.socket(fileno=where[0].detach()) as inherited:
            return transport.receive(inherited, _TIMEOUT)
    address, token = where
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(True)
        # A full queue of connections makes a non-blocking connect fail at once; this one waits.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_TIMEOUT), 0))
        try:
            sock.connect(address)
            sock.sendall(token)
            sock.settimeout(_TIMEOUT)
            return transport.receive(sock, _TIMEOUT)
        except ConnectionRefusedError as error:
            raise ConnectionRefusedError(
                error.errno, "connect: the process that pickled this object has ended, and the object with it"
            ) from error
        except (EOFError, BrokenPipeError) as error:
            raise Malformed(
                "this pickle was loaded before, or its maker ended: it can be loaded once"
            ) from error
        except (BlockingIOError, TimeoutError) as error:
            raise Stalled(
                f"the process that pickled this object did not answer within {_TIMEOUT} s"
            ) from error
