"""The picture: which pages changed from version to version, as SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from quire import PAGE_SIZE
from quire.commands.demo.report import bytes_text, duration_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.commands.demo.figures import Figures

__all__ = ["draw"]

LEFT, TOP, WIDTH, HEIGHT = 150, 86, 780, 512
BAR_HEIGHT = 70
GAP = 26
RIGHT, BOTTOM = 30, 96

# Steps of cividis, light to dark: told apart with any colour vision and in grey.
STEPS = [
    (0.0, "#f4f1e4", "none"),
    (0.01, "#e8d66b", "up to 1 %"),
    (0.1, "#bcae6c", "to 10 %"),
    (0.5, "#7d7c78", "to 50 %"),
    (0.99, "#43516d", "to 99 %"),
    (1.0, "#00204d", "all"),
]


def draw(figures: Figures) -> str:
    """Draw a run.

    Returns:
        A whole SVG document. Versions go from left to right, positions in the segment from top to bottom.
    """
    versions = figures.versions[1:]
    size = figures.size_bytes
    width = LEFT + WIDTH + RIGHT
    height = TOP + HEIGHT + GAP + BAR_HEIGHT + BOTTOM
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
            f' height="{height}" font-family="sans-serif" font-size="12" fill="#222">'
        ),
        f"<title>{escape(figures.data['title'])}: pages changed in each version</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 28, "Which pages changed from version to version", size=18, weight="bold"),
        _text(LEFT, 50, f"{figures.data['title']}, {figures.data['scale']} times"),
        _text(
            LEFT,
            68,
            f"{bytes_text(size)} in {-(-size // PAGE_SIZE):,} pages of 4 KiB; "
            f"{len(figures.versions)} versions, {figures.agreed} verified reads",
        ),
    ]
    step = WIDTH / max(1, len(versions))
    parts += _cells(versions, step)
    parts += _positions(figures.data["columns"], size)
    parts += _bars(versions, step)
    parts += _numbers(versions, step)
    parts += _legend(height - 30)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _colour(share: float) -> str:
    return next(colour for limit, colour, _ in STEPS if share <= limit)


def _cells(versions: list[dict[str, Any]], step: float) -> Iterator[str]:
    yield (
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="{STEPS[0][1]}"'
        ' stroke="#999" stroke-width="0.5"/>'
    )
    for place, version in enumerate(versions):
        cells = version["cells"]
        high = HEIGHT / len(cells)
        x = LEFT + place * step
        start = 0
        # Neighbours of one colour are one rectangle.
        for stop in range(1, len(cells) + 1):
            if stop < len(cells) and _colour(cells[stop]) == _colour(cells[start]):
                continue
            if cells[start] > 0:
                yield (
                    f'<rect x="{x:.2f}" y="{TOP + start * high:.2f}" width="{step * 0.94:.2f}"'
                    f' height="{(stop - start) * high:.2f}" fill="{_colour(cells[start])}"/>'
                )
            start = stop


def _positions(columns: list[dict[str, Any]], size: int) -> Iterator[str]:
    """Label the vertical axis with the columns, or with offsets if there is only one."""
    middle = TOP + HEIGHT / 2
    yield (
        f'<text x="22" y="{middle}" text-anchor="middle" transform="rotate(-90 22 {middle})">'
        "Position in the segment"
        f"{' (columns)' if len(columns) > 1 else ''}</text>"
    )
    if len(columns) == 1:
        for quarter in range(5):
            y = TOP + HEIGHT * quarter / 4
            yield _text(LEFT - 8, y + 4, bytes_text(size * quarter // 4), anchor="end")
        return
    starts = [*(column["offset"] for column in columns), size]
    for column, start, stop in zip(columns, starts, starts[1:], strict=False):
        y = TOP + HEIGHT * start / size
        yield (
            f'<line x1="{LEFT - 5}" x2="{LEFT + WIDTH}" y1="{y:.2f}" y2="{y:.2f}"'
            ' stroke="#999" stroke-width="0.4"/>'
        )
        yield _text(LEFT - 8, TOP + HEIGHT * (start + stop) / 2 / size + 4, column["name"], anchor="end")


def _bars(versions: list[dict[str, Any]], step: float) -> Iterator[str]:
    """Draw how many pages changed, under the versions."""
    top = TOP + HEIGHT + GAP
    most = max((version["pages"] for version in versions), default=0) or 1
    yield _text(LEFT - 8, top + 8, f"{most:,}", anchor="end")
    yield _text(LEFT - 8, top + BAR_HEIGHT, "0", anchor="end")
    yield _text(LEFT - 8, top + BAR_HEIGHT / 2 + 4, "pages changed", anchor="end")
    base = top + BAR_HEIGHT
    yield f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{base}" y2="{base}" stroke="#222" stroke-width="0.8"/>'
    for place, version in enumerate(versions):
        high = BAR_HEIGHT * version["pages"] / most
        yield (
            f'<rect x="{LEFT + place * step:.2f}" y="{base - high:.2f}" width="{step * 0.94:.2f}"'
            f' height="{high:.2f}" fill="#43516d"><title>version {version["version"]}:'
            f" {escape(version['what'])}; {version['pages']:,} pages,"
            f" {duration_text(version['snapshot_ns'])}</title></rect>"
        )


def _numbers(versions: list[dict[str, Any]], step: float) -> Iterator[str]:
    """Label the horizontal axis; not every version, if they are many."""
    y = TOP + HEIGHT + GAP + BAR_HEIGHT + 16
    every = max(1, round(28 / step))
    for place, version in enumerate(versions):
        if place % every == 0:
            yield _text(LEFT + (place + 0.47) * step, y, str(version["version"]), anchor="middle")
    yield _text(
        LEFT + WIDTH / 2,
        y + 20,
        "Version (the first, which is all of the data, is not drawn)",
        anchor="middle",
    )


def _legend(y: float) -> Iterator[str]:
    yield _text(LEFT, y + 11, "Changed pages of each stretch:")
    x = LEFT + 200
    for _, colour, label in STEPS:
        yield (
            f'<rect x="{x}" y="{y}" width="22" height="14" fill="{colour}" stroke="#999" stroke-width="0.5"/>'
        )
        yield _text(x + 28, y + 11, label)
        x += 96


def _text(x: float, y: float, text: str, *, size: int = 12, weight: str = "", anchor: str = "") -> str:
    extra = "".join(
        f' {name}="{value}"' for name, value in (("font-weight", weight), ("text-anchor", anchor)) if value
    )
    return f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size}"{extra}>{escape(text)}</text>'
