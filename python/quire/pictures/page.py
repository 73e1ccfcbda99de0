"""A page that stands alone: HTML with its style, script and data inside, which loads nothing.

The script is by hand: page.js (state, bars, table) and page_canvas.js (what is drawn on canvases). Data are
JSON in an element that is not executed; a policy in the page allows just the script and style whose hashes it
names, so that nothing else could run if anything got in.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from functools import cache
from importlib.resources import files
from itertools import groupby
from string import Template
from typing import TYPE_CHECKING, Any

from quire.pictures.axis import Axis
from quire.pictures.model import PAGE, Sample, changes
from quire.pictures.palette import ADDED, EXCLUSIVE, KINDS, REMOVED, SHARED, SWAPPED, ink, tone
from quire.pictures.text import frame_name, printable

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from quire.pictures.model import Pages, Picture, Row

__all__ = ["frame", "page"]

_FIGURES = ("committed", "resident", "proportional", "dirty", "swapped")
_LAYERS = ("resident", "shared", "swapped", "written")


def page(picture: Picture) -> str:
    """Draw a picture as a page.

    Args:
        picture: One sample, or several for a timeline; with at least one of them.

    Returns:
        An HTML document, to be saved as UTF-8. It loads nothing, and what names contain is shown, never
        interpreted.

    Raises:
        ValueError: There is no sample, or an address is not at a page's boundary.
    """
    if not picture.samples:
        raise ValueError("a page needs one sample at least")
    style = _read("page.css")
    script = _read("page.js") + _read("page_canvas.js")
    return Template(_read("page.html")).substitute(
        title=html.escape(printable(picture.title)),
        subtitle=html.escape(printable(picture.subtitle)),
        footer="Drawn by quire. This page loads nothing.",
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=_inline(_data(picture)),
    )


def frame(picture: Picture, height_px: int = 720) -> str:
    """Draw a picture as an ``<iframe>`` that holds the page, as notebooks need: nothing of it gets out."""
    return (
        f'<iframe sandbox="allow-scripts" width="100%" height="{height_px}" style="border: 0"'
        f' title="{html.escape(printable(picture.title))}" srcdoc="{html.escape(page(picture))}"></iframe>'
    )


@cache
def _read(name: str) -> str:
    return files("quire.pictures").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inline(data: Any) -> str:
    """Write JSON that no HTML parser sees markup in."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class _Numbers:
    """Numbers for values, in the order in which they are first seen."""

    def __init__(self, values: Iterable[Hashable] = ()) -> None:
        self.of: dict[Any, int] = {}
        for value in values:
            self(value)

    def __call__(self, value: Hashable) -> int:
        return self.of.setdefault(value, len(self.of))


def _pages(address: int) -> int:
    number, rest = divmod(address, PAGE)
    if rest:
        raise ValueError(f"{address:#x} is not at the boundary of a page")
    return number


def _data(picture: Picture) -> dict[str, Any]:
    """Say what page.js draws: tables of distinct rows, names and so on, and samples as runs of row numbers.

    Addresses are numbers of pages, which JavaScript's numbers hold exactly.
    """
    rows = _Numbers(row for sample in picture.samples for row in sample.rows)
    totals = [sample.totals() for sample in picture.samples]
    seen = {total.kind for sums in totals for total in sums}
    order = [kind for kind in KINDS if kind in seen] + sorted(seen - set(KINDS))
    kinds = _Numbers(order)
    names, protections, details = _Numbers(), _Numbers(), _Numbers()
    columns: dict[str, list[Any]] = {
        "start": [_pages(row.start) for row in rows.of],
        "end": [_pages(row.end) for row in rows.of],
        "kind": [kinds(row.kind) for row in rows.of],
        "name": [names(printable(row.name)) for row in rows.of],
        "protection": [protections(printable(row.protection)) for row in rows.of],
        "details": [
            details(tuple((printable(label), printable(text)) for label, text in row.details))
            for row in rows.of
        ],
    }
    for figure in _FIGURES:
        columns[figure] = [getattr(row, figure) for row in rows.of]
    axis = Axis(rows.of)
    first = picture.samples[0]
    befores = (None, *picture.samples)
    return {
        "page_bytes": PAGE,
        "kinds": [_kind(kind) for kind in order],
        "rows": columns,
        "names": list(names.of),
        "protections": list(protections.of),
        "details": list(details.of),
        "figures": [figure for figure in _FIGURES if any(columns[figure])],
        "pages": {number: _cells(row.pages) for row, number in rows.of.items() if row.pages is not None},
        "samples": [
            {
                "title": printable(sample.title),
                "time": sample.time_s,
                "note": printable(sample.note),
                "rows": _runs([rows(row) for row in sample.rows]),
                "extra": [[kinds(total.kind), *total[1:]] for total in sample.extra],
                "marks": [[_pages(start), _pages(end)] for start, end in sample.marks],
                "previous": _changes(before, sample, rows),
                "first": _changes(first, sample, rows),
            }
            for before, sample in zip(befores, picture.samples, strict=False)
        ],
        "sums": {
            metric: [
                [next((getattr(each, metric) for each in sums if each.kind == kind), 0) for kind in order]
                for sums in totals
            ]
            for metric in ("virtual", "committed", "resident")
        },
        "axis": {
            "addresses": [_pages(address) for address in axis.addresses],
            "places": [round(place, 9) for place in axis.places],
            "gaps": [[_pages(gap.start), _pages(gap.end)] for gap in axis.gaps],
        },
        "added": ADDED,
        "removed": REMOVED,
        "exclusive": EXCLUSIVE,
        "shared": SHARED,
        "swapped": SWAPPED,
    }


def _kind(kind: str) -> dict[str, str]:
    look = tone(kind)
    return {
        "name": printable(kind),
        "light": look.light,
        "dark": look.dark,
        "ink_light": ink(look.light),
        "ink_dark": ink(look.dark),
        "hatch": look.hatch,
    }


def _runs(numbers: list[int]) -> list[int]:
    """Write ascending stretches as pairs of the first number and how many follow each other."""
    runs: list[int] = []
    for number in numbers:
        if runs and number == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += (number, 1)
    return runs


def _changes(before: Sample | None, after: Sample, rows: _Numbers) -> list[int]:
    """Write changes as pairs of row numbers, -1 for none."""
    if before is None or before is after:
        return []

    def number(row: Row | None) -> int:
        return -1 if row is None else rows(row)

    found = changes(before.rows, after.rows)
    return [each for change in found for each in (number(change.before), number(change.after))]


def _cells(pages: Pages) -> dict[str, Any]:
    cells: dict[str, Any] = {"per_cell": pages.pages_per_cell}
    for layer in _LAYERS:
        if getattr(pages, layer):
            cells[layer] = _shortened(getattr(pages, layer))
    if pages.frames:
        cells["frames"] = [None if number is None else frame_name(number) for number in pages.frames]
    return cells


def _shortened(levels: bytes) -> str:
    """Write levels as hexadecimal digits, one that repeats with its number in parentheses."""
    parts = []
    for level, same in groupby(levels):
        times = sum(1 for _ in same)
        parts.append(f"{level:x}({times})" if times > 3 else f"{level:x}" * times)
    return "".join(parts)
