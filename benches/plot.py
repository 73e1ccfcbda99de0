"""A picture of how each cost grows, written by hand as SVG."""

import math
from collections.abc import Iterable
from html import escape

from benches.common import MIB
from benches.growth import COSTS, FRACTIONS, Growth

WIDTH, HEIGHT = 300, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 28, 36
# From few pages changed to all, light to dark: one hue, told apart in grey too.
COLORS = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")


def _label(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 0.9999:
            return f"{seconds * factor:g} {unit}"
    return f"{seconds * 1e6:g} µs"


def _size(size_bytes: float) -> str:
    mebibytes = round(size_bytes / MIB)
    return f"{mebibytes} MiB" if mebibytes < 1024 else f"{mebibytes // 1024} GiB"


class _Panel:
    def __init__(self, column: int, title: str, sizes: list[int], least: float, most: float) -> None:
        self._left = column % 3 * WIDTH + LEFT
        self._top = column // 3 * HEIGHT + TOP
        self._width = WIDTH - LEFT - RIGHT
        self._height = HEIGHT - TOP - BOTTOM
        self._sizes = math.log(sizes[0]), math.log(sizes[-1])
        self._decades = math.floor(math.log10(least)), math.ceil(math.log10(most))
        self.lines = [
            f'<text x="{self._left}" y="{self._top - 10}" font-weight="bold">{escape(title)}</text>',
            (
                f'<rect x="{self._left}" y="{self._top}" width="{self._width}" height="{self._height}"'
                ' fill="none" stroke="#999"/>'
            ),
        ]
        for decade in range(self._decades[0], self._decades[1] + 1):
            y = self._y(10.0**decade)
            self.lines.append(
                f'<line x1="{self._left}" x2="{self._left + self._width}" y1="{y:.1f}" y2="{y:.1f}"'
                ' stroke="#ddd"/>'
                f'<text x="{self._left - 4}" y="{y + 4:.1f}" text-anchor="end">{_label(10.0**decade)}</text>'
            )
        for size in sizes:
            self.lines.append(
                f'<text x="{self._x(size):.1f}" y="{self._top + self._height + 14}" text-anchor="middle"'
                f' font-size="9">{_size(size)}</text>'
            )

    def _x(self, size: float) -> float:
        least, most = self._sizes
        return self._left + self._width * (math.log(size) - least) / max(most - least, 1e-9)

    def _y(self, seconds: float) -> float:
        least, most = self._decades
        return self._top + self._height * (1 - (math.log10(seconds) - least) / max(most - least, 1))

    def draw(self, points: Iterable[tuple[int, float]], color: str, name: str) -> None:
        """Draw one line through its points."""
        places = [f"{self._x(size):.1f},{self._y(seconds):.1f}" for size, seconds in points]
        self.lines.append(
            f'<polyline points="{" ".join(places)}" fill="none" stroke="{color}" stroke-width="2">'
            f"<title>{escape(name)}</title></polyline>"
        )
        for place in places:
            x, y = place.split(",")
            self.lines.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}"/>')


def picture(growth: Growth) -> str:
    """Return an SVG document: one panel for each cost, one line for each fraction changed."""
    sizes = sorted({size for _, size, _ in growth.cells})
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * WIDTH} {2 * HEIGHT}"'
            ' font-family="sans-serif" font-size="10">'
        ),
        "<title>How each cost grows with the size of the segment and the share of pages changed</title>",
        f'<rect width="{3 * WIDTH}" height="{2 * HEIGHT}" fill="white"/>',
    ]
    for column, cost in enumerate(COSTS):
        medians = {
            (size, fraction): spread.median
            for (name, size, fraction), spread in growth.cells.items()
            if name == cost and spread.median > 0
        }
        if not medians:
            continue
        panel = _Panel(column, cost, sizes, min(medians.values()), max(medians.values()))
        for fraction, color in zip(FRACTIONS, COLORS, strict=True):
            points = [(size, medians[size, fraction]) for size in sizes if (size, fraction) in medians]
            panel.draw(points, color, f"{cost}, {100 * fraction:g} % changed")
        parts.extend(panel.lines)
    for line, (fraction, color) in enumerate(zip(FRACTIONS, COLORS, strict=True)):
        x, y = 2 * WIDTH + LEFT, HEIGHT + TOP + 20 + 18 * line
        parts.append(
            f'<line x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>'
            f'<text x="{x + 32}" y="{y + 4}">{100 * fraction:g} % of pages changed</text>'
        )
    return "\n".join([*parts, "</svg>", ""])
