"""Segments: growable memory with one writer, whose versions are snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from quire import _native
from quire.arrays import ArrayViews, checked_size, raw_view
from quire.closing import Closing
from quire.locks import WritingGate
from quire.snapshot import Snapshot

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import NoReturn

    from quire.arrays import Exporter

__all__ = ["Segment"]


class Segment(ArrayViews, Closing, _native.Segment):
    """Growable, zero-filled memory of this process; any thread may write it.

    It exports a writable buffer of ``size`` bytes: ``memoryview(segment)``, ``segment.array(...)`` and
    ``segment[start:stop] = data`` all work. Pages that were never written cost nothing.

    In a forked child the segment keeps its data as a private copy, can be read and written, and
    ``snapshot``, ``sever`` and ``grow`` raise ForkedError.
    """

    _gate: WritingGate

    def __new__(cls, size_bytes: int) -> Self:
        """Reserve zero-filled memory; nothing is allocated until it is touched.

        Args:
            size_bytes: Length in bytes, at least 1; it need not be a multiple of the page.

        Raises:
            ValueError: The size is not positive or too large for a segment.
            MemoryError: There is too little address space.
            OSError: The kernel refused.
        """
        self = super().__new__(cls, checked_size(size_bytes))
        self._gate = WritingGate()
        return self

    @classmethod
    def from_buffer(cls, data: Exporter) -> Self:
        """Make a segment with the content of a buffer, copied.

        Args:
            data: Any C-contiguous buffer: bytes, arrays of any item type and shape.

        Returns:
            A segment as long as the buffer, in bytes.

        Raises:
            TypeError: The object exports no buffer.
            ValueError: The buffer is empty or not C-contiguous.
            MemoryError, OSError: There is too little memory for the copy.
        """
        with raw_view(data) as view:
            if not view.nbytes:
                raise ValueError("the buffer is empty; a segment has at least one byte")
            segment = cls(view.nbytes)
            try:
                segment.write_at(0, view)
            except BaseException:
                segment.close()
                raise
        return segment

    @classmethod
    def _from_snapshot(cls, snapshot: Snapshot) -> Self:
        """Make a segment that starts as a snapshot."""
        core = snapshot._core
        self = _native.Segment.__new__(cls, core.size, start=core)
        self._gate = WritingGate()
        return self

    def __setitem__(self, key: int | slice, value: int | Exporter) -> None:
        """Store one byte, or a buffer of exactly the slice's length in bytes.

        A consecutive slice is written so that full memory raises, where storing through a view would end the
        process with SIGBUS.

        Raises:
            MemoryError, OSError: There is too little memory.
            IndexError: The byte is outside the memory.
            ValueError: The lengths differ, or the byte is not 0 to 255.
        """
        if not isinstance(key, slice) or key.step not in (None, 1):
            super().__setitem__(key, value)
            return
        start, stop, _ = key.indices(self.size)
        with raw_view(value) as data:  # type: ignore[arg-type]
            if data.nbytes != max(0, stop - start):
                raise ValueError(f"{data.nbytes} bytes do not fill a slice of {max(0, stop - start)}")
            if data.nbytes:
                self.write_at(start, data)

    def snapshot(self) -> Snapshot:
        """Take an immutable version of the content as it is now.

        Costs a scan of the page tables and a copy of the pages changed since the last one; the first one
        copies nothing. Exact for whatever is not being written meanwhile; blocks until no thread is inside
        ``writing()``, and so is exact for threads that use it. The GIL is released.

        Raises:
            ForkedError: This process was forked from the one that made the segment.
            RuntimeError: The calling thread is inside ``writing()``.
            MemoryError, OSError: There is too little memory, or the kernel refused; the segment is as before.
        """
        with self._gate.exclusive():
            return Snapshot._wrap(self.snapshot_native())

    def sever(self) -> Snapshot:
        """Hand the whole content over as a snapshot; the segment reads zeros afterwards.

        Views stay valid and read zeros too. Blocks and raises as ``snapshot`` does.
        """
        with self._gate.exclusive():
            return Snapshot._wrap(self.sever_native())

    def grow(self, size_bytes: int) -> None:
        """Make the segment longer; new pages read zero.

        The address stays while there is room in the reservation made at creation: seven times the size then
        on top of it, at least 1 GiB and at most 1 TiB more. Past that the segment moves. Views that exist
        keep their length.

        Args:
            size_bytes: The new length in bytes, not less than the old one.

        Raises:
            ValueError: The new length is less than the old one or too large for a segment.
            BufferError: The segment would have to move and views of it are exported.
            ForkedError: This process was forked from the one that made the segment.
            MemoryError, OSError: There is too little address space, or the kernel refused.
        """
        super().grow(checked_size(size_bytes))

    def writing(self) -> AbstractContextManager[None]:
        """Return a context manager around writes that belong together: no snapshot is taken in the middle.

        Any number of threads may be inside at once; a thread may nest it. ``snapshot()`` waits until none is
        inside. Entering blocks while a snapshot waits or runs. It does not protect writers from each other.
        """
        return self._gate.writing()

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError(
            "a Segment has one writer and stays in its process: pickle segment.snapshot(), "
            "the other process can map() it or fork() it"
        )

    def __repr__(self) -> str:
        """Show size and address."""
        if self.closed:
            return "<quire.Segment closed>"
        return f"<quire.Segment of {self.size} bytes at {self.address:#x}>"


Snapshot._segment_type = Segment
