"""Live memory: one process writes, others see every write at once and cannot write."""

# Sockets are imported when something is sent or pickled.
# ruff: noqa: PLC0415

from __future__ import annotations

import contextlib
import operator
import os
from typing import TYPE_CHECKING, Literal, Self

from quire import _native
from quire.arrays import ArrayViews, checked_size
from quire.closing import Closing
from quire.errors import Malformed, NotImmutable
from quire.locks import WriterLock
from quire.snapshot import Snapshot

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

    from quire.handover import Tickets
    from quire.transport import Progress

__all__ = ["LiveSegment", "Mirror", "MirrorMapping", "Writable"]


class LiveSegment(ArrayViews, Closing, _native.LiveSegment):
    """Shared, live memory. Its buffer is read-only in the owner too; stray writes fault.

    The same pages are mapped twice: ``ro_address`` for everybody, ``rw_address`` for ``unprotected()`` only.
    Keep pointers that are stored inside the memory as read-only addresses or offsets.

    With the ``memfd`` backend the kernel stops every other process from writing, whatever it tries. With
    ``sysv`` (shmat) it does not: a process that attaches the memory by itself may write.

    The writable alias does not exist in a forked child: ``unprotected`` raises ForkedError there.
    """

    _lock: WriterLock

    def __new__(cls, size_bytes: int, backend: Literal["memfd", "sysv"] = "memfd") -> Self:
        """Make zero-filled live memory.

        Args:
            size_bytes: Length in bytes, at least 1.
            backend: ``memfd`` or ``sysv``.

        Raises:
            ValueError: The size is not positive or the backend is neither.
            MemoryError: There is too little address space.
            OSError: The kernel refused.
        """
        self = super().__new__(cls, checked_size(size_bytes), backend=backend)
        self._lock = WriterLock()
        return self

    def mirror(self) -> Mirror:
        """Return a handle that other processes map read-only; it has a descriptor of its own.

        Raises:
            ValueError: The segment is closed.
            OSError: There are too many open descriptors.
        """
        if self.fd < 0:
            return Mirror._wrap(-1, self.shmid, self.size)
        return Mirror._wrap(os.dup(self.fd), -1, self.size)

    @contextlib.contextmanager
    def unprotected(self) -> Iterator[Writable]:
        """Take the writer lock and give the writable view; released at the end of the block.

        Other threads block until it is free. One thread cannot nest it.

        Yields:
            A Writable. Delete the arrays and memoryviews made of it before the block ends.

        Raises:
            BufferError: Views of it are still exported at the end of the block. The lock is released all the
                same; the views can write until they are gone. An exception in flight goes first.
            RuntimeError: The thread is inside such a block already.
            ForkedError: This process was forked from the one that made the segment.
        """
        with self._lock.hold(), Writable(self) as writable:
            yield writable

    def snapshot(self) -> Snapshot:
        """Copy the content into an immutable version.

        Blocks while another thread is inside ``unprotected()``; a thread that is inside itself gets the
        content as it is. All pages that hold data are copied, because mirrors must go on seeing writes.

        Raises:
            MemoryError, OSError: There is too little memory, or the kernel refused.
        """
        with contextlib.nullcontext() if self._lock.mine else self._lock.hold():
            return Snapshot._wrap(self.snapshot_native())

    def to_ro(self, address: int) -> int:
        """Convert an address of the writable alias to the read-only one.

        Args:
            address: Within either alias; one past the end is outside. One of the read-only alias is returned
                as it is.

        Raises:
            ValueError: It is in neither alias, or the segment is closed.
        """
        return self._convert(address, self.rw_address, self.ro_address)

    def to_rw(self, address: int) -> int:
        """Convert an address of the read-only alias to the writable one; the reverse of ``to_ro``.

        Memory may be written through it inside ``unprotected()`` only.

        Raises:
            ValueError: It is in neither alias, or the segment is closed.
        """
        return self._convert(address, self.ro_address, self.rw_address)

    def _convert(self, address: int, start: int, target: int) -> int:
        address = operator.index(address)
        for base in (start, target):
            if base <= address < base + self.size:
                return address - base + target
        raise ValueError(f"address {address:#x} is in neither alias of this LiveSegment")

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError("a LiveSegment has one owner: pickle its mirror() or its snapshot()")

    def __repr__(self) -> str:
        """Show size and addresses."""
        if self.closed:
            return "<quire.LiveSegment closed>"
        return f"<quire.LiveSegment of {self.size} bytes at {self.ro_address:#x}>"


class Writable(ArrayViews, Closing, _native.WritableAlias):
    """The writable view of a LiveSegment inside ``unprotected()``.

    It exports a writable buffer: ``memoryview(rw)``, ``rw.array(...)`` and ``rw[start:stop] = data`` all
    work.
    """

    def __new__(cls, segment: LiveSegment) -> Self:
        """Take the writable view; ``unprotected`` does this with the lock held."""
        return super().__new__(cls, segment)

    def close(self) -> None:
        """Release the view.

        Raises:
            BufferError: Views of it are still exported.
        """
        self.release()


class Mirror(Closing):
    """A handle of live memory that can be mapped read-only, sent through sockets and pickled.

    Made by ``LiveSegment.mirror``, ``quire.recv`` and unpickling. It owns one descriptor, or none if the
    memory is System V's. A pickle can be loaded once.
    """

    __slots__ = ("__weakref__", "_fd", "_shmid", "_size", "_tickets")

    _fd: int
    _shmid: int
    _size: int
    _tickets: Tickets | None

    def __new__(cls, *_args: object, **_options: object) -> Self:
        """Refuse.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a Mirror is made by LiveSegment.mirror() or quire.recv(), not by calling the class")

    @classmethod
    def _wrap(cls, fd: int, shmid: int, size: int) -> Mirror:
        """Make a mirror that owns ``fd``."""
        mirror = object.__new__(cls)
        mirror._fd, mirror._shmid, mirror._size = fd, shmid, size
        mirror._tickets = None
        return mirror

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._size

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._fd < 0 and self._shmid < 0

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the mirror is closed")

    def verify(self) -> None:
        """Check with the kernel that nobody but the owner can write, and that the length cannot change.

        Raises:
            NotImmutable: The descriptor's seals are not FUTURE_WRITE, SHRINK, GROW and SEAL; so it is with
                every mirror of System V memory, which has no seals.
            ValueError: The mirror is closed.
        """
        self._check_open()
        if self._fd < 0:
            raise NotImmutable("System V memory has no seals: any process that may attach it may write to it")
        _native.MirrorView.verify_fd(self._fd)

    def map(self) -> MirrorMapping:
        """Map the memory read-only into this process.

        Returns:
            A mapping that stays valid when the mirror is closed.

        Raises:
            ValueError: The mirror is closed.
            OSError: The kernel refused.
        """
        self._check_open()
        return MirrorMapping(fd=self._fd, shmid=self._shmid, size_bytes=self._size)

    def close(self, *, _close: Callable[[int], None] = os.close) -> None:
        """Give up the descriptor. Idempotent; mappings stay good."""
        # Bound early: at the end of the interpreter the module's globals go before its objects.
        fd, self._fd, self._shmid = self._fd, -1, -1
        if fd >= 0:
            _close(fd)
        tickets, self._tickets = self._tickets, None
        if tickets is not None:
            tickets.close()

    __del__ = close

    def _send(self, sock: socket.socket, timeout: float | None, progress: Progress | None = None) -> None:
        """Write the message of this mirror to a socket."""
        from quire import transport

        self._check_open()
        if self._fd < 0:
            raise ValueError("a mirror of System V memory has no descriptor to send; pickle it instead")
        transport.send_mirror(sock, self._fd, self._size, timeout, progress)

    def __reduce__(self) -> tuple[Callable[..., Mirror], tuple[Any, ...]]:
        """Pickle for multiprocessing.

        Raises:
            TypeError: The pickler is not one that hands objects to another process.
            ValueError: The mirror is closed.
        """
        from quire import handover

        self._check_open()
        handover.check_pickler("Mirror", "quire.send() passes one through a socket")
        if self._fd < 0:
            return _unpickle_shared, (self._shmid, self._size)
        if self._tickets is None:
            self._tickets = handover.Tickets()
        kept = Mirror._wrap(os.dup(self._fd), -1, self._size)

        def send(sock: socket.socket) -> None:
            with kept:
                kept._send(sock, 10.0)

        return _unpickle, handover.offer(send, self._tickets)

    def __repr__(self) -> str:
        """Show the size."""
        state = "closed" if self.closed else f"of {self._size} bytes"
        return f"<quire.Mirror {state}>"


def _unpickle(*where: Any) -> Mirror:
    """Fetch and verify what ``Mirror.__reduce__`` left."""
    from quire import handover, messages, transport

    with handover.collect(*where) as message:
        if message.kind != messages.MIRROR:
            raise Malformed(f"a mirror was pickled, a message of type {message.kind} came")
        descriptor, size = transport.assemble_mirror(message)
        return Mirror._wrap(descriptor, -1, size)


def _unpickle_shared(shmid: int, size: int) -> Mirror:
    """Make a mirror of System V memory, which is found by its number."""
    return Mirror._wrap(-1, shmid, size)


class MirrorMapping(ArrayViews, Closing, _native.MirrorView):
    """A read-only view of another process's live memory, made by ``Mirror.map``.

    It exports a read-only buffer; what it shows changes when the owner writes.
    """

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError("a MirrorMapping belongs to one process: pickle the Mirror and map that")

    def __repr__(self) -> str:
        """Show size and address."""
        if self.closed:
            return "<quire.MirrorMapping closed>"
        return f"<quire.MirrorMapping of {self.size} bytes at {self.address:#x}>"
