"""A space as /proc shows one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.space.constants import PAGE_SHIFT

if TYPE_CHECKING:
    from quire.space.state import State
    from quire.space.vma import VMA


def name_of(state: State, vma: VMA) -> str:
    """Return the name of a VMA in a map: a path, ``[heap]``, or nothing."""
    if vma.file is not None:
        return vma.file.name
    if vma.start < state.brk_now and vma.end > state.brk_start:
        return "[heap]"
    return ""


def maps_text(state: State) -> str:
    """Return the lines of /proc/PID/maps, where names begin in column 73."""
    lines = []
    brk_start, brk_now = state.brk_start, state.brk_now
    for vma in state.tree:
        protection = vma.protection
        file = vma.file
        if file is not None:
            major, minor = file.device
            offset = vma.pgoff << PAGE_SHIFT
            place = f"{vma.start:08x}-{vma.end:08x} {protection} {offset:08x}"
            head = f"{place} {major:02x}:{minor:02x} {file.inode} "
            lines.append(f"{head:<73}{file.name}\n")
        elif vma.start < brk_now and vma.end > brk_start:
            head = f"{vma.start:08x}-{vma.end:08x} {protection} 00000000 00:00 0 "
            lines.append(f"{head:<73}[heap]\n")
        else:
            lines.append(f"{vma.start:08x}-{vma.end:08x} {protection} 00000000 00:00 0 \n")
    return "".join(lines)
