"""What ``/proc/PID/maps`` and ``smaps`` tell; the native core reads and parses the text."""

from __future__ import annotations

from operator import le
from typing import NamedTuple

from quire import _native

__all__ = ["Columns", "read", "without_repeats"]


class Columns(NamedTuple):
    """VMAs as they stand there, each list with an item for each VMA.

    Columns and not rows, because a process may have ten thousands of VMAs: an object less for each. Each
    means what the field of `quire.process.VMA` means, but that newlines in names are escaped.
    """

    start: list[int]
    end: list[int]
    protection: list[str]
    offset: list[int]
    major: list[int]
    minor: list[int]
    inode: list[int]
    name: list[bytes]
    keys: list[tuple[str, ...]]
    figures: list[bytes]
    texts: list[tuple[tuple[str, bytes], ...]]


def read(fd: int, problems: list[str]) -> Columns:
    """Read and parse an open ``maps`` or ``smaps`` to its end. Blocks, without the GIL.

    Args:
        fd: The file; it is borrowed.
        problems: What was not understood is added here, in words.

    Returns:
        The VMAs in the order of the text. From ``maps`` they have no figures.

    Raises:
        OSError: The kernel's, of ``read``.
    """
    start, end, protection, file, details, unknown = _native.read_maps(fd)
    problems += (f"a line is none that this version knows: {line[:200]!r}" for line in unknown)
    return Columns(start, end, protection, *file, *details)


def without_repeats(columns: Columns, problems: list[str]) -> Columns:
    """Drop VMAs that were read again after they had changed; keep what was read last.

    Args:
        columns: In the order in which they were read.
        problems: What was dropped is added here, in words.

    Returns:
        Ascending VMAs, none overlapping another.
    """
    if all(map(le, columns.end, columns.start[1:])):
        return columns
    kept: list[int] = []
    ends = list(columns.end)
    changed = 0
    for place, start in enumerate(columns.start):
        while kept and columns.start[kept[-1]] >= start:
            kept.pop()
            changed += 1
        if kept and ends[kept[-1]] > start:
            # The rest of the older one may still be there. Its figures stay those of the whole.
            ends[kept[-1]] = start
            changed += 1
        kept.append(place)
    problems.append(f"{changed} VMAs changed while they were read; they are given as they were read last")
    chosen = [[column[place] for place in kept] for column in columns._replace(end=ends)]
    return Columns._make(chosen)
