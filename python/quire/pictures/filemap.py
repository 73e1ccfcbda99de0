"""A file on one side, memory on the other: which bytes become which addresses.

The data is neutral: whoever draws says what the ranges are. Heights in the picture are no scale: a range gets
the more room the longer it is, but by its logarithm, so that a page is seen beside a megabyte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from quire.pictures.palette import Tone, slug
from quire.pictures.svg import CHARACTER, Svg, fitted
from quire.pictures.text import address, size

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TONES", "FileMap", "FilePart", "MemoryRange", "few", "svg"]

TONES: dict[str, Tone] = {
    each.kind: each
    for each in (
        Tone("code", "#0072b2", "#3d9ad1", "", "X"),
        Tone("constants", "#56b4e9", "#8ccbf0", "", "R"),
        Tone("relro", "#e69f00", "#f0b53c", "", "L"),
        Tone("data", "#d55e00", "#ef7d2a", "", "W"),
        Tone("zeros", "#d6d9de", "#4b5563", "stripes", "0"),
        Tone("reserved", "#d6d9de", "#4b5563", "crosses", "x"),
        Tone("not loaded", "#d6d9de", "#4b5563", "dots", "."),
    )
}
"""What ranges of a program are."""
MEANINGS = {
    "code": "code: may be executed",
    "constants": "constants: read only",
    "relro": "relro: written by relocation, then read only",
    "data": "data: may be written",
    "zeros": "zeros: not from the file",
    "reserved": "reserved: no access",
    "not loaded": "not loaded: in the file alone",
}
"""What the kinds mean, for legends."""


class MemoryRange(NamedTuple):
    """A range of memory. Addresses and offsets are in bytes, ends are exclusive."""

    start: int
    end: int
    kind: str
    """One of `TONES`."""
    protection: str
    """As ``r-x``."""
    label: str
    """What is in it, for people."""
    offset: int | None
    """Where in the file its first byte comes from; None if it does not come from there."""


class FilePart(NamedTuple):
    """A range of the file that has a name and is not in memory."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, slots=True)
class FileMap:
    """What is drawn.

    Attributes:
        title: The file's name.
        subtitle: What it is.
        file_size: In bytes.
        ranges: Sorted by address, without overlap; what is between them is not mapped.
        rest: Parts of the file that have names and are not in memory, in any order. They may overlap others.
        entry: Address of the first instruction.
    """

    title: str
    subtitle: str
    file_size: int
    ranges: Sequence[MemoryRange]
    rest: Sequence[FilePart] = ()
    entry: int | None = None

    def holes(self) -> list[tuple[int, int]]:
        """List the ranges between those that are mapped; ends are exclusive."""
        pairs = zip(self.ranges, self.ranges[1:], strict=False)
        return [(low.end, high.start) for low, high in pairs if low.end < high.start]

    def loaded(self) -> list[tuple[tuple[int, int], MemoryRange]]:
        """List the parts of the file that are in memory, start and exclusive end, and where they are."""
        return [
            ((each.offset, each.offset + each.end - each.start), each)
            for each in self.ranges
            if each.offset is not None
        ]

    def unloaded(self) -> list[FilePart]:
        """List what of the file is in no range, with the names of what lies there."""
        loaded = sorted(
            (each.offset, each.offset + each.end - each.start)
            for each in self.ranges
            if each.offset is not None
        )
        found, at = [], 0
        for start, end in [*loaded, (self.file_size, self.file_size)]:
            if start > at:
                found.append(FilePart(at, start, self._names(at, start)))
            at = max(at, end)
        return found

    def _names(self, start: int, end: int) -> str:
        return few([part.label for part in self.rest if start <= part.start and part.end <= end])


def few(names: Sequence[str]) -> str:
    """Write names, each once, and how many more there are where there are many."""
    names = [*dict.fromkeys(names)]
    more = f" and {len(names) - _NAMES_MAX} more" if len(names) > _NAMES_MAX else ""
    return " ".join(names[:_NAMES_MAX]) + more


_NAMES_MAX = 12
_WIDTH, _MARGIN, _TOP = 960, 24, 84
_FILE_X, _FILE_WIDTH = 150, 190
_MEMORY_X, _MEMORY_WIDTH = 500, 190
_LEAST, _GAP, _HOLE = 34, 6, 30


class _Box(NamedTuple):
    """A block on one side of the picture."""

    y: float
    height: float
    start: int
    end: int
    kind: str
    label: str
    protection: str = ""
    shows: MemoryRange | None = None
    """The range of memory that it is, or that is made of it."""


def svg(drawn: FileMap) -> str:
    """Draw the file on the left, memory on the right, low addresses first, and ribbons between them.

    Returns:
        A document that stands alone, for light and dark backgrounds.
    """
    parts: list[tuple[tuple[int, int], MemoryRange | FilePart]] = [*drawn.loaded()]
    parts += [((part.start, part.end), part) for part in drawn.unloaded()]
    parts.sort(key=lambda part: part[0])
    file_boxes, file_end = _stacked(parts)
    memory, memory_end = _memory(drawn)
    bottom = max(file_end, memory_end)
    canvas = Svg(
        _WIDTH,
        bottom,
        title=f"{drawn.title}: file and memory",
        description=f"{drawn.subtitle}. Left the file, right the addresses that its parts are mapped to.",
        tones=TONES.values(),
    )
    canvas.text(
        _MARGIN, 26, fitted(drawn.title, _WIDTH - 2 * _MARGIN, font_px=15, keep_end=True), style="title"
    )
    canvas.text(_MARGIN, 46, fitted(drawn.subtitle, _WIDTH - 2 * _MARGIN), style="faint")
    canvas.text(_FILE_X, _TOP - 10, f"file, {size(drawn.file_size)}", style="faint")
    span = drawn.ranges[-1].end - drawn.ranges[0].start if drawn.ranges else 0
    canvas.text(_MEMORY_X, _TOP - 10, f"memory, {size(span)} of addresses", style="faint")
    _ribbons(canvas, file_boxes, memory)
    for box in file_boxes:
        _draw(canvas, box, _FILE_X, _FILE_WIDTH)
        canvas.text(_FILE_X - 8, box.y + 12, address(box.start), style="small", anchor="end")
    for box in memory:
        if box.kind == "hole":
            text = f"not mapped: {size(box.end - box.start)}"
            canvas.text(_MEMORY_X + 10, box.y + box.height / 2 + 4, text, style="faint small")
            continue
        _draw(canvas, box, _MEMORY_X, _MEMORY_WIDTH)
        x = _MEMORY_X + _MEMORY_WIDTH + 10
        canvas.text(x, box.y + 12, f"{address(box.start)}  {box.protection}", style="small")
        canvas.text(x, box.y + 26, fitted(box.label, _WIDTH - _MARGIN - x, font_px=10), style="small faint")
    _entry(canvas, drawn, memory)
    canvas.height = _legend(canvas, drawn, bottom + 24)
    return canvas.render()


def _height(length: int) -> float:
    """Give a page the least height and each doubling a few pixels more."""
    return _LEAST + 5 * max(0.0, math.log2(max(1, length) / 4096))


def _stacked(
    parts: list[tuple[tuple[int, int], MemoryRange | FilePart]],
) -> tuple[list[_Box], float]:
    """Put the file's parts below each other. What several ranges show is there once for each."""
    boxes, y = [], float(_TOP)
    for (start, end), each in parts:
        height = _height(end - start)
        kind = each.kind if isinstance(each, MemoryRange) else "not loaded"
        shows = each if isinstance(each, MemoryRange) else None
        boxes.append(_Box(y, height, start, end, kind, each.label, shows=shows))
        y += height + _GAP
    return boxes, y


def _memory(drawn: FileMap) -> tuple[list[_Box], float]:
    boxes, y = [], float(_TOP)
    holes = dict(drawn.holes())
    for each in drawn.ranges:
        height = _height(each.end - each.start)
        boxes.append(_Box(y, height, each.start, each.end, each.kind, each.label, each.protection, each))
        y += height + (_GAP if each.end in holes else 1)
        if each.end in holes:
            boxes.append(_Box(y, _HOLE, each.end, holes[each.end], "hole", ""))
            y += _HOLE + _GAP
    return boxes, y


def _draw(canvas: Svg, box: _Box, x: float, width: float) -> None:
    hint = f"{address(box.start)} to {address(box.end)}, {size(box.end - box.start)}; {box.label}"
    canvas.block(x, box.y, width, box.height, box.kind, hint=hint)
    text = f"{box.kind}, {size(box.end - box.start)}"
    text = fitted(text, width - 16)
    if TONES[box.kind].hatch:
        # Text on a hatch needs a ground of its own.
        ground = {"x": x + 4, "y": box.y + 4, "width": len(text) * 12 * CHARACTER + 8, "height": 18}
        canvas.add("rect", {**ground, "class": slug(box.kind)})
    canvas.text(x + 8, box.y + 17, text, style=f"{slug(box.kind)}-ink")


def _ribbons(canvas: Svg, file_boxes: Sequence[_Box], memory: Sequence[_Box]) -> None:
    left, right = _FILE_X + _FILE_WIDTH, _MEMORY_X
    middle = (left + right) / 2
    targets = {id(box.shows): box for box in memory}
    for source in file_boxes:
        target = targets.get(id(source.shows))
        if source.shows is None or target is None:
            continue
        top, low = source.y, source.y + source.height
        to, end = target.y, target.y + target.height
        path = (
            f"M{left} {top:.1f} C{middle} {top:.1f} {middle} {to:.1f} {right} {to:.1f} "
            f"L{right} {end:.1f} C{middle} {end:.1f} {middle} {low:.1f} {left} {low:.1f} Z"
        )
        canvas.add("path", {"d": path, "class": slug(target.kind), "fill-opacity": 0.3})


def _entry(canvas: Svg, drawn: FileMap, memory: Sequence[_Box]) -> None:
    if drawn.entry is None:
        return
    box = next((box for box in memory if box.start <= drawn.entry < box.end and box.kind != "hole"), None)
    if box is not None:
        share = (drawn.entry - box.start) / (box.end - box.start)
        y = box.y + share * box.height
        tip = f"M{_MEMORY_X} {y:.1f}"
        canvas.add("path", {"d": f"{tip} h-14 {tip} l-6 -4 {tip} l-6 4", "class": "line"})
        canvas.text(_MEMORY_X - 18, y + 4, "entry", style="small", anchor="end")


def _legend(canvas: Svg, drawn: FileMap, y: float) -> float:
    """Explain the kinds that occur; the height of the whole picture."""
    kinds = {each.kind for each in drawn.ranges} | ({"not loaded"} if drawn.unloaded() else set())
    x = float(_MARGIN)
    for kind in (kind for kind in TONES if kind in kinds):
        width = 24 + len(MEANINGS[kind]) * 10 * CHARACTER + 16
        if x + width > _WIDTH - _MARGIN:
            x, y = float(_MARGIN), y + 20
        canvas.block(x, y - 10, 18, 12, kind)
        canvas.text(x + 24, y, MEANINGS[kind], style="small")
        x += width
    return y + 20
