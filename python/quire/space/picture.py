"""Address spaces of the model as data for `quire.pictures`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire._native import PAGE_SIZE
from quire.pictures.model import Pages, Row, Sample
from quire.space.constants import PAGE_SHIFT, VM_ACCOUNT, VM_EXEC, VM_GROWSDOWN, VM_SHARED
from quire.space.pages import GUARD, ZERO

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.space.address_space import AddressSpace
    from quire.space.pages import Frame
    from quire.space.vma import VMA, File

__all__ = ["Frames", "sample"]

_PAGES_AT_MOST = 512
"""Rows of more pages are drawn without them."""


class Frames:
    """Numbers for frames, in the order in which they are first seen, from 1; 0 is the page of zeros."""

    def __init__(self) -> None:
        self._numbers: dict[Frame, int] = {ZERO: 0}

    def number(self, frame: Frame) -> int:
        """Return a frame's number, the same for as long as this object lives."""
        return self._numbers.setdefault(frame, len(self._numbers))


def sample(
    space: AddressSpace,
    title: str,
    frames: Frames,
    *,
    label: Callable[[VMA], str] | None = None,
    marks: Sequence[tuple[int, int]] = (),
) -> Sample:
    """Make a sample of a space as it is now.

    Args:
        space: Which.
        title: Of the sample.
        frames: Numbers the frames; the same for all samples in which a frame shall have the same name.
        label: Names VMAs that have no name; none by default.
        marks: Ranges to point at.
    """
    programs = {vma.file for vma in space if vma.file is not None and vma.flags & VM_EXEC}
    rows = tuple(_row(space, vma, _kind(space, vma, programs), frames, label) for vma in space)
    return Sample(title, rows, marks=tuple(marks))


def _kind(space: AddressSpace, vma: VMA, programs: set[File]) -> str:
    if vma.file is not None:
        if not vma.file.name:
            return "shareable"
        return "image" if vma.file in programs else "mapped file"
    if space.name_of(vma) == "[heap]":
        return "heap"
    if vma.flags & VM_GROWSDOWN:
        return "stack"
    return "reserved" if vma.protection.startswith("---") else "private data"


def _row(space: AddressSpace, vma: VMA, kind: str, frames: Frames, label: Callable[[VMA], str] | None) -> Row:
    sizes = space.sizes(vma.start, vma.end)
    pages = (vma.end - vma.start) // PAGE_SIZE
    return Row(
        vma.start,
        vma.end,
        kind,
        space.name_of(vma) or (label(vma) if label is not None else ""),
        vma.protection,
        vma.size_bytes if vma.flags & VM_ACCOUNT or vma.flags & VM_SHARED else 0,
        sizes.resident_bytes,
        round(sizes.proportional_bytes),
        None,
        0,
        (
            ("Flags", " ".join(vma.flag_names)),
            ("anon_vma", str(vma.anon_vma.number) if vma.anon_vma else "none"),
        ),
        _pages(space, vma, frames) if pages <= _PAGES_AT_MOST else None,
    )


def _pages(space: AddressSpace, vma: VMA, frames: Frames) -> Pages:
    total = vma.size_bytes // PAGE_SIZE
    there: list[int | None] = [None] * total
    shared = []
    for page, frame in space._state.table.range(vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT):
        if frame is GUARD:
            continue
        number = page - (vma.start >> PAGE_SHIFT)
        there[number] = frames.number(frame)
        if frame.mapped > 1 and frame is not ZERO:
            shared.append(number)
    resident = [number for number, frame in enumerate(there) if frame]
    return Pages.of(total, resident, shared=shared, frames=there)
