"""An address space as one static picture: bars, the line of addresses, the largest mappings, the course."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.pictures.axis import Axis
from quire.pictures.model import changes
from quire.pictures.palette import slug, tone
from quire.pictures.svg import CHARACTER, Svg, fitted
from quire.pictures.text import address, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.pictures.model import Picture, Row, Sample

__all__ = ["draw_line", "draw_ticks", "still"]

_WIDTH = 1100
_MARGIN = 20
_LARGEST = 24
_CHANGED = 16
_METRICS = ("virtual", "committed", "resident")


def still(picture: Picture) -> str:
    """Draw a picture as SVG.

    Of several samples the last is drawn in full, after the course of the resident bytes and before what
    changed since the first.

    Raises:
        ValueError: There is no sample.
    """
    if not picture.samples:
        raise ValueError("a picture needs one sample at least")
    last = picture.samples[-1]
    kinds = {total.kind for sample in picture.samples for total in sample.totals()}
    svg = Svg(
        _WIDTH,
        0,
        title=picture.title,
        description=f"{picture.subtitle}. " + ". ".join(_described(last)),
        tones=[tone(kind) for kind in sorted(kinds)],
    )
    svg.text(_MARGIN, 30, picture.title, style="title")
    svg.text(_MARGIN, 48, picture.subtitle, style="faint")
    y = 66.0
    if last.note:
        svg.text(_MARGIN, y + 8, fitted(last.note, _WIDTH - 2 * _MARGIN), style="bad")
        y += 22
    if len(picture.samples) > 1:
        y = _course(svg, picture.samples, y)
    y = _bars(svg, last, y)
    axis = Axis(last.rows)
    draw_line(svg, last.rows, axis, _MARGIN, y, _WIDTH - 2 * _MARGIN, 40)
    draw_ticks(svg, last.rows, axis, _MARGIN, y + 40, _WIDTH - 2 * _MARGIN)
    y = _largest(svg, last.rows, y + 84)
    if len(picture.samples) > 1:
        y = _changed(svg, picture.samples[0], last, y + 10)
    svg.height = y + 6
    return svg.render()


def _described(sample: Sample) -> list[str]:
    return [
        f"{total.kind}: {total.mappings} mappings, {size(total.virtual)} virtual,"
        f" {size(total.resident)} resident"
        for total in sample.totals()
    ]


def _bars(svg: Svg, sample: Sample, y: float) -> float:
    totals = sample.totals()
    left, room = 190, _WIDTH - _MARGIN - 190
    for metric in _METRICS:
        counts = {total.kind: getattr(total, metric) for total in totals}
        whole = sum(counts.values())
        svg.text(_MARGIN, y + 16, metric)
        svg.text(left - 12, y + 16, size(whole), anchor="end")
        x = float(left)
        for kind, count in counts.items():
            width = room * count / whole if whole else 0
            if width > 0:
                svg.block(x, y, max(width - 1, 0.5), 22, kind, hint=f"{kind}: {size(count)}")
                if not tone(kind).hatch and (label := fitted(kind, width - 8)):
                    svg.text(x + 5, y + 15, label, style=f"{slug(kind)}-ink")
            x += width
        y += 28
    y += 14
    columns = (190, 360, 470, 590, 710)
    for at, name in zip(columns[1:], ("mappings", *_METRICS), strict=True):
        svg.text(at, y, name, style="faint", anchor="end")
    for total in totals:
        y += 18
        svg.block(columns[0], y - 10, 12, 12, total.kind)
        svg.text(columns[0] + 20, y, total.kind)
        figures = [str(total.mappings), *(size(getattr(total, metric)) for metric in _METRICS)]
        for at, figure in zip(columns[1:], figures, strict=True):
            svg.text(at, y, figure, anchor="end")
    return y + 22


def draw_line(
    svg: Svg,
    rows: Sequence[Row],
    axis: Axis,
    x: float,
    y: float,
    width: float,
    height: float,
    *,
    sizes: bool = False,
) -> None:
    """Draw rows and shortened gaps on a line of addresses.

    Args:
        svg: Where.
        rows: In the order of addresses.
        axis: Says where an address is.
        x: Left end of the line.
        y: Its upper edge.
        width: Its width.
        height: Its height.
        sizes: Write size and protection under each name, where it fits.
    """
    for gap in axis.gaps:
        middle = x + width * (axis.place(gap.start) + axis.place(gap.end)) / 2
        zigzag = " ".join(f"L{middle + (3 if n % 2 else -3):.1f} {y + n * height / 8:.1f}" for n in range(9))
        svg.add(
            "path", {"class": "line", "d": f"M{zigzag[1:]}"}, hint=f"{size(gap.end - gap.start)} of nothing"
        )
    for row in rows:
        left, right = (x + width * axis.place(at) for at in (row.start, row.end))
        room = max(right - left - 0.7, 0.5)
        name = row.name.rsplit("/", 1)[-1] or row.kind
        hint = f"{address(row.start)}-{row.end:x} {row.protection} {size(row.size)} {row.kind} {row.name}"
        svg.block(left, y, room, height, row.kind, hint=hint.rstrip())
        lines = [name, f"{row.protection} {size(row.size)}"] if sizes else [name]
        for number, text in enumerate(lines):
            label = fitted(text, room - 6)
            if label:
                baseline = y + height / 2 + 4 + 15 * (number - (len(lines) - 1) / 2)
                if tone(row.kind).hatch:
                    box = {
                        "x": left + 2,
                        "y": baseline - 11,
                        "width": len(label) * 12 * CHARACTER + 4,
                        "height": 15,
                    }
                    svg.add("rect", {**box, "class": "page"})
                    svg.text(left + 4, baseline, label)
                else:
                    svg.text(left + 4, baseline, label, style=f"{slug(row.kind)}-ink")


def draw_ticks(svg: Svg, rows: Sequence[Row], axis: Axis, x: float, y: float, width: float) -> None:
    """Write as many starts and ends of rows below a line as have room."""
    free = x - 1
    for bound in sorted({bound for row in rows for bound in (row.start, row.end)}):
        text = address(bound)
        at = x + width * axis.place(bound)
        wide = len(text) * 10 * CHARACTER
        left = min(max(x, at - wide / 2), x + width - wide)
        if left > free:
            svg.add("path", {"class": "line", "d": f"M{at:.1f} {y:.1f}v5"})
            svg.text(left, y + 15, text, style="faint small")
            free = left + wide + 8


def _largest(svg: Svg, rows: Sequence[Row], y: float) -> float:
    ranked = sorted(rows, key=lambda row: (row.resident or 0, row.size), reverse=True)[:_LARGEST]
    more = f", the {len(ranked)} largest of {len(rows)}" if len(ranked) < len(rows) else ""
    svg.text(_MARGIN, y, f"Mappings{more}", style="title")
    return _rows(svg, [(row, "") for row in ranked], y + 20)


def _changed(svg: Svg, first: Sample, last: Sample, y: float) -> float:
    found = changes(first.rows, last.rows)
    svg.text(_MARGIN, y, f"Changed from {first.title} to {last.title}: {len(found)} mappings", style="title")

    def growth(change: tuple[Row | None, Row | None]) -> int:
        before, after = change
        return abs((after.resident or 0 if after else 0) - (before.resident or 0 if before else 0))

    largest = sorted(found, key=growth, reverse=True)[:_CHANGED]
    return _rows(
        svg, [(row, change.verb) for change in largest if (row := change.after or change.before)], y + 20
    )


def _rows(svg: Svg, rows: Sequence[tuple[Row, str]], y: float) -> float:
    columns = {"size": 350, "resident": 440}
    svg.text(_MARGIN + 18, y, "address", style="faint")
    for name, at in columns.items():
        svg.text(at, y, name, style="faint", anchor="end")
    svg.text(460, y, "prot", style="faint")
    svg.text(510, y, "name", style="faint")
    for row, verb in rows:
        y += 17
        svg.block(_MARGIN, y - 10, 11, 11, row.kind, hint=row.kind)
        svg.text(_MARGIN + 18, y, f"{row.start:x}-{row.end:x}")
        svg.text(columns["size"], y, size(row.size), anchor="end")
        svg.text(columns["resident"], y, "-" if row.resident is None else size(row.resident), anchor="end")
        svg.text(460, y, row.protection)
        text = f"{verb}  {row.name or row.kind}" if verb else row.name or row.kind
        svg.text(510, y, fitted(text, _WIDTH - _MARGIN - 510, keep_end=not verb))
    return y + 26


def _course(svg: Svg, samples: Sequence[Sample], y: float) -> float:
    """Draw resident bytes over the samples, kinds one on the other."""
    height, left = 90.0, 110.0
    room = _WIDTH - _MARGIN - left
    sums = [{total.kind: total.resident for total in sample.totals()} for sample in samples]
    kinds = list(dict.fromkeys(kind for each in sums for kind in each))
    most = max(1, *(sum(each.values()) for each in sums))
    times = [
        float(number) if sample.time_s is None else sample.time_s for number, sample in enumerate(samples)
    ]
    span = (times[-1] - times[0]) or 1.0
    xs = [left + room * (each - times[0]) / span for each in times]
    base = [0] * len(samples)
    for kind in kinds:
        top = [low + each.get(kind, 0) for low, each in zip(base, sums, strict=True)]
        if top == base:
            continue
        there = [f"{x:.1f} {y + height * (1 - value / most):.1f}" for x, value in zip(xs, top, strict=True)]
        back = [f"{x:.1f} {y + height * (1 - value / most):.1f}" for x, value in zip(xs, base, strict=True)]
        path: dict[str, float | str] = {"d": f"M{' L'.join(there + back[::-1])}Z"}
        svg.add("path", {**path, "class": slug(kind)}, hint=f"resident {kind}")
        if tone(kind).hatch:
            svg.add("path", {**path, "fill": f"url(#{tone(kind).hatch})"})
        base = top
    svg.text(left - 8, y + 10, size(most), style="small", anchor="end")
    svg.text(left - 8, y + height, "0", style="small", anchor="end")
    svg.text(_MARGIN, y + 30, "resident")
    svg.text(left, y + height + 14, samples[0].title, style="small faint")
    svg.text(left + room, y + height + 14, samples[-1].title, style="small faint", anchor="end")
    return y + height + 34
