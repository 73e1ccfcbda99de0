"""Address spaces drawn in a terminal, with rich.

rich is no dependency of the library; whoever imports this module says that it is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from quire.pictures.axis import Axis
from quire.pictures.model import Row, Sample, Total, changes
from quire.pictures.palette import ink, tone
from quire.pictures.text import address, clipped, frame_name, printable, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console, RenderableType

    from quire.pictures.model import Change, Picture, Step

__all__ = ["mappings", "steps", "summary", "timeline", "top", "tree"]

_METRICS = ("virtual", "committed", "resident")
_LEAVES = 12
_FRAMES = 32
_SPARKS = "▁▂▃▄▅▆▇█"


def summary(sample: Sample, console: Console, *, axis: Axis | None = None) -> RenderableType:
    """Draw the line of addresses, three bars, and the sums of each kind.

    Args:
        sample: What is drawn.
        console: Where; its width and colours are looked at.
        axis: Of the line; one for this sample alone by default.
    """
    parts: list[RenderableType] = [_line(sample, axis or Axis(sample.rows), console), Text()]
    totals = sample.totals()
    parts += [_bar(metric, totals, console) for metric in _METRICS]
    parts += [Text(), _legend(totals, console)]
    if sample.note:
        parts += [Text(), Text(printable(sample.note), style="yellow")]
    return Group(*parts)


def _style(kind: str) -> Style:
    fill = tone(kind).light
    return Style(color=ink(fill), bgcolor=fill)


def _block(kind: str, width: int, console: Console, label: str = "") -> Text:
    """Draw a box of one line: a colour and a label, or without colours the kind's letter."""
    if console.color_system is None:
        return Text(tone(kind).letter * width)
    hatch = {"": " ", "stripes": "/", "crosses": "x", "dots": "."}[tone(kind).hatch]
    text = f" {label} " if label and len(label) + 2 <= width else ""
    return Text(text + hatch * (width - len(text)), style=_style(kind))


def _bar(metric: str, totals: Sequence[Total], console: Console) -> Text:
    whole = sum(getattr(total, metric) for total in totals)
    bar = Text(f"{metric:<10}{size(whole):>9} ")
    room = console.width - len(bar) - 1
    parts = [(total.kind, getattr(total, metric)) for total in totals if getattr(total, metric)]
    for (kind, _), width in zip(parts, _shares([count for _, count in parts], room), strict=True):
        bar.append_text(_block(kind, width, console, kind))
    return bar


def _shares(counts: Sequence[int], width: int) -> list[int]:
    """Divide a width in proportion, at least 1 for each; all of it is used."""
    whole = sum(counts)
    if not whole or width < len(counts):
        return [0] * len(counts)
    free = width - len(counts)
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return [1 + bounds[n + 1] * free // whole - bounds[n] * free // whole for n in range(len(counts))]


def _line(sample: Sample, axis: Axis, console: Console) -> RenderableType:
    """Draw the line of addresses, with as many of them below as have room."""
    width = max(20, console.width - 1)
    cells: list[tuple[float, Row | None]] = [(0.0, None)] * width
    for row in sample.rows:
        left, right = axis.place(row.start) * width, axis.place(row.end) * width
        for cell in range(int(left), min(width, int(right) + 1)):
            covered = min(right, cell + 1) - max(left, cell)
            if covered > cells[cell][0]:
                cells[cell] = (covered, row)
    gaps = {int((axis.place(gap.start) + axis.place(gap.end)) / 2 * width) for gap in axis.gaps}
    line = Text()
    before: Row | None = None
    for number, (_, row_there) in enumerate(cells):
        if row_there is None:
            line.append("⋮" if number in gaps else " ", style="dim")
        elif before is not None and before is not row_there and before.kind == row_there.kind:
            has_room = number + 1 < width and cells[number + 1][1] is row_there
            line.append(
                "|" if has_room else _block(row_there.kind, 1, console).plain, style=_style(row_there.kind)
            )
        else:
            line.append_text(_block(row_there.kind, 1, console))
        before = row_there
    ticks = [" "] * width
    free = 0
    for bound in sorted({bound for row in sample.rows for bound in (row.start, row.end)}):
        text = address(bound)
        at = min(int(axis.place(bound) * width), width - len(text))
        if at >= free:
            ticks[at : at + len(text)] = text
            free = at + len(text) + 2
    pointed = [" "] * width
    for start, end in sample.marks:
        first = min(width - 1, int(axis.place(start) * width))
        last = max(int(axis.place(end) * width), first + 1)
        pointed[first:last] = "▾" * (last - first)
    marks = [Text("".join(pointed).rstrip(), style="bold")] if sample.marks else []
    return Group(*marks, line, Text("".join(ticks).rstrip(), style="dim"))


def _legend(totals: Sequence[Total], console: Console) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("kind", no_wrap=True)
    for name in ("mappings", *_METRICS):
        table.add_column(name, justify="right", no_wrap=True)
    for total in totals:
        swatch = Text.assemble(_block(total.kind, 2, console), f" {printable(total.kind)}")
        table.add_row(swatch, str(total.mappings), *(size(getattr(total, metric)) for metric in _METRICS))
    sums = [str(sum(total.mappings for total in totals))]
    sums += [size(sum(getattr(total, metric) for total in totals)) for metric in _METRICS]
    table.add_row("   all", *sums, style="bold")
    return table


def mappings(
    rows: Sequence[Row], console: Console, *, changed: Sequence[Change] | None = None
) -> RenderableType:
    """List mappings, one a line.

    Columns that say nothing (swapped, if nothing is) or have no room are left out, the least important first.
    Lines are made by hand: a table of rich takes seconds for 10,000 of them.

    Args:
        rows: What is listed.
        console: Where; names are cut at the start to fit its width, if it is a terminal.
        changed: Show these differences in a column; rows that are gone are listed too.
    """
    verbs = {}
    if changed is not None:
        verbs = {change.after or change.before: difference(change) for change in changed}
        rows = sorted({*rows, *(row for row in verbs if row is not None)}, key=lambda row: row[:2])
    digits = max((len(f"{row.end:x}") for row in rows if row.end < 1 << 56), default=12)
    columns = [
        name
        for name in ("resident", "proportional", "dirty", "swapped")
        if any(getattr(row, name) for row in rows)
    ]
    if changed is not None:
        columns.append("change")
    columns.append("end")
    for name in ("end", "swapped", "proportional", "dirty"):
        room = console.width - sum(_WIDTHS.get(column, digits + 1) for column in columns) - digits - 35
        if name in columns and room < _NAME_AT_LEAST:
            columns.remove(name)
    figures = [name for name in columns if name in _FIGURES]
    head = f"{'address':<{digits + (digits + 1 if 'end' in columns else 0)}}{'size':>10}  prot  {'kind':<15}"
    head += "".join(f"{_FIGURES[name]:>10}" for name in figures)
    head += f"  {'change':<32}" if changed is not None else ""
    lines = [Text(f"{head}  name", style="bold", no_wrap=True, overflow="crop")]
    for row in rows:
        where = f"{row.start:0{digits}x}" + (f"-{row.end:0{digits}x}" if "end" in columns else "")
        # The few addresses beyond the others' digits take their room from the next column.
        room = max(6, 10 + (2 * digits + 1 if "end" in columns else digits) - len(where))
        line = Text(f"{where}{size(row.size):>{room}}  ", no_wrap=True, overflow="ellipsis")
        line.append(f"{printable(row.protection):<4}  ").append_text(_block(row.kind, 1, console))
        line.append(f" {printable(row.kind):<13}")
        for name in figures:
            figure = getattr(row, name)
            line.append(
                "         -" if figure is None else f"{size(figure):>10}", style="" if figure else "dim"
            )
        line.append("  ")
        if changed is not None:
            line.append(f"{clipped(verbs.get(row, ''), 31):<32}")
        name = printable(row.name)
        if console.is_terminal:
            name = clipped(name, max(0, console.width - len(line)), keep_end=True)
        else:
            line.overflow = "ignore"
        lines.append(line.append(name))
    return Group(*lines)


_FIGURES = {"resident": "resident", "proportional": "pss", "dirty": "dirty", "swapped": "swapped"}
_WIDTHS = dict.fromkeys(_FIGURES, 10) | {"change": 34}
_NAME_AT_LEAST = 24


def difference(change: Change) -> str:
    """Say in a few words how a row changed: ``+ added``, ``grown 4 KiB``."""
    before, after = change.before, change.after
    if before is None:
        return "+ added"
    if after is None:
        return "- removed"
    parts = []
    if after.size != before.size:
        parts.append(f"{change.verb} {size(abs(after.size - before.size))}")
    if after.protection != before.protection:
        parts.append(f"was {printable(before.protection)}")
    resident = (after.resident or 0) - (before.resident or 0)
    if resident:
        parts.append(f"resident {'+' if resident > 0 else ''}{size(resident)}")
    return ", ".join(parts) or "changed"


def tree(sample: Sample, title: str, console: Console) -> Tree:
    """Draw kinds, in them files or names, in those mappings; the largest (resident, then virtual) first."""
    root = Tree(Text(printable(title), style="bold"))
    order = {total.kind: total for total in sample.totals()}
    for kind, total in order.items():
        rows = [row for row in sample.rows if row.kind == kind]
        label = Text.assemble(_block(kind, 2, console), f" {printable(kind)}  ", (_sums(total), "dim"))
        branch = root.add(label)
        names: dict[str, list[Row]] = {}
        for row in rows:
            names.setdefault(row.name, []).append(row)
        groups = sorted(names.items(), key=lambda item: _weight(item[1]), reverse=True)
        for name, members in groups[:_LEAVES]:
            sums = Sample("", tuple(members)).totals()[0]
            twig = branch.add(Text.assemble(printable(name) or "(no name)", "  ", (_sums(sums), "dim")))
            if len(members) == 1 and len(groups) > 1 and not name:
                continue
            for row in sorted(members, key=lambda row: _weight([row]), reverse=True)[:_LEAVES]:
                twig.add(
                    Text(f"{row.start:x}-{row.end:x} {printable(row.protection)}  {_sizes(row)}", style="dim")
                )
            if len(members) > _LEAVES:
                twig.add(Text(f"and {len(members) - _LEAVES} more mappings", style="dim italic"))
        if len(groups) > _LEAVES:
            branch.add(Text(f"and {len(groups) - _LEAVES} more names", style="dim italic"))
    return root


def _weight(rows: Iterable[Row]) -> tuple[int, int]:
    rows = list(rows)
    return sum(row.resident or 0 for row in rows), sum(row.size for row in rows)


def _sizes(row: Row) -> str:
    return size(row.size) if row.resident is None else f"{size(row.size)}, {size(row.resident)} resident"


def _sums(total: Total) -> str:
    counted = f"{total.mappings} mapping{'' if total.mappings == 1 else 's'}, " if total.mappings else ""
    return f"{counted}{size(total.virtual)}, {size(total.resident)} resident"


def top(picture: Picture, console: Console) -> RenderableType:
    """Draw one screen of ``--top``: the sums, and the mappings that grew and the largest, with their growth.

    Args:
        picture: The last sample is drawn, with its growth since the first and since the one before.
        console: Where; as many mappings as fit its height are listed.
    """
    first, before, now = picture.samples[0], picture.samples[-2], picture.samples[-1]
    header = Text(f"{printable(picture.title)}, {printable(picture.subtitle)}", style="bold", no_wrap=True)
    totals = now.totals()
    bars = [_bar(metric, totals, console) for metric in _METRICS]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    for name in ("resident", "change", f"in {now.title}", "size"):
        table.add_column(name, justify="right", no_wrap=True, min_width=8)
    table.add_column("kind", no_wrap=True, min_width=14)
    table.add_column("address", no_wrap=True)
    table.add_column("name", no_wrap=True, ratio=1)
    earlier = [_growth(sample.rows, now.rows) for sample in (before, first)]
    ranked = sorted(now.rows, key=lambda row: (abs(earlier[0].get(row, 0)), *_weight([row])), reverse=True)
    for row in ranked[: max(3, console.height - len(bars) - 5)]:
        table.add_row(
            "-" if row.resident is None else size(row.resident),
            *(_signed(growth.get(row, 0)) for growth in earlier),
            size(row.size),
            Text.assemble(_block(row.kind, 1, console), f" {printable(row.kind)}"),
            f"{row.start:x}",
            Text(printable(row.name).rsplit("/", 1)[-1], overflow="ellipsis"),
        )
    return Group(header, Text(), *bars, Text(), table)


def _growth(before: Sequence[Row], after: Sequence[Row]) -> dict[Row, int]:
    """Say by how much the resident bytes of each row changed that did."""
    found = {}
    for change in changes(before, after):
        if change.after is not None:
            old = change.before.resident if change.before is not None else 0
            found[change.after] = (change.after.resident or 0) - (old or 0)
    return found


def _signed(count: int) -> Text:
    if not count:
        return Text("·", style="dim")
    return Text(("+" if count > 0 else "") + size(count), style="bold")


def timeline(picture: Picture, console: Console) -> RenderableType:
    """Draw how the resident bytes of each kind went over the samples, and what differs at the end."""
    first, last = picture.samples[0], picture.samples[-1]
    columns = [{total.kind: total.resident for total in sample.totals()} for sample in picture.samples]
    room = max(8, console.width - 42)
    if len(columns) > room:
        columns = [columns[number * len(columns) // room] for number in range(room - 1)] + [columns[-1]]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("resident", no_wrap=True)
    table.add_column(first.title, justify="right", no_wrap=True, min_width=9)
    table.add_column(last.title, justify="right", no_wrap=True, min_width=9)
    table.add_column("from its least to its most", no_wrap=True, overflow="crop")
    for kind in dict.fromkeys(total.kind for sample in picture.samples for total in sample.totals()):
        values = [column.get(kind, 0) for column in columns]
        least, most = min(values), max(values)
        if most:
            scale = (len(_SPARKS) - 1) / ((most - least) or most)
            marks = "".join(_SPARKS[int((value - least) * scale)] for value in values)
            swatch = Text.assemble(_block(kind, 2, console), f" {printable(kind)}")
            table.add_row(
                swatch, size(values[0]), size(values[-1]), Text(marks, style=Style(color=tone(kind).light))
            )
    found = changes(first.rows, last.rows)
    changed = mappings([], console, changed=found) if found else Text("no mapping changed")
    return Group(table, Text(), Text(f"From {first.title} to {last.title}:", style="bold"), changed)


def steps(lesson: Sequence[Step], console: Console) -> RenderableType:
    """Draw steps one below the other on one line of addresses."""
    axis = Axis(row for step in lesson for panel in step.panels for row in panel.rows)
    parts: list[RenderableType] = []
    for number, step in enumerate(lesson):
        parts.append(Text.assemble((f"{number}  ", "dim"), (printable(step.title), "bold")))
        style = "red" if step.failed else "green"
        lines = [Text(printable(line)) for line in step.said]
        lines += [Text(printable(note), style=style) for note in step.notes]
        parts += [Padding(line, (0, 0, 0, 3), expand=False) for line in lines]
        for panel in step.panels:
            if len(step.panels) > 1:
                parts.append(Text(printable(panel.title), style="italic"))
            parts.append(_line(panel, axis, console))
            parts += [Text(f"   {line}", style="dim") for line in _described(panel.rows)]
        parts.append(Text())
    return Group(*parts)


def _described(rows: Sequence[Row]) -> list[str]:
    """Write rows as the kernel would, with the frames of pages that are there."""
    lines = []
    for row in rows:
        frames = "" if row.pages is None else _frames(row.pages.frames)
        what = printable(row.name) or row.kind
        lines.append(
            f"{row.start:#x}-{row.end:#x} {printable(row.protection)} {size(row.size)} {what}{frames}"
        )
    return lines


def _frames(frames: Sequence[int | None]) -> str:
    if len(frames) > _FRAMES or not any(frame is not None for frame in frames):
        return ""
    return "  pages " + " ".join("." if frame is None else frame_name(frame) for frame in frames)
