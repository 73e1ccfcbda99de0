"""A file against memory, in a terminal: one row for each range, with a strip for each side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from quire.pictures.filemap import MEANINGS, TONES
from quire.pictures.text import address, printable, size

if TYPE_CHECKING:
    from quire.pictures.filemap import FileMap

__all__ = ["legend", "table"]

_STRIP_MIN, _STRIP_MAX = 8, 20
# What a row takes beside its strips and its last column, and what that is to have.
_FIXED, _LABEL = 42, 36


def table(drawn: FileMap, width: int) -> Table:
    """Lay out the ranges, low addresses first, then what of the file is not in memory.

    Args:
        drawn: What is drawn.
        width: Columns of the terminal.
    """
    strip = min(_STRIP_MAX, max(_STRIP_MIN, (width - _FIXED - _LABEL) // 2))
    out = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, width=width)
    out.add_column("file", no_wrap=True, width=strip)
    out.add_column("offset", justify="right", no_wrap=True)
    out.add_column("size", justify="right", no_wrap=True)
    out.add_column("memory", no_wrap=True, width=strip)
    out.add_column("address", justify="right", no_wrap=True)
    out.add_column("", no_wrap=True)
    out.add_column("what", ratio=1)
    first = drawn.ranges[0].start if drawn.ranges else 0
    span = max(1, drawn.ranges[-1].end - first) if drawn.ranges else 1
    file_size = max(1, drawn.file_size)
    holes = dict(drawn.holes())
    for each in drawn.ranges:
        length = each.end - each.start
        colour = TONES[each.kind].light
        label = Text(each.kind, style=f"bold {_readable(colour)}")
        if each.label:
            label.append(f" {printable(each.label)}", style="not bold default")
        out.add_row(
            _strip(strip, each.offset, length, file_size, colour),
            "" if each.offset is None else address(each.offset),
            size(length),
            _strip(strip, each.start - first, length, span, colour),
            address(each.start),
            each.protection,
            label,
        )
        if each.end in holes:
            hole = holes[each.end] - each.end
            out.add_row("", "", size(hole), "", address(each.end), "", Text("not mapped", style="dim"))
    for part in drawn.unloaded():
        label = Text("not loaded", style="dim bold")
        label.append(f" {printable(part.label)}", style="not bold")
        length = part.end - part.start
        out.add_row(
            _strip(strip, part.start, length, file_size, "grey50"),
            address(part.start),
            size(length),
            "",
            "",
            "",
            label,
        )
    return out


def legend(drawn: FileMap) -> Text:
    """Say what the kinds that occur mean."""
    kinds = {each.kind for each in drawn.ranges}
    return Text("; ".join(MEANINGS[kind] for kind in TONES if kind in kinds), style="dim")


def _strip(width: int, start: int | None, length: int, whole: int, colour: str) -> Text:
    """Show which part of a whole a range is; at least one cell."""
    if start is None:
        return Text("")
    low = min(width - 1, start * width // whole)
    high = max(low + 1, min(width, -(-(start + length) * width // whole)))
    strip = Text("·" * low, style="dim")
    strip.append("█" * (high - low), style=f"not dim {_readable(colour)}")
    strip.append("·" * (width - high), style="dim")
    return strip


def _readable(colour: str) -> str:
    """Leave out colours that would be too pale on a white terminal."""
    return "grey50" if colour == TONES["zeros"].light else colour
