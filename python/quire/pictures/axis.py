"""Where an address is drawn: a sparse space of 47 bits on one line.

Gaps are shortened and large ranges damped, so that one gigabyte does not hide a stack of 132 KiB, nor 10,000
small mappings a library. Between two breakpoints the line is linear, and order is always that of addresses.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from quire.pictures.model import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quire.pictures.model import Row

__all__ = ["Axis", "Gap"]

_GAPS_AT_MOST = 0.3
_GAP = 0.03
_DAMPING = 0.4


class Gap(NamedTuple):
    """Addresses that nothing is mapped at, drawn shortened; the end is exclusive."""

    start: int
    end: int


class Axis:
    """A monotone mapping of addresses to the interval [0, 1].

    Args:
        rows: All that will be drawn on it, of any number of samples, in any order.

    Attributes:
        addresses: Breakpoints, ascending.
        places: Where they are drawn, ascending, from 0 to 1.
        gaps: Those that are drawn shortened.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        spans = {(row.start, row.end) for row in rows}
        bounds = sorted({bound for span in spans for bound in span})
        mapped = _merged(sorted(spans))
        least = max(16 * PAGE, sum(end - start for start, end in mapped) // 16)
        clusters: list[list[int]] = []
        self.gaps: list[Gap] = []
        for start, end in mapped:
            if clusters and start - clusters[-1][1] < least:
                clusters[-1][1] = end
            else:
                if clusters:
                    self.gaps.append(Gap(clusters[-1][1], start))
                clusters.append([start, end])
        self.addresses: list[int] = []
        self.places: list[float] = []
        gap = min(_GAP, _GAPS_AT_MOST / len(self.gaps)) if self.gaps else 0.0
        layouts = [_layout(bounds, mapped, start, end) for start, end in clusters]
        weights = [sum(weights) ** _DAMPING for _, weights in layouts]
        scale = (1 - gap * len(self.gaps)) / sum(weights) if weights else 0.0
        place = 0.0
        for (points, inner), weight in zip(layouts, weights, strict=True):
            self.addresses.append(points[0])
            self.places.append(place)
            unit = weight * scale / sum(inner)
            for point, each in zip(points[1:], inner, strict=True):
                place += each * unit
                self.addresses.append(point)
                self.places.append(place)
            place += gap
        if self.places:
            self.places[-1] = 1.0

    def place(self, address: int) -> float:
        """Say where an address is drawn; those outside all rows are drawn at the nearest end."""
        if not self.addresses or address <= self.addresses[0]:
            return 0.0
        at = bisect_right(self.addresses, address) - 1
        if at == len(self.addresses) - 1:
            return 1.0
        low, high = self.addresses[at], self.addresses[at + 1]
        return self.places[at] + (self.places[at + 1] - self.places[at]) * (address - low) / (high - low)


def _merged(spans: list[tuple[int, int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def _layout(
    bounds: list[int], mapped: list[list[int]], first: int, last: int
) -> tuple[list[int], list[float]]:
    """List the breakpoints of a cluster, and the weight of each interval between two of them."""
    points = bounds[bisect_right(bounds, first - 1) : bisect_right(bounds, last)]
    starts = [start for start, _ in mapped]
    weights = []
    free = []
    for number, (start, end) in enumerate(pairwise(points)):
        weights.append(((end - start) / PAGE) ** 0.5)
        if mapped[bisect_right(starts, start) - 1][1] <= start:
            free.append(number)
    gaps = set(free)
    used = [weight for number, weight in enumerate(weights) if number not in gaps]
    cap = 2 * sum(used) / len(used)
    for number in free:
        weights[number] = min(weights[number], cap)
    return points, weights
