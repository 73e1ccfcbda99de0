"""Snapshots and mirrors over Unix sockets, between processes that need not trust each other."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from quire import messages, transport
from quire.closing import Closing
from quire.errors import Malformed
from quire.live import Mirror
from quire.snapshot import Snapshot

if TYPE_CHECKING:
    import socket
    from collections.abc import Container, Mapping

    from quire import _native

__all__ = ["Channel", "recv", "send"]

DEFAULT_TIMEOUT = 10.0


def send(sock: socket.socket, obj: Snapshot | Mirror, *, timeout: float | None = DEFAULT_TIMEOUT) -> None:
    """Send a snapshot or a mirror: descriptors and a few bytes, whatever the size.

    Blocks until the kernel took the message, for at most ``timeout`` seconds. A non-blocking socket raises
    BlockingIOError if nothing can be sent at once; what was begun is completed. The mode of the socket is
    left as it is.

    Args:
        sock: A Unix stream socket.
        obj: What to send; it stays open and the caller's.
        timeout: In seconds, for the whole message; None is no limit.

    Raises:
        TypeError: The object is neither, or ``sock`` is no socket.
        ValueError: It is closed, the socket is no Unix stream socket, or the mirror is of System V memory.
        NotImmutable: A layer of the snapshot is a file; every receiver would refuse it.
        Stalled: The peer did not take the message in time. Close the socket.
        OSError: The kernel refused, BrokenPipeError when the peer is gone; where a limit is the cause, the
            message says which to raise.
    """
    transport.check_socket(sock)
    transport.check_timeout(timeout)
    _send(sock, obj, (), timeout, None)


def _send(
    sock: socket.socket,
    obj: Snapshot | Mirror,
    known: Container[bytes],
    timeout: float | None,
    progress: transport.Progress | None,
) -> None:
    if isinstance(obj, Snapshot):
        transport.send_snapshot(sock, obj._core, known, timeout, progress)
    elif isinstance(obj, Mirror):
        obj._send(sock, timeout, progress)
    else:
        raise TypeError(f"a Snapshot or a Mirror can be sent, not {type(obj).__name__}")


def recv(sock: socket.socket, *, timeout: float | None = DEFAULT_TIMEOUT) -> Snapshot | Mirror:
    """Receive a snapshot or a mirror, verified.

    Blocks until a message begins, as long as the socket's own timeout says (``sock.settimeout``), and then
    for at most ``timeout`` seconds until it has ended. Nothing beyond the message is read.

    Args:
        sock: A Unix stream socket.
        timeout: In seconds, from the first byte of the message to the last; None is no limit.

    Returns:
        An object that holds the descriptors that came.

    Raises:
        EOFError: The peer closed the connection before a message began.
        TimeoutError, BlockingIOError: No message began, as the socket's own timeout says.
        Malformed: The message, a layer or the page table does not follow the formats, or the peer closed the
            connection in the middle. Close the socket.
        NotImmutable: A descriptor can still change, or is none of shared memory. Close the socket.
        Stalled: The peer stopped in the middle of the message. Close the socket.
        ValueError: The socket is no Unix stream socket.

    Whatever is raised, no descriptor that came stays open.
    """
    transport.check_socket(sock)
    transport.check_timeout(timeout)
    return _receive(sock, {}, timeout, None)


def _receive(
    sock: socket.socket,
    known: Mapping[bytes, int],
    timeout: float | None,
    progress: transport.Progress | None,
) -> Snapshot | Mirror:
    with transport.receive(sock, timeout, progress) as message:
        if message.kind == messages.MIRROR:
            descriptor, size = transport.assemble_mirror(message)
            return Mirror._wrap(descriptor, -1, size)
        return Snapshot._wrap(transport.assemble_snapshot(message, known))


class Channel(Closing):
    """A connection that remembers what the peer already has.

    Each snapshot that is sent costs only the layers that the one sent before did not have. For that the
    receiving side keeps the last snapshot's layers until the next one comes or the channel is closed. Both
    ends must be Channels. One thread may send while another receives; threads that do the same take turns.

    Attributes:
        timeout: In seconds, for each message from its first byte to its last; None is no limit.
    """

    def __init__(self, sock: socket.socket, *, timeout: float | None = DEFAULT_TIMEOUT) -> None:
        """Take over a connected Unix stream socket.

        Args:
            sock: Belongs to the channel from now on; ``close`` closes it.
            timeout: In seconds, for each message from its first byte to its last; None is no limit.

        Raises:
            TypeError: It is not a socket.
            ValueError: It is not a Unix stream socket, or the timeout is not positive.
        """
        transport.check_socket(sock)
        transport.check_timeout(timeout)
        self._sock = sock
        self.timeout = timeout
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self._sent: frozenset[bytes] = frozenset()
        self._received: _native.Snapshot | None = None
        self._send_failure = ""
        self._recv_failure = ""

    def send(self, obj: Snapshot | Mirror) -> None:
        """Send a snapshot or a mirror. Blocks and raises as ``quire.send`` does.

        After a message that was begun and not finished, every further call raises Malformed.
        """
        progress = transport.Progress()
        with self._sending:
            self._check(self._send_failure)
            try:
                _send(self._sock, obj, self._sent, self.timeout, progress)
            except BaseException as error:
                if progress.begun:
                    self._send_failure = repr(error)
                raise
            if isinstance(obj, Snapshot):
                self._sent = frozenset(obj._core.layer_ids())

    def recv(self) -> Snapshot | Mirror:
        """Receive a snapshot or a mirror, verified. Blocks and raises as ``quire.recv`` does.

        After a message that was begun and then failed, every further call raises Malformed: the two sides may
        disagree about what was received.
        """
        progress = transport.Progress()
        with self._receiving:
            self._check(self._recv_failure)
            held = self._received
            known = {} if held is None else dict(zip(held.layer_ids(), held.layer_fds(), strict=True))
            try:
                obj = _receive(self._sock, known, self.timeout, progress)
            except BaseException as error:
                if progress.begun:
                    self._recv_failure = repr(error)
                raise
            if isinstance(obj, Snapshot):
                self._received = obj._lend()
            return obj

    @staticmethod
    def _check(failure: str) -> None:
        if failure:
            raise Malformed(f"an earlier message failed ({failure}); close the channel")

    def close(self) -> None:
        """Close the socket and forget what the peer has. Idempotent; what was received stays good.

        It does not wake a thread that is inside ``recv``; shut the socket down for that.
        """
        self._sock.close()
        self._sent = frozenset()
        self._received = None

    @property
    def closed(self) -> bool:
        """Whether the socket is closed."""
        return self._sock.fileno() < 0
