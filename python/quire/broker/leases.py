"""Leases: which client may have which range of a memory object mapped."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.broker.objects import Extent, Memory
    from quire.broker.sessions import Session

__all__ = ["MAX_PARTS", "Lease"]

# Each change of a lease writes all of its parts to the journal.
MAX_PARTS = 256


class Lease:
    """A range of memory lent to a session; parts of it may be gone.

    Ranges are half-open and in bytes of the memory object, rounded outwards to pages: that is what is mapped.
    """

    def __init__(
        self, number: int, memory: Memory, session: Session, spans: list[tuple[int, int]], write: bool
    ) -> None:
        """Enter it in the extents that it touches.

        Args:
            number: Names it in the protocol and the journal.
            memory: What is lent.
            session: To whom.
            spans: Ascending ranges that do not touch each other.
            write: Whether the mapping is writable.
        """
        self.number = number
        self.memory = memory
        self.session = session
        self.spans = spans
        self.write = write
        self._enter()

    def _enter(self) -> None:
        self.memory.leases[self] = None
        for extent in self.extents():
            extent.leases[self] = None

    def extents(self) -> list[Extent]:
        """The extents that it still touches, in order."""
        indices = {index for start, stop in self.spans for index in self.memory.within(start, stop)}
        return [self.memory.extents[index] for index in sorted(indices)]

    def overlap(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of it that lie within a range."""
        return [(max(a, start), min(b, stop)) for a, b in self.spans if a < stop and start < b]

    def _touched(self, start: int, stop: int) -> tuple[int, int]:
        """Which of the parts a range touches: the first, and the one behind the last."""
        if start >= stop:
            return 0, 0
        return (
            bisect.bisect_right(self.spans, start, key=lambda span: span[1]),
            bisect.bisect_left(self.spans, stop, key=lambda span: span[0]),
        )

    def splits(self, start: int, stop: int) -> bool:
        """Whether taking a range out would leave more parts than before."""
        first, last = self._touched(start, stop)
        return any(a < start and stop < b for a, b in self.spans[first:last])

    def cut(self, start: int, stop: int) -> None:
        """Take a range out of it; at the end nothing may be left."""
        first, last = self._touched(start, stop)
        if first < last:
            begin, end = self.spans[first][0], self.spans[last - 1][1]
            left = [span for span in ((begin, start), (stop, end)) if span[0] < span[1]]
            # A new list: the journal has the old one.
            self.spans = [*self.spans[:first], *left, *self.spans[last:]]
            for index in self.memory.within(max(start, begin), min(stop, end)):
                extent = self.memory.extents[index]
                low, high = self._touched(extent.start, extent.start + extent.length)
                if low == high:
                    extent.leases.pop(self, None)
        if not self.spans:
            self.memory.leases.pop(self, None)
