"""What a helper does once it has its function: answer requests until nobody asks any more."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from quire.errors import PageError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

__all__ = ["SLOT_BYTES", "Connection", "answer_text", "die_with", "serve"]

SLOT_BYTES = 4 << 20
"""The most bytes of one request, and the distance of two slots in the shared memory."""

MAX_TEXT_BYTES = 1000

REQUEST = struct.Struct("<QQII")  # id, offset, length, slot
ANSWER = struct.Struct("<QII")  # id, status, length; text follows
DONE, FAILED = 0, 1

_F_SETSIG = 10


class Connection:
    """The socket for messages and the shared memory for bytes. Safe in several threads."""

    def __init__(self, sock: socket.socket, memory: int) -> None:
        """Take over the socket and the descriptor of the memory."""
        self._socket = sock
        self._memory = memory

    def request(self) -> tuple[int, int, int, int] | None:
        """Wait for a request: id, offset, length, slot; None once nobody can ask any more."""
        message = self._socket.recv(REQUEST.size)
        return REQUEST.unpack(message) if len(message) == REQUEST.size else None

    def done(self, number: int, slot: int, data: memoryview) -> None:
        """Hand over the bytes that a request wanted."""
        at, left = slot * SLOT_BYTES, data
        while left:
            written = os.pwrite(self._memory, left, at)
            at, left = at + written, left[written:]
        self._socket.send(ANSWER.pack(number, DONE, len(data)))

    def failed(self, number: int, error: BaseException | str) -> None:
        """Say in one line why there are no bytes."""
        text = error if isinstance(error, str) else answer_text(error)
        encoded = text.encode("utf-8", "replace")[:MAX_TEXT_BYTES]
        self._socket.send(ANSWER.pack(number, FAILED, 0) + encoded)

    def ready(self) -> None:
        """Say that requests are answered from now on."""
        self._socket.send(ANSWER.pack(0, DONE, 0))


def answer_text(error: BaseException) -> str:
    """One line about an exception: its type and message, of a PageError the message alone."""
    try:
        message = " ".join(str(error).split())
    except Exception as second:  # noqa: BLE001 - the user's __str__ may do anything
        message = f"(its message raised {type(second).__name__})"
    if isinstance(error, PageError):
        return message
    name = type(error).__qualname__
    return f"{name}: {message}" if message else name


def die_with(lifeline: int) -> None:
    """Have the kernel kill this process group as soon as the other end of a pipe is closed or written to.

    The kernel does it, so it happens also while code holds the GIL for ever, and whatever killed the asker.
    """
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    if poll.poll(0):  # it happened before
        os._exit(0)


def serve(connection: Connection, fill: Callable[[int, int], Any], parallel: int) -> NoReturn:
    """Answer requests until the connection ends, then end the process.

    Each of the threads takes requests from the socket by itself. One of them is the main thread, so that with
    ``parallel=1`` the function runs where Python code usually does.
    """
    for _ in range(parallel - 1):
        threading.Thread(target=_answer_all, args=(connection, fill), daemon=True).start()
    _answer_all(connection, fill)


def _answer_all(connection: Connection, fill: Callable[[int, int], Any]) -> NoReturn:
    try:
        while request := connection.request():
            _answer(connection, fill, *request)
    except ConnectionError:
        # Nobody is left to hear the answer.
        os._exit(0)
    finally:
        os._exit(0)


def _answer(
    connection: Connection, fill: Callable[[int, int], Any], number: int, offset: int, length: int, slot: int
) -> None:
    try:
        data = fill(offset, length)
        try:
            view = memoryview(data).cast("B")
        except TypeError:
            text = f"it returned {type(data).__name__}, not contiguous bytes"
            connection.failed(number, text)
            return
        if len(view) != length:
            connection.failed(number, f"it returned {len(view)} bytes where {length} were asked for")
            return
        connection.done(number, slot, view)
    except ConnectionError as error:
        # Ours if nobody listens any more, which the next request shows; else the function's.
        connection.failed(number, error)
    except BaseException as error:  # noqa: BLE001 - SystemExit too is an answer
        connection.failed(number, error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
