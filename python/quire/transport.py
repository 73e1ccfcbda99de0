"""Messages over a Unix stream socket: deadlines, and descriptors that never leak.

The mode of the socket is never changed: every call passes MSG_DONTWAIT and waiting is done with ``poll``.
"""

from __future__ import annotations

import array
import errno
import fcntl
import math
import os
import select
import socket
import time
from typing import TYPE_CHECKING, NoReturn

from quire import _native, messages
from quire.ancillary import discard, is_shared_memory, rights
from quire.errors import Malformed, NotImmutable, Stalled

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

__all__ = [
    "Message",
    "Progress",
    "assemble_mirror",
    "assemble_snapshot",
    "check_sealed",
    "check_socket",
    "check_timeout",
    "receive",
    "send_mirror",
    "send_snapshot",
]

# The kernel attaches at most 253 descriptors (SCM_MAX_FD) to one message, so this much room is never too
# little for them; the rest is for credentials, a pidfd and a security label that the socket's owner may have
# asked for.
_SCM_MAX_FD = 253
_SCM_PIDFD = 4
_INT_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = (
    socket.CMSG_SPACE(_SCM_MAX_FD * _INT_BYTES)
    + socket.CMSG_SPACE(3 * _INT_BYTES)
    + socket.CMSG_SPACE(_INT_BYTES)
    + socket.CMSG_SPACE(256)
)

_DISCARD_PATIENCE = 0.5

# poll() takes no more than 2**31 - 1; a timeout may be longer, or infinite.
_LONGEST_POLL_MS = 1e9

_HINTS = {
    errno.ETOOMANYREFS: "too many descriptors of this user are on their way through sockets: "
    "let the peers read what was sent, or raise RLIMIT_NOFILE (ulimit -n)",
    errno.EMFILE: "this process has too many open descriptors: "
    "close snapshots or raise RLIMIT_NOFILE (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: raise fs.file-max",
}


class Message:
    """One received message; it owns its descriptors until they are taken."""

    __slots__ = ("descriptors", "kind", "payload")

    def __init__(self) -> None:
        """Start empty; ``receive`` fills it."""
        self.kind = 0
        self.payload = b""
        self.descriptors: list[int] = []

    def take_descriptors(self) -> list[int]:
        """Hand the descriptors over to the caller."""
        taken, self.descriptors = self.descriptors, []
        return taken

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        discard(self.take_descriptors(), _DISCARD_PATIENCE)

    def __enter__(self) -> Self:
        """Return the message itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the descriptors that nobody took."""
        self.close()


class Progress:
    """Tells whether a message was begun, which matters when it then fails."""

    __slots__ = ("begun",)

    def __init__(self) -> None:
        """Start with nothing sent or received."""
        self.begun = False


class _Deadline:
    """A moment on the monotonic clock, or none."""

    __slots__ = ("_end", "_timeout")

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._end = None if timeout is None else time.monotonic() + timeout

    def wait(self, sock: socket.socket, event: int) -> bool:
        """Wait until the socket is ready; False when the moment has come first."""
        poller = select.poll()
        poller.register(_number(sock), event)
        if self._end is None:
            return bool(poller.poll())
        while True:
            left_ms = max(0.0, (self._end - time.monotonic()) * 1000)
            if poller.poll(math.ceil(min(left_ms, _LONGEST_POLL_MS))):
                return True
            if left_ms <= _LONGEST_POLL_MS:
                return False

    def stalled(self, what: str, done: int) -> NoReturn:
        """Raise Stalled."""
        raise Stalled(f"the peer {what} {done} bytes of a message within {self._timeout} s; close the socket")


def _number(sock: socket.socket) -> int:
    """The descriptor of a socket that is open."""
    number = sock.fileno()
    if number < 0:
        raise ValueError("the socket is closed")
    return number


def check_socket(sock: socket.socket) -> None:
    """Refuse what cannot carry descriptors in order.

    Raises:
        TypeError: It is not a socket.
        ValueError: It is not a Unix stream socket.
    """
    if not isinstance(sock, socket.socket):
        raise TypeError(f"a socket is needed, not {type(sock).__name__}")
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"a Unix stream socket is needed, not {sock.family.name} {sock.type.name}")


def check_timeout(timeout: float | None) -> None:
    """Refuse a timeout that is not None or a positive number of seconds.

    Raises:
        ValueError: It is not.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout {timeout} is not a positive number of seconds; None means no limit")


def receive(sock: socket.socket, timeout: float | None, progress: Progress | None = None) -> Message:
    """Read exactly one message.

    Blocks until a message begins, for as long as the socket's own timeout says, then until it ends, for
    at most ``timeout`` seconds.

    Returns:
        The message; it owns the descriptors that came, as many as its header announces.

    Raises:
        EOFError: The peer closed the connection where a message could have begun.
        TimeoutError, BlockingIOError: The socket has a timeout, or is non-blocking, and no message began.
        Malformed: The message does not follow the format, or the connection closed in the middle.
        Stalled: The message took longer than ``timeout``.
    """
    message = Message()
    progress = progress or Progress()
    try:
        data = _first_bytes(sock, message, progress)
        deadline = _Deadline(timeout)
        data = _read_until(sock, data, messages.HEADER_BYTES, message, deadline)
        header = messages.decode_header(data)
        total = messages.HEADER_BYTES + header.payload_bytes
        data = _read_until(sock, data, total, message, deadline)
        if len(message.descriptors) != header.descriptors:
            raise Malformed(
                f"message announces {header.descriptors} descriptors, {len(message.descriptors)} came with it"
            )
    except BaseException:
        message.close()
        raise
    message.kind = header.kind
    message.payload = data[messages.HEADER_BYTES :]
    return message


def _first_bytes(sock: socket.socket, message: Message, progress: Progress) -> bytes:
    """Wait for a message to begin, as the socket's own timeout says."""
    own_timeout = sock.gettimeout()
    patience = _Deadline(own_timeout)
    while True:
        # A non-blocking socket is asked at once, and its BlockingIOError is what its owner expects.
        if own_timeout != 0 and not patience.wait(sock, select.POLLIN):
            raise TimeoutError(f"no message began within the socket's timeout of {own_timeout} s")
        try:
            data = _read(sock, messages.HEADER_BYTES, message)
        except (BlockingIOError, TimeoutError):
            if own_timeout == 0:
                raise
            continue
        except ConnectionResetError as error:
            raise EOFError("the peer closed the connection") from error
        except Malformed:
            progress.begun = True
            raise
        if not data:
            raise EOFError("the peer closed the connection")
        progress.begun = True
        return data


def _read_until(sock: socket.socket, data: bytes, total: int, message: Message, deadline: _Deadline) -> bytes:
    """Read on until there are ``total`` bytes; descriptors may not come any more."""
    attached = len(message.descriptors)
    while len(data) < total:
        if not deadline.wait(sock, select.POLLIN):
            deadline.stalled("sent no more than", len(data))
        try:
            more = _read(sock, total - len(data), message)
        except (BlockingIOError, TimeoutError):
            continue
        except ConnectionResetError as error:
            raise Malformed(f"the connection was reset after {len(data)} bytes of a message") from error
        if not more:
            raise Malformed(f"the connection closed after {len(data)} of {total} bytes of a message")
        if len(message.descriptors) != attached:
            raise Malformed(f"descriptors came with byte {len(data)} of a message; they belong to its first")
        data += more
    return data


def _read(sock: socket.socket, size: int, message: Message) -> bytes:
    """Read once; every descriptor that comes belongs to the message from then on."""
    data, ancillary, flags, _ = sock.recvmsg(
        size, _ANCILLARY_BYTES, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        numbers = array.array("i", content[: len(content) - len(content) % _INT_BYTES])
        if kind == socket.SCM_RIGHTS:
            message.descriptors.extend(numbers)
        elif kind == _SCM_PIDFD:
            for number in numbers:
                os.close(number)
    if flags & socket.MSG_CTRUNC:
        raise Malformed(
            "the descriptors of a message were cut off: more came than may, or this process has too many "
            "open (then raise RLIMIT_NOFILE, ulimit -n)"
        )
    if len(message.descriptors) > messages.MAX_DESCRIPTORS:
        raise Malformed(f"more than {messages.MAX_DESCRIPTORS} descriptors came with a message")
    return data


def _send(
    sock: socket.socket,
    data: bytes,
    descriptors: Sequence[int],
    timeout: float | None,
    progress: Progress | None,
) -> None:
    """Send one message whole; the descriptors go with its first byte and stay the caller's."""
    _number(sock)
    progress = progress or Progress()
    deadline = _Deadline(timeout)
    own_timeout = sock.gettimeout()
    # Python itself waits before every call on a socket that has a timeout, and not for as long as we do. On
    # others waiting first would be wrong: poll sees room only when three quarters of the buffer are free.
    full = own_timeout is not None and own_timeout > 0
    rest = memoryview(data)
    ancillary = rights(descriptors)
    while rest:
        if full and not deadline.wait(sock, select.POLLOUT):
            deadline.stalled("took no more than", len(data) - len(rest))
        # Said before it is so: a signal handler may raise as soon as the call has returned.
        begun, progress.begun = progress.begun, True
        try:
            sent = sock.sendmsg([rest], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except (BlockingIOError, TimeoutError):
            progress.begun = begun
            if own_timeout == 0 and not begun:
                raise
            full = True
            continue
        except OSError as error:
            progress.begun = begun
            hint = _HINTS.get(error.errno or 0)
            raise OSError(
                error.errno, f"sendmsg: {error.strerror}" + (f" ({hint})" if hint else "")
            ) from error
        # What went out took the descriptors along; only bytes are left.
        rest, ancillary = rest[sent:], []


def send_snapshot(
    sock: socket.socket,
    snapshot: _native.Snapshot,
    known: Container[bytes],
    timeout: float | None,
    progress: Progress | None = None,
) -> None:
    """Send a snapshot; blocks for at most ``timeout`` seconds.

    Args:
        sock: A Unix stream socket.
        snapshot: Its descriptors are borrowed for the call.
        known: Identities of layers that the peer has.
        timeout: In seconds, for the whole message; None is no limit.
        progress: Is told whether anything was sent.

    Raises:
        NotImmutable: A layer is no sealed memfd, so every receiver would refuse it.
        Stalled: The peer did not take the message in time.
        OSError: The kernel refused; the message says what to do.
    """
    layer_ids = snapshot.layer_ids()
    new = [
        descriptor
        for layer_id, descriptor in zip(layer_ids, snapshot.layer_fds(), strict=True)
        if layer_id not in known
    ]
    check_sealed(new)
    _send(sock, messages.encode_snapshot(layer_ids, known), new, timeout, progress)


def check_sealed(descriptors: Iterable[int]) -> None:
    """Tell the sender what the receiver would only tell by closing the connection.

    Raises:
        NotImmutable: A layer is no sealed memfd.
    """
    wanted = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    for descriptor in descriptors:
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            seals = 0
        if seals & wanted != wanted:
            raise NotImmutable(
                "a layer of this snapshot is a file, which no receiver can accept as immutable: "
                "load it with copy=True to hand it to other processes"
            )


def send_mirror(
    sock: socket.socket,
    descriptor: int,
    size_bytes: int,
    timeout: float | None,
    progress: Progress | None = None,
) -> None:
    """Send a mirror; the descriptor is borrowed. Blocks and raises as ``send_snapshot`` does."""
    _send(sock, messages.encode_mirror(size_bytes), [descriptor], timeout, progress)


def assemble_snapshot(message: Message, known: Mapping[bytes, int]) -> _native.Snapshot:
    """Verify a received snapshot.

    Args:
        message: Its descriptors are taken.
        known: Borrowed descriptors of the layers that may be left out, by identity.

    Raises:
        Malformed: The payload, the layers or their page table do not follow the formats.
        NotImmutable: A layer may still change.
    """
    records = messages.decode_snapshot(message.payload, len(message.descriptors))
    missing = [
        record.layer_id.hex() for record in records if not record.attached and record.layer_id not in known
    ]
    if missing:
        raise Malformed(
            f"message leaves out {len(missing)} layers that were not sent before, first {missing[0]}"
        )
    if not all(map(is_shared_memory, message.descriptors)):
        raise NotImmutable("a descriptor that came with the message is no memfd")
    attached = iter(message.take_descriptors())
    descriptors: list[int] = []
    try:
        descriptors.extend(
            next(attached) if record.attached else os.dup(known[record.layer_id]) for record in records
        )
    except BaseException:
        for descriptor in [*descriptors, *attached]:
            os.close(descriptor)
        raise
    snapshot = _native.Snapshot.from_fds(descriptors)
    if snapshot.layer_ids() != [record.layer_id for record in records]:
        snapshot.close()
        raise Malformed("the layers that came are not those that the message names")
    return snapshot


def assemble_mirror(message: Message) -> tuple[int, int]:
    """Verify a received mirror.

    Returns:
        The descriptor, now the caller's, and the size in bytes.

    Raises:
        Malformed: The payload does not follow the format, or lies about the size.
        NotImmutable: The descriptor's seals do not make a mirror.
    """
    size_bytes = messages.decode_mirror(message.payload, len(message.descriptors))
    held_bytes = _native.MirrorView.verify_fd(message.descriptors[0])
    if not held_bytes - _native.PAGE_SIZE < size_bytes <= held_bytes:
        raise Malformed(f"a mirror of {size_bytes} bytes came with a descriptor that holds {held_bytes}")
    return message.take_descriptors()[0], size_bytes
