"""What a space costs: resident, proportional and unique sizes, page tables, charge."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quire._native import PAGE_SIZE
from quire.space.constants import PAGE_SHIFT, VM_ACCOUNT
from quire.space.pages import GUARD, ZERO

if TYPE_CHECKING:
    from quire.space.state import State


class Sizes(NamedTuple):
    """Sizes of a space in bytes.

    Attributes:
        virtual_bytes: All VMAs.
        resident_bytes: Pages that are mapped, without the page of zeros (RSS).
        proportional_bytes: The same, each page divided by how many map it (PSS).
        unique_bytes: Pages that nobody else maps (USS).
        anonymous_bytes: Of the resident, what no file has.
        file_bytes: Of the resident, what is in a page cache.
        table_bytes: Page tables.
        charged_bytes: What the VMAs are charged for; shared anonymous memory is charged to the machine.
    """

    virtual_bytes: int
    resident_bytes: int
    proportional_bytes: float
    unique_bytes: int
    anonymous_bytes: int
    file_bytes: int
    table_bytes: int
    charged_bytes: int


def sizes(state: State, start: int, end: int) -> Sizes:
    """Add up what lies in ``[start, end)``; page tables are those of the whole space."""
    virtual = charged = anonymous = of_files = unique = 0
    proportional = 0.0
    for vma in state.tree.overlapping(start, end):
        size = min(vma.end, end) - max(vma.start, start)
        virtual += size
        if vma.flags & VM_ACCOUNT:
            charged += size
    for _, frame in state.table.range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        if frame is ZERO or frame is GUARD:
            continue
        if frame.file is None:
            anonymous += 1
        else:
            of_files += 1
        proportional += 1 / frame.mapped
        unique += frame.mapped == 1
    return Sizes(
        virtual,
        (anonymous + of_files) * PAGE_SIZE,
        proportional * PAGE_SIZE,
        unique * PAGE_SIZE,
        anonymous * PAGE_SIZE,
        of_files * PAGE_SIZE,
        state.table.table_pages() * PAGE_SIZE,
        charged,
    )
