"""A lesson as a strip of pictures: one operation below the other, on one line of addresses."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from quire.pictures.axis import Axis
from quire.pictures.palette import tone
from quire.pictures.still import draw_line, draw_ticks
from quire.pictures.svg import CHARACTER, Svg, fitted
from quire.pictures.text import address, frame_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.pictures.model import Row, Sample, Step

__all__ = ["strip"]

_WIDTH = 1000
_MARGIN = 20
_LINE = 40
_CELL = 16
_CELL_AT_LEAST = 5
_CELLS = {"single": "page of one space", "several": "page of several", "line": "no page; 0: that of zeros"}


def strip(title: str, lesson: Sequence[Step], subtitle: str = "") -> str:
    """Draw steps as SVG.

    Rows have their pages below them where there is room: a box for each, filled if a frame is there, with the
    frame's name. The same name in two places is the same memory.

    Raises:
        ValueError: There is no step.
    """
    if not lesson:
        raise ValueError("a strip needs one step at least")
    rows = [row for step in lesson for panel in step.panels for row in panel.rows]
    axis = Axis(rows)
    kinds = sorted({row.kind for row in rows})
    told = " ".join(f"{number}. {step.title}: {'; '.join(step.notes)}" for number, step in enumerate(lesson))
    svg = Svg(_WIDTH, 0, title=title, description=told, tones=[tone(kind) for kind in kinds])
    svg.text(_MARGIN, 30, title, style="title")
    y = 48.0
    if subtitle:
        for line in textwrap.wrap(subtitle, 125):
            svg.text(_MARGIN, y, line, style="faint")
            y += 16
    y = _legend(svg, kinds, rows, y + 4)
    for number, step in enumerate(lesson):
        y = _step(svg, number, step, axis, y)
    svg.height = y
    return svg.render()


def _legend(svg: Svg, kinds: Sequence[str], rows: Sequence[Row], y: float) -> float:
    x = float(_MARGIN)
    for kind in kinds:
        svg.block(x, y - 10, 12, 12, kind)
        svg.text(x + 18, y, kind, style="faint")
        x += 40 + len(kind) * 12 * CHARACTER
    if any(row.pages is not None and any(frame is not None for frame in row.pages.frames) for row in rows):
        for style, text in _CELLS.items():
            svg.add("rect", {"x": x + 1, "y": y - 9, "width": 18, "height": 11, "class": style})
            svg.text(x + 26, y, text, style="faint")
            x += 48 + len(text) * 12 * CHARACTER
    return y + 20


def _step(svg: Svg, number: int, step: Step, axis: Axis, y: float) -> float:
    svg.add("path", {"class": "line", "d": f"M{_MARGIN} {y:.1f}H{_WIDTH - _MARGIN}", "stroke-opacity": 0.4})
    y += 20
    svg.text(_MARGIN, y, str(number), style="faint")
    svg.text(_MARGIN + 24, y, fitted(step.title, _WIDTH - 2 * _MARGIN - 24, font_px=15), style="title")
    told = "bad" if step.failed else "faint"
    for text, style in [*((said, "") for said in step.said), *((note, told) for note in step.notes)]:
        for line in textwrap.wrap(text, 122, subsequent_indent="  "):
            y += 16
            svg.text(_MARGIN + 24, y, line, style=style)
    y += 12
    for panel in step.panels:
        if len(step.panels) > 1:
            y += 10
            svg.text(_MARGIN, y, panel.title)
            y += 8
        y = _panel(svg, panel, axis, y)
    return y + 4


def _panel(svg: Svg, panel: Sample, axis: Axis, y: float) -> float:
    width = _WIDTH - 2 * _MARGIN
    for start, end in panel.marks:
        left, right = (_MARGIN + width * axis.place(at) for at in (start, end))
        hint = f"{address(start)}-{end:x}"
        svg.add(
            "rect",
            {"x": left, "y": y, "width": max(3, right - left), "height": 4, "class": "mark"},
            hint=hint,
        )
    y += 6
    svg.add("path", {"class": "line", "d": f"M{_MARGIN} {y + _LINE:.1f}h{width}", "stroke-opacity": 0.5})
    draw_line(svg, panel.rows, axis, _MARGIN, y, width, _LINE, sizes=True)
    y += _LINE
    below = max((_cells(svg, row, axis, y) for row in panel.rows), default=0)
    draw_ticks(svg, panel.rows, axis, _MARGIN, y + below, width)
    return y + below + 26


def _cells(svg: Svg, row: Row, axis: Axis, y: float) -> float:
    """Draw the pages of a row; return the height that took, 0 if there was no room or nothing to draw."""
    pages = row.pages
    if pages is None or not any(frame is not None for frame in pages.frames):
        return 0
    left, right = (_MARGIN + (_WIDTH - 2 * _MARGIN) * axis.place(at) for at in (row.start, row.end))
    each = (right - left) / len(pages.frames)
    if each < _CELL_AT_LEAST:
        return 0
    for number, frame in enumerate(pages.frames):
        box: dict[str, float | str] = {
            "x": left + number * each + 1,
            "y": y + 3,
            "width": max(each - 2, 2),
            "height": _CELL,
        }
        several = frame is not None and bool(pages.shared[number])
        style = "line" if not frame else "several" if several else "single"
        svg.add("rect", {**box, "class": style})
        if frame is not None and each > len(name := frame_name(frame)) * 10 * CHARACTER + 4:
            at: dict[str, float | str] = {"x": left + (number + 0.5) * each, "y": y + 15}
            ink = " single-ink" if style == "single" else ""
            svg.add("text", {**at, "text-anchor": "middle", "class": f"small{ink}"}, name)
    return _CELL + 5
