"""Snapshots, mappings of them, and files that hold them."""

# Sockets are imported when something is pickled.
# ruff: noqa: PLC0415

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from quire import _native
from quire.arrays import ArrayViews
from quire.closing import Closing
from quire.ranges import Ranges

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any, NoReturn

    from quire.handover import Tickets
    from quire.segment import Segment

__all__ = ["Mapping", "Snapshot", "SnapshotStats", "load"]


class SnapshotStats(NamedTuple):
    """What making a snapshot cost; all zero for one that was received or loaded."""

    pages_scanned: int
    """Pages whose state was looked at."""
    pages_copied: int
    """Pages written to a new layer."""
    nodes_written: int
    """Page-table nodes written to a new layer."""
    duration_ns: int
    """Time inside the call, in nanoseconds."""


class Snapshot(Closing):
    """An immutable version of a segment.

    Made by ``Segment.snapshot``, ``Segment.sever``, ``quire.recv``, ``quire.load`` and unpickling, never by
    calling the class. It holds its layers as open descriptors, at most 64, shared with the other snapshots of
    this process that have them too. Every method may be called from any thread.

    Two snapshots compare equal only if they are the same object; whether they hold the same bytes is what
    ``diff`` tells. Copies are the snapshot itself.

    It travels through every channel of multiprocessing: the descriptors go, the data stays where it is, and
    the receiver verifies. A pickle can be loaded once; one that is never loaded keeps the memory until the
    process that made it ends. Keep the snapshot open until it has been pickled; a
    ``multiprocessing.Queue`` pickles in a thread of its own, after ``put`` has returned.
    """

    __slots__ = ("__weakref__", "_held", "_lent", "_tickets")

    _held: _native.Snapshot | None
    # Whether something else of this process may hold the native object.
    _lent: bool
    _tickets: Tickets | None

    # Set by quire.segment, which stands above this module.
    _segment_type: ClassVar[type[Segment]]

    def __new__(cls, *_args: object, **_options: object) -> Self:
        """Refuse.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a Snapshot is made by Segment.snapshot(), quire.recv() or quire.load(), not by its class"
        )

    @classmethod
    def _wrap(cls, core: _native.Snapshot) -> Snapshot:
        snapshot = object.__new__(cls)
        snapshot._held = core
        snapshot._lent = False
        snapshot._tickets = None
        return snapshot

    @property
    def _core(self) -> _native.Snapshot:
        """The native object; ValueError when closed."""
        core = self._held
        if core is None:
            raise ValueError("the snapshot is closed")
        return core

    def _lend(self) -> _native.Snapshot:
        """The native object, for a holder that may outlive ``close``."""
        core = self._core
        self._lent = True
        return core

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._core.size

    @property
    def layers(self) -> int:
        """Number of layers, 1 to 64; each is one open descriptor."""
        return self._core.layer_count

    @property
    def stats(self) -> SnapshotStats:
        """What making it cost."""
        return SnapshotStats(*self._core.stats)

    def map(self, private: bool = False) -> Mapping:
        """Map the snapshot into this process.

        Args:
            private: Let this process change its view; changed pages are copied on write, nobody else sees
                them. False gives a read-only view.

        Returns:
            A mapping that stays valid when the snapshot is closed.

        Raises:
            MemoryError: There is too little address space, or too little memory for pages that have to be
                copied in because mapping each by itself would take too many VMAs.
            OSError: The kernel refused.
        """
        return Mapping(self, private=private)

    def diff(self, other: Snapshot) -> Ranges:
        """Find where two snapshots differ.

        The cost is proportional to the difference, not to the size, if one descends from the other.

        Returns:
            Half-open byte ranges, page aligned, ascending, merged. The last may end after the size. Pages
            that only one of the two has count as different.

        Raises:
            TypeError: ``other`` is no Snapshot.
        """
        if not isinstance(other, Snapshot):
            raise TypeError(f"a Snapshot can be compared with a Snapshot, not with {type(other).__name__}")
        return Ranges._from_native(self._core.diff(other._core))

    def fork(self) -> Segment:
        """Return a new writable segment that starts as this snapshot; nothing is copied.

        Raises:
            MemoryError: There is too little address space.
            OSError: The kernel refused.
        """
        return self._segment_type._from_snapshot(self)

    def verify(self) -> None:
        """Check, with the kernel, that no byte can ever change, and that the page table is sound.

        Every receive has done this before it returned. The cost grows with the number of page-table nodes.

        Raises:
            NotImmutable: A layer is no memfd sealed against writing, shrinking, growing and unsealing. So is
                it with every snapshot that was loaded from a file without copying.
            Malformed: The page table breaks a rule of ``docs/formats.md``.
        """
        self._core.verify()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that ``quire.load`` maps back without copying.

        Pages that read zero take no space. The file appears under its name when it is complete and on disk; a
        crash leaves the old file or none.

        Args:
            path: The file; one that exists is replaced.

        Raises:
            OSError: The kernel refused.
        """
        self._core.save(os.fspath(path))

    def close(self) -> None:
        """Give up the layers. Idempotent.

        Mappings of the snapshot, segments forked from it and pickles of it stay good. The memory is given
        back when nothing, in any process, holds it any more.
        """
        core, self._held = self._held, None
        if core is not None and not self._lent:
            # Giving gigabytes back takes a while; the native close does it without the GIL.
            core.close()
        tickets, self._tickets = self._tickets, None
        if tickets is not None:
            tickets.close()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._held is None

    def __copy__(self) -> Snapshot:
        """Return the snapshot itself: it cannot change."""
        return self

    def __deepcopy__(self, _memo: object) -> Snapshot:
        """Return the snapshot itself: it cannot change."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Snapshot], tuple[Any, ...]]:
        """Pickle for multiprocessing.

        Raises:
            TypeError: The pickler is not one that hands objects to another process.
            NotImmutable: A layer is a file.
            ValueError: The snapshot is closed.
        """
        from quire import handover, transport

        handover.check_pickler(
            "Snapshot", "save() writes one to a file, quire.send() passes one through a socket"
        )
        core = self._lend()
        transport.check_sealed(core.layer_fds())
        if self._tickets is None:
            self._tickets = handover.Tickets()

        def send(sock: socket.socket) -> None:
            transport.send_snapshot(sock, core, (), 10.0)

        return _unpickle, handover.offer(send, self._tickets)

    def __repr__(self) -> str:
        """Show size and layers."""
        if self._held is None:
            return "<quire.Snapshot closed>"
        return f"<quire.Snapshot of {self.size} bytes in {self.layers} layers>"


def _unpickle(*where: Any) -> Snapshot:
    """Fetch, verify and wrap what ``Snapshot.__reduce__`` left."""
    from quire import handover, messages, transport
    from quire.errors import Malformed

    with handover.collect(*where) as message:
        if message.kind != messages.SNAPSHOT:
            raise Malformed(f"a snapshot was pickled, a message of type {message.kind} came")
        return Snapshot._wrap(transport.assemble_snapshot(message, {}))


class Mapping(ArrayViews, Closing, _native.Mapping):
    """A view of a snapshot, at an address that stays.

    It exports a buffer of ``size`` bytes, read-only unless private: ``memoryview(mapping)``,
    ``mapping.array(...)`` and ``mapping[start:stop]`` all work. It holds the memory by itself; the snapshot
    may be closed.
    """

    _shown: Snapshot

    def __new__(cls, snapshot: Snapshot, *, private: bool = False) -> Self:
        """Map a snapshot; the same as ``snapshot.map(private)``."""
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"a Mapping shows a Snapshot, not {type(snapshot).__name__}")
        self = super().__new__(cls, snapshot._core, private=private)
        self._shown = snapshot
        return self

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot shown now; it may have been closed meanwhile."""
        return self._shown

    def advance(self, snapshot: Snapshot) -> None:
        """Show another snapshot at the same address; only what differs is touched.

        Views stay valid and show the new version. Other threads that read meanwhile see each page in its old
        or its new version, in no order. A private mapping has content of its own and cannot be advanced.

        Args:
            snapshot: Any snapshot of the same size, newer, older or unrelated.

        Raises:
            ValueError: The sizes differ, the mapping is private, or a snapshot or the mapping is closed.
            MemoryError, OSError: There is too little memory, or the kernel refused; the mapping shows the old
                version still.
        """
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"a Mapping shows a Snapshot, not {type(snapshot).__name__}")
        self.advance_native(snapshot._core)
        self._shown = snapshot

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError(
            "a Mapping belongs to one process: pickle its snapshot and map that in the other process"
        )

    def __repr__(self) -> str:
        """Show size and address."""
        if self.closed:
            return "<quire.Mapping closed>"
        kind = "private " if self.private else ""
        return f"<quire.Mapping {kind}of {self.size} bytes at {self.address:#x}>"


def load(path: str | os.PathLike[str], *, copy: bool = False, check: bool = True) -> Snapshot:
    """Open a snapshot that ``Snapshot.save`` wrote.

    Args:
        path: The file.
        copy: Copy the content into sealed memory of its own. Without it the file is mapped back without
            copying, so whoever may write the file may change the snapshot: ``verify()`` then raises
            NotImmutable, and it cannot be sent or pickled, because the kernel guarantees nothing about a
            file. With it ``verify()`` passes.
        check: Compare the hash of the whole file, which reads all of it. Without it only the length, the
            trailer and the page table are checked.

    Returns:
        The snapshot. It holds the file open.

    Raises:
        Malformed: The file is cut short or damaged, or is something else.
        OSError: The kernel refused; FileNotFoundError among them.
    """
    return Snapshot._wrap(_native.Snapshot.load(os.fspath(path), copy, check))
