"""What a client has mapped: leases, and the rules by which they are moved and taken away."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from quire import _native
from quire.arrays import ArrayViews
from quire.broker import protocol
from quire.broker.area import Area
from quire.closing import Closing
from quire.errors import ForkedError, Revoked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from quire.broker.link import Link

__all__ = ["Borrowed", "Lease", "Writable"]

PAGE = _native.PAGE_SIZE
_log = logging.getLogger("quire.client")


class _Gate:
    """Lets a move wait for writers, and writers for a move."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._writers = 0
        self._holds: set[int] = set()
        self._then: list[Callable[[], None]] = []

    def enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._holds)
            self._writers += 1

    def leave(self) -> None:
        with self._changed:
            self._writers -= 1
            then, self._then = (self._then, []) if not self._writers else ([], self._then)
        for callback in then:
            callback()

    def hold(self, extent: int, then: Callable[[], None]) -> None:
        """Let no writer in any more; calls back when none is inside."""
        with self._changed:
            self._holds.add(extent)
            if self._writers:
                self._then.append(then)
                return
        then()

    def free(self, extent: int | None) -> None:
        """Let writers in again; None whatever holds them."""
        with self._changed:
            if extent is None:
                self._holds.clear()
            else:
                self._holds.discard(extent)
            self._changed.notify_all()


class Writable(ArrayViews):
    """The writable view of a lease inside ``writing()``.

    Delete the arrays and memoryviews made of it before the block ends: what is written later may be lost.
    """

    def __init__(self, view: memoryview) -> None:
        """Show the view."""
        self._view = view

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._view.nbytes

    def _exported(self) -> memoryview:
        return self._view[:]

    def __buffer__(self, _flags: int, /) -> memoryview:
        """Export the memory, from Python 3.12 on."""
        return self._view[:]


class Lease(ArrayViews, Closing):
    """Memory that was lent, mapped into this process; it can be taken back at any time.

    Made by ``Client.lease`` and ``Client.memory``. Views are read-only; a lease for writing gives a writable
    one inside ``with lease.writing() as rw``. Methods of the lease raise Revoked for what was taken back. An
    array keeps its address, which never comes to show other data: touching what was taken back is SIGBUS,
    after a line on standard error that names the lease and the offset. The address stays the same when the
    broker moves the memory to other pages.

    A forked child does not have the memory: a touch there is SIGSEGV.
    """

    def __init__(
        self, borrowed: Borrowed, reply: protocol.Leased, offset: int, size: int, write: bool
    ) -> None:
        """Reserve the addresses; `Borrowed.enter` maps."""
        self._borrowed = borrowed
        self._number = reply.lease
        self._extent_bytes = reply.extent_bytes
        self._extents = dict(enumerate(reply.extents, reply.first))
        self._start = offset // PAGE * PAGE
        stop = -(-(offset + size) // PAGE) * PAGE
        self._spans = [(self._start, stop)]
        self._area = Area(stop - self._start, self._start % self._extent_bytes)
        self._area.announce(reply.lease, offset - self._start, size)
        self._lock = threading.RLock()
        self._gate = _Gate()
        self._callbacks: list[Callable[[int, int], object]] = []
        self._offset = offset
        self._size = size
        self._write = write
        self._closed = False

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._size

    @property
    def offset(self) -> int:
        """Where it begins in what was lent, in bytes."""
        return self._offset

    @property
    def address(self) -> int:
        """Of the first byte."""
        return self._area.address + self._offset - self._start

    @property
    def write(self) -> bool:
        """Whether ``writing()`` may be used."""
        return self._write

    @property
    def held(self) -> list[tuple[int, int]]:
        """What has not been taken back: half-open ranges, in bytes from the start of the lease."""
        with self._lock:
            spans = self._spans
        end = self._offset + self._size
        clipped = [(max(a, self._offset), min(b, end)) for a, b in spans]
        return [(a - self._offset, b - self._offset) for a, b in clipped if a < b]

    @property
    def revoked(self) -> bool:
        """Whether any of it was taken back."""
        return self.held != [(0, self._size)]

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def on_revoke(self, callback: Callable[[int, int], object]) -> None:
        """Call a function just before a range is taken back.

        It runs in the client's own thread, with the offset and length in bytes within the lease, and has what
        is left of the deadline, 100 ms in all by default; it cannot ask the broker for anything. What it
        raises is logged. For memory that is cut off by force it runs afterwards.
        """
        self._callbacks.append(callback)

    def read(self, offset: int, length: int) -> bytes:
        """Copy a range out. It cannot be taken back in the middle, except by force.

        Raises:
            Revoked: Some of it was taken back.
            ValueError: It is not within the lease.
        """
        if not 0 <= offset <= offset + length <= self._size:
            raise ValueError(f"bytes {offset} to {offset + length} are not within a lease of {self._size}")
        with self._lock:
            self._check(offset, offset + length)
            with self._view(False) as view, view[offset : offset + length] as part:
                return part.tobytes()

    def store(self, offset: int, data: bytes) -> None:
        """Copy bytes in. It cannot be taken back in the middle, except by force; blocks as `writing` does.

        Raises:
            PermissionError: The lease is not for writing.
            Revoked: Some of it was taken back.
            ValueError: The range is not within the lease.
        """
        if not 0 <= offset <= offset + len(data) <= self._size:
            raise ValueError(f"{len(data)} bytes at {offset} are not within a lease of {self._size}")
        # In this order: a move waits for writers and then takes the lock.
        with self.writing(), self._lock:
            self._check(offset, offset + len(data))
            with self._view(True) as view:
                view[offset : offset + len(data)] = data

    def array(
        self, dtype: npt.DTypeLike, shape: int | Sequence[int] | None = None, offset: int = 0
    ) -> npt.NDArray[Any]:
        """Return a read-only numpy view, with no copy; arguments as for every quire object.

        Raises:
            Revoked: Some of what it would show was taken back.
            ValueError: The view would not lie within the lease.
        """
        view = super().array(dtype, shape, offset)
        self._check(offset, offset + view.nbytes)
        return view

    def __getitem__(self, key: int | slice) -> Any:
        """Return one byte as an integer, or a copy of a slice as bytes.

        Raises:
            Revoked: Some of what lies between was taken back.
            IndexError: The byte is outside the memory.
        """
        indices = range(self._size)[key]
        with self._lock:
            if isinstance(indices, range):
                if indices:
                    self._check(min(indices[0], indices[-1]), max(indices[0], indices[-1]) + 1)
            else:
                self._check(indices, indices + 1)
            return super().__getitem__(key)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Writable]:
        """Give the writable view for a block. Any number of threads may be inside.

        While somebody else is being cut off the memory may have to be moved; entering blocks meanwhile. A
        move waits until nobody is inside, for 2 seconds by default, and then takes the lease away.

        Raises:
            PermissionError: The lease is not for writing.
            Revoked: Some of it was taken back.
        """
        if not self._write:
            raise PermissionError("the lease is for reading; ask for it with write=True")
        self._gate.enter()
        try:
            self._check(0, self._size)
            yield Writable(self._view(True))
        finally:
            self._gate.leave()

    def _view(self, write: bool) -> memoryview:
        return self._area.view(self._offset - self._start, self._size, write)

    def _exported(self) -> memoryview:
        if self._closed:
            raise ValueError("the lease is closed")
        if not self.held:
            raise Revoked(f"all of lease {self._number} was taken back")
        return self._view(False)

    def __buffer__(self, _flags: int, /) -> memoryview:
        """Export the memory read-only, from Python 3.12 on."""
        return self._exported()

    def _check(self, start: int, stop: int) -> None:
        if self._closed:
            raise ValueError("the lease is closed")
        if start < stop and not any(a <= start and stop <= b for a, b in self.held):
            raise Revoked(f"bytes {start} to {stop} of lease {self._number} were taken back, or some of them")

    def close(self) -> None:
        """Give the memory back. Idempotent. Arrays made from it keep their address; touching is SIGBUS."""
        if not self._closed:
            self._closed = True
            self._area.given_back()
            self._borrowed.give_back(self)

    def __repr__(self) -> str:
        """Show size and state."""
        state = "closed" if self._closed else "partly taken back" if self.held and self.revoked else ""
        state = state or ("taken back" if self.revoked else "held")
        return f"<quire lease of {self._size} bytes at {self.address:#x}, {state}>"

    # What the link's thread does

    def _pieces(self, extent: int | None = None) -> list[tuple[int, int, int]]:
        """Index of the extent, and range of the memory, of each piece that is mapped."""
        pieces = []
        for index, serial in self._extents.items():
            if extent is None or serial == extent:
                begin, end = index * self._extent_bytes, (index + 1) * self._extent_bytes
                pieces += [
                    (index, max(a, begin), min(b, end)) for a, b in self._spans if a < end and begin < b
                ]
        return pieces

    def _map(self, descriptors: list[int]) -> None:
        with self._lock:
            for index, start, stop in self._pieces():
                first = next(iter(self._extents))
                self._area.map(
                    start - self._start,
                    stop - start,
                    descriptors[index - first],
                    start - index * self._extent_bytes,
                    self._write,
                )

    def _move(self, extent: int, descriptor: int, huge: bool) -> None:
        with self._lock:
            for index, start, stop in self._pieces(extent):
                at, offset = start - self._start, start - index * self._extent_bytes
                self._area.move(at, stop - start, descriptor, offset, self._write, huge)

    def _take_away(self, start: int, stop: int) -> None:
        with self._lock:
            gone = [(max(a, start), min(b, stop)) for a, b in self._spans if a < stop and start < b]
            for a, b in gone:
                self._area.cut(a - self._start, b - a)
            kept = [(a, min(b, start)) for a, b in self._spans if a < start]
            self._spans = sorted(kept + [(max(a, stop), b) for a, b in self._spans if b > stop])

    def _call_back(self, start: int, stop: int) -> None:
        end = self._offset + self._size
        a, b = max(start, self._offset), min(stop, end)
        for callback in self._callbacks:
            try:
                callback(a - self._offset, b - a)
            except Exception:  # noqa: BLE001 - a callback may raise anything
                _log.exception("a callback for a lease that is taken back failed")


class Borrowed:
    """All leases of a client, and what the broker's events do to them."""

    def __init__(self) -> None:
        """Start with none."""
        self.link: Link | None = None
        self._leases: dict[int, Lease] = {}
        self._lock = threading.Lock()
        self.on_version: Callable[[int, int], object] = max

    def enter(
        self, reply: protocol.Leased, descriptors: list[int], offset: int, size: int, write: bool
    ) -> Lease:
        """Map a lease; the descriptors are closed.

        Raises:
            OSError: The kernel refused; the lease was given back.
        """
        try:
            lease = Lease(self, reply, offset, size, write)
            with self._lock:
                lease._map(descriptors)
                self._leases[reply.lease] = lease
        except BaseException:
            if self.link is not None:
                self.link.tell(protocol.Release, {"lease": reply.lease})
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return lease

    def give_back(self, lease: Lease) -> None:
        """Unmap a lease and tell the broker."""
        start, stop = lease._start, lease._start + lease._area.length
        with self._lock:
            self._leases.pop(lease._number, None)
        lease._take_away(start, stop)
        lease._gate.free(None)
        if self.link is not None and self.link.failure is None:
            # In a forked child there is nothing to give back: the lease is the parent's.
            with contextlib.suppress(Revoked, ForkedError):
                self.link.submit(protocol.Release, {"lease": lease._number}).result()

    def all(self) -> list[Lease]:
        """Every lease that was not closed."""
        with self._lock:
            return list(self._leases.values())

    def event(self, message: protocol.Message, descriptors: list[int]) -> None:
        """Do what the broker asks; runs in the link's thread."""
        try:
            if isinstance(message, protocol.RevokeEvent):
                self._revoke(message)
            elif isinstance(message, protocol.HoldEvent):
                self._hold(message)
            elif isinstance(message, protocol.MoveEvent):
                self._move(message, descriptors)
            elif isinstance(message, protocol.UnholdEvent):
                for lease in self.all():
                    lease._gate.free(message.extent)
            elif isinstance(message, protocol.CutEvent):
                found = self._leases.get(message.lease)
                if found is not None:
                    found._take_away(message.offset, message.offset + message.length)
                    found._call_back(message.offset, message.offset + message.length)
            elif isinstance(message, protocol.VersionEvent):
                self.on_version(message.handle, message.version)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _answer(self, serial: int, done: bool = True) -> None:
        if self.link is not None:
            self.link.acknowledge(serial, done)

    def _revoke(self, message: protocol.RevokeEvent) -> None:
        with self._lock:
            lease = self._leases.get(message.lease)
        if lease is not None:
            lease._call_back(message.offset, message.offset + message.length)
            lease._take_away(message.offset, message.offset + message.length)
        self._answer(message.serial)

    def _hold(self, message: protocol.HoldEvent) -> None:
        leases = [lease for lease in self.all() if lease._write and message.extent in lease._extents.values()]
        left = [len(leases)]
        counting = threading.Lock()

        def one_is_quiet() -> None:
            with counting:
                left[0] -= 1
                quiet = left[0] == 0
            if quiet:
                self._answer(message.serial)

        for lease in leases:
            lease._gate.hold(message.extent, one_is_quiet)
        if not leases:
            self._answer(message.serial)

    def _move(self, message: protocol.MoveEvent, descriptors: list[int]) -> None:
        done = bool(descriptors)
        for lease in self.all():
            if lease._write == message.write and message.extent in lease._extents.values():
                try:
                    lease._move(message.extent, descriptors[0], message.huge)
                except (OSError, IndexError):
                    _log.exception("a lease could not be moved")
                    done = False
                if message.write:
                    lease._gate.free(message.extent)
        self._answer(message.serial, done)
