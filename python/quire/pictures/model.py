"""What is drawn: address spaces as plain data, without knowing where they come from.

A `Picture` is one or more `Sample` objects of the same thing in the order of time; a sample has `Row`
objects, one for each VMA, which may have `Pages`. All sizes are in bytes, addresses are plain integers below
2**64, ends are exclusive, and None is a figure that is not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quire.matching import pair_up
from quire.pictures.palette import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

__all__ = ["CELLS", "PAGE", "Change", "Pages", "Picture", "Row", "Sample", "Step", "Total", "changes"]

PAGE = 4096
CELLS = 4096
"""The most cells that the pages of one row are drawn with; of longer ones a cell is several pages."""
_FULL = 15


class Pages(NamedTuple):
    """Which pages of a row are in memory, cell by cell.

    Attributes:
        pages_per_cell: A power of two. The last cell may have fewer.
        resident: For each cell a byte, 0 (no page) to 15 (all pages), of pages in memory. Any page counts 1
            at least, and one that is missing makes 14 at most.
        shared: The same of pages that somebody else has too.
        swapped: The same of pages that are swapped out.
        written: The same of pages that are known to have been written.
        frames: In a model, the number of each page's frame or None, one for each page; 0 is the page of
            zeros. Else empty.
    """

    pages_per_cell: int
    resident: bytes
    shared: bytes = b""
    swapped: bytes = b""
    written: bytes = b""
    frames: tuple[int | None, ...] = ()

    @classmethod
    def of(
        cls,
        total: int,
        resident: ArrayLike,
        *,
        shared: ArrayLike | None = None,
        swapped: ArrayLike | None = None,
        written: ArrayLike | None = None,
        frames: Iterable[int | None] = (),
    ) -> Pages:
        """Make cells of page numbers, so that a reservation of terabytes costs no more than its pages.

        Args:
            total: Pages of the row.
            resident: Numbers of those in memory, from 0.
            shared: Of those that somebody else has too; None if that is not known, as below.
            swapped: Of those that are swapped out.
            written: Of those that were written.
            frames: The number of each page's frame, or None; one for each page.
        """
        per_cell = 1
        while total > per_cell * CELLS:
            per_cell *= 2

        def cells(numbers: ArrayLike | None) -> bytes:
            return b"" if numbers is None else _cells(np.asarray(numbers, dtype=np.int64), total, per_cell)

        return cls(per_cell, cells(resident), cells(shared), cells(swapped), cells(written), tuple(frames))


def _cells(numbers: NDArray[np.int64], total: int, per_cell: int) -> bytes:
    count = -(-total // per_cell)
    if not count:
        return b""
    pages = np.bincount(numbers // per_cell, minlength=count)
    sizes = np.full(count, per_cell)
    sizes[-1] = total - (count - 1) * per_cell
    levels = np.where(pages > 0, np.maximum(pages * _FULL // sizes, 1), 0)
    return levels.astype(np.uint8).tobytes()


class Row(NamedTuple):
    """One VMA.

    Attributes:
        start: Its first address.
        end: The first address after it.
        kind: What it is for people; `quire.pictures.palette` has the colours.
        name: A path or another name, as it is: drawers make it visible.
        protection: As in /proc/PID/maps, for example ``r-xp``.
        committed: Bytes that count against the limit of commitments.
        resident: Bytes in memory.
        proportional: The same, shared pages divided by how many have them.
        dirty: Bytes that would have to be written before the memory can be taken.
        swapped: Bytes swapped out.
        details: More, as pairs of label and text.
        pages: The pages, if somebody looked.
    """

    start: int
    end: int
    kind: str
    name: str = ""
    protection: str = ""
    committed: int | None = None
    resident: int | None = None
    proportional: int | None = None
    dirty: int | None = None
    swapped: int | None = None
    details: tuple[tuple[str, str], ...] = ()
    pages: Pages | None = None

    @property
    def size(self) -> int:
        """Bytes of addresses."""
        return self.end - self.start


class Total(NamedTuple):
    """Sums over the rows of a kind: how many rows, and bytes."""

    kind: str
    mappings: int = 0
    virtual: int = 0
    committed: int = 0
    resident: int = 0

    def plus(self, other: Total) -> Total:
        """Add up two sums of this kind."""
        return Total(
            self.kind,
            self.mappings + other.mappings,
            self.virtual + other.virtual,
            self.committed + other.committed,
            self.resident + other.resident,
        )


class Sample(NamedTuple):
    """An address space at one moment.

    Attributes:
        title: What tells this sample from the others: a time, a step.
        rows: In the order of addresses, not overlapping.
        extra: Memory that has no addresses, such as page tables.
        time_s: Seconds since the first sample; None if the samples are steps.
        note: What a reader has to know, such as what could not be read.
        marks: Ranges (start, exclusive end) to point at, such as what a step changed.
        failed: The note tells of a failure.
    """

    title: str
    rows: tuple[Row, ...]
    extra: tuple[Total, ...] = ()
    time_s: float | None = None
    note: str = ""
    marks: tuple[tuple[int, int], ...] = ()
    failed: bool = False

    def totals(self) -> list[Total]:
        """Sum the rows up by kind, in the order of the palette and then of names."""
        sums: dict[str, Total] = {}
        for row in self.rows:
            one = Total(row.kind, 1, row.size, row.committed or 0, row.resident or 0)
            sums[row.kind] = sums[row.kind].plus(one) if row.kind in sums else one
        for total in self.extra:
            sums[total.kind] = sums[total.kind].plus(total) if total.kind in sums else total
        order = {kind: number for number, kind in enumerate(KINDS)}
        return sorted(sums.values(), key=lambda total: (order.get(total.kind, len(order)), total.kind))


class Step(NamedTuple):
    """One step of a lesson: an operation, what came of it, and the address spaces after it.

    Attributes:
        title: The operation.
        said: What the teacher says of it, a line each.
        notes: What came of it, a line each.
        failed: It failed.
        panels: A sample of each address space, whose title is the process's name.
    """

    title: str
    said: tuple[str, ...]
    notes: tuple[str, ...]
    failed: bool
    panels: tuple[Sample, ...]


class Picture(NamedTuple):
    """Samples of one address space, in the order of time; one at least."""

    title: str
    samples: tuple[Sample, ...]
    subtitle: str = ""


class Change(NamedTuple):
    """How a row differs between two samples; ``before`` is None for a new one, ``after`` for a lost one."""

    before: Row | None
    after: Row | None

    @property
    def verb(self) -> str:
        """One of ``added``, ``removed``, ``grown``, ``shrunk``, ``changed``."""
        if self.before is None:
            return "added"
        if self.after is None:
            return "removed"
        difference = self.after.size - self.before.size
        return "grown" if difference > 0 else "shrunk" if difference < 0 else "changed"


def _differ(old: Row, new: Row) -> bool:
    return old[:-2] != new._replace(proportional=old.proportional)[:-2]


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Compare two samples.

    Rows are the same VMA if they overlap and have the same name, each with one other at most. Neither details
    and pages nor proportional sizes, which other processes change, are compared.

    Args:
        before: In the order of addresses, not overlapping.
        after: The same.

    Returns:
        The rows that differ, in the order of addresses.
    """
    pairs, gone = pair_up(before, after, lambda old, new: old.name == new.name)
    found = [Change(old, new) for old, new in pairs if old is None or _differ(old, new)]
    found += [Change(row, None) for row in gone]
    return sorted(found, key=lambda change: (change.after or change.before)[0])  # type: ignore[index]
