"""What ``/proc/PID/maps`` and ``smaps`` tell; the text itself is parsed by the native core."""

from __future__ import annotations

from operator import itemgetter, le
from typing import Final

from quire import _native

__all__ = ["END", "NAME", "START", "Row", "parse", "without_repeats"]

Row = tuple[int, int, str, int, int, int, int, bytes, tuple[str, ...], bytes, tuple[tuple[str, bytes], ...]]
"""One VMA as it stands there; the fields are those of `quire.process.VMA`, without the kind."""

START: Final = 0
END: Final = 1
NAME: Final = 7
"""Places in a row."""


def parse(text: bytes, problems: list[str]) -> list[Row]:
    """Parse the whole content of ``maps`` or ``smaps``, without the GIL.

    Args:
        text: The content.
        problems: What was not understood is added here, in words.

    Returns:
        The VMAs as they stand there, with newlines in names escaped. From ``maps`` they have no figures.
    """
    rows, unknown = _native.parse_maps(text)
    problems += (f"a line is none that this version knows: {line[:200]!r}" for line in unknown)
    return rows


def without_repeats(rows: list[Row], problems: list[str]) -> list[Row]:
    """Drop VMAs that were read again after they had changed; keep what was read last.

    Args:
        rows: In the order in which they were read.
        problems: What was dropped is added here, in words.

    Returns:
        Ascending rows, none overlapping another.
    """
    if all(map(le, map(itemgetter(END), rows), map(itemgetter(START), rows[1:]))):
        return rows
    kept: list[Row] = []
    changed = 0
    for row in rows:
        start = row[START]
        while kept and kept[-1][START] >= start:
            kept.pop()
            changed += 1
        if kept and kept[-1][END] > start:
            # The rest of the older one may still be there. Its figures stay those of the whole.
            kept[-1] = (kept[-1][START], start, *kept[-1][2:])
            changed += 1
        kept.append(row)
    problems.append(f"{changed} VMAs changed while they were read; they are given as they were read last")
    return kept
