"""Leases: which client may have which range of a memory object mapped."""

from __future__ import annotations

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

    def splits(self, start: int, stop: int) -> bool:
        """Whether taking a range out would leave more parts than before."""
        return any(a < start and stop < b for a, b in self.spans)

    def cut(self, start: int, stop: int) -> None:
        """Take a range out of it; at the end nothing may be left."""
        before = set(self.extents())
        kept = [(a, min(b, start)) for a, b in self.spans if a < start]
        kept += [(max(a, stop), b) for a, b in self.spans if b > stop]
        self.spans = sorted(kept)
        for extent in before - set(self.extents()):
            extent.leases.pop(self, None)
        if not self.spans:
            self.memory.leases.pop(self, None)
