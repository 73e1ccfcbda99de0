"""Address spaces of the model as data for `quire.pictures`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire._native import PAGE_SIZE
from quire.pictures.model import Pages, Picture, Row, Sample
from quire.pictures.page import frame as in_frame
from quire.pictures.still import still
from quire.space import windows
from quire.space.constants import PAGE_SHIFT, VM_ACCOUNT, VM_EXEC, VM_GROWSDOWN, VM_SHARED
from quire.space.pages import GUARD, ZERO

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.space.address_space import AddressSpace
    from quire.space.pages import Frame
    from quire.space.vma import VMA, File
    from quire.space.windows import WindowsSpace

__all__ = ["PROTECTION_NAMES", "Frames", "bundle", "framed", "sample", "windows_sample"]

_PAGES_AT_MOST = 512
"""Rows of more pages are drawn without them."""


PROTECTION_NAMES = {
    windows.PAGE_NOACCESS: "---",
    windows.PAGE_READONLY: "r--",
    windows.PAGE_READWRITE: "rw-",
    windows.PAGE_EXECUTE: "--x",
    windows.PAGE_EXECUTE_READ: "r-x",
    windows.PAGE_EXECUTE_READWRITE: "rwx",
}
"""Protections of Windows, as letters."""


class Frames:
    """Numbers for frames, in the order in which they are first seen, from 1; 0 is the page of zeros."""

    def __init__(self) -> None:
        self._numbers: dict[Frame, int] = {ZERO: 0}

    def number(self, frame: Frame) -> int:
        """Return a frame's number, the same for as long as this object lives."""
        return self._numbers.setdefault(frame, len(self._numbers))


def framed(space: AddressSpace) -> str:
    """Draw the page of a space as it is now in a frame, as notebooks show HTML."""
    return in_frame(_picture(space))


def bundle(space: AddressSpace) -> dict[str, str]:
    """Draw a space as it is now in each form that a notebook may ask for."""
    picture = _picture(space)
    return {"text/plain": repr(space), "text/html": in_frame(picture), "image/svg+xml": still(picture)}


def _picture(space: AddressSpace) -> Picture:
    now = sample(space, "now", Frames(), lambda _start: "")
    return Picture("AddressSpace", (now,), "a model of a process's memory")


def sample(
    space: AddressSpace,
    title: str,
    frames: Frames,
    label: Callable[[int], str],
) -> Sample:
    """Make a sample of a space as it is now.

    Args:
        space: Which.
        title: Of the sample.
        frames: Numbers the frames; the same for all samples in which a frame shall have the same name.
        label: Names a VMA that has no name, given its start.
    """
    programs = {vma.file for vma in space if vma.file is not None and vma.flags & VM_EXEC}
    rows = tuple(_row(space, vma, _kind(space, vma, programs), frames, label) for vma in space)
    return Sample(title, rows)


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


def _row(space: AddressSpace, vma: VMA, kind: str, frames: Frames, label: Callable[[int], str]) -> Row:
    sizes = space.sizes(vma.start, vma.end)
    pages = (vma.end - vma.start) // PAGE_SIZE
    return Row(
        vma.start,
        vma.end,
        kind,
        space.name_of(vma) or label(vma.start),
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


def windows_sample(space: WindowsSpace, title: str, label: Callable[[int], str]) -> Sample:
    """Make a sample of a Windows process: a row for each run of pages that ``VirtualQuery`` tells.

    Args:
        space: Which.
        title: Of the sample.
        label: Names a run, given its start.
    """
    rows = []
    at = 0
    while at < windows.HIGHEST:
        found = space.virtual_query(at)
        if found.state != windows.MEM_FREE:
            committed = found.state == windows.MEM_COMMIT
            protection = PROTECTION_NAMES[found.protect & ~windows.PAGE_GUARD] if committed else "---"
            rows.append(
                Row(
                    found.base,
                    found.base + found.size_bytes,
                    "private data" if committed else "reserved",
                    label(found.base) or ("" if committed else "reserved"),
                    protection + ("g" if found.protect & windows.PAGE_GUARD else ""),
                    found.size_bytes if committed else 0,
                    details=(("Reserved at", f"{found.allocation_base:#x}"),),
                )
            )
        at = found.base + found.size_bytes
    return Sample(title, tuple(rows))
