"""What happens to the data from one version to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quire import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from quire import Segment
    from quire.commands.demo.data import Column, Source

__all__ = ["updates"]

ITEMS_PER_PAGE = PAGE_SIZE // 8


def updates(
    source: Source, columns: list[Column], segment: Segment, seed: int
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield updates for ever, each with what it is for people; they are made when called.

    Each touches about 0.1 to 5 % of the pages, if there are more than a few hundred.
    """
    random = np.random.default_rng(seed)
    views = {column.name: column.of(segment) for column in columns}
    kinds = _of_flights(source, views, random) if "arr_delay" in views else _of_words(views["words"], random)
    while True:
        yield from kinds()


def _of_flights(
    source: Source, views: dict[str, npt.NDArray[Any]], random: np.random.Generator
) -> Callable[[], Iterator[tuple[str, Callable[[], None]]]]:
    rows = source.rows
    total = len(views["arr_delay"])
    repeats = total // rows
    pages = -(-total // ITEMS_PER_PAGE)
    carriers = source.columns["carrier"]
    # Carriers with so few flights that not every page has one.
    small = [
        code for code, count in enumerate(np.bincount(carriers)) if 100 < count < rows // ITEMS_PER_PAGE * 2
    ]

    def everywhere(chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return (np.arange(repeats)[:, None] * rows + chosen).ravel()

    def carrier_is_late(code: int) -> None:
        chosen = everywhere(np.flatnonzero(carriers == code))
        minutes = int(random.integers(1, 30))
        views["arr_delay"][chosen] += minutes

    def month_is_corrected(month: int) -> None:
        found = np.flatnonzero(source.columns["month"] == month)
        # The source is sorted by date within a year that starts anywhere.
        for first in range(0, total, rows):
            part = slice(first + found[0], first + found[-1] + 1)
            of_month = views["month"][part] == month
            views["arr_delay"][part] -= of_month
            views["arr_time"][part] -= of_month

    def delays_come_in() -> None:
        chosen = random.integers(0, total, max(1, pages // 2))
        views["dep_delay"][chosen] = random.integers(-10, 180, len(chosen))
        views["arr_delay"][chosen] = views["dep_delay"][chosen] + random.integers(-20, 40, len(chosen))

    def flights_are_cancelled() -> None:
        chosen = random.integers(0, total, max(1, pages // 20))
        for name in ("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"):
            views[name][chosen] = np.nan

    def storm_hits() -> None:
        first = int(random.integers(0, max(1, total - total // 8)))
        part = slice(first, first + total // 8)
        for name in ("dep_delay", "arr_delay", "air_time"):
            views[name][part] += 5

    def kinds() -> Iterator[tuple[str, Callable[[], None]]]:
        yield "late delays come in, anywhere", delays_come_in
        month = int(random.integers(1, 13))
        yield f"arrivals of month {month} are corrected", lambda: month_is_corrected(month)
        code = int(random.choice(small))
        name = source.names["carrier"][code]
        yield f"carrier {name} is later than thought", lambda: carrier_is_late(code)
        yield "some flights are cancelled", flights_are_cancelled
        yield "a storm delays a stretch", storm_hits

    return kinds


def _of_words(
    words: npt.NDArray[Any], random: np.random.Generator
) -> Callable[[], Iterator[tuple[str, Callable[[], None]]]]:
    total = len(words)
    pages = -(-total // ITEMS_PER_PAGE)

    def scattered() -> None:
        chosen = random.integers(0, total, max(1, pages // 50))
        words[chosen] ^= random.integers(1, 1 << 63, len(chosen), np.uint64)

    def contiguous() -> None:
        length = max(1, total // 100)
        first = int(random.integers(0, total - length + 1))
        words[first : first + length] += np.uint64(1)

    def few() -> None:
        chosen = random.integers(0, total, max(1, pages // 1000))
        words[chosen] += np.uint64(1)

    def kinds() -> Iterator[tuple[str, Callable[[], None]]]:
        yield "words change, anywhere", scattered
        yield "a stretch is counted up", contiguous
        yield "few words are counted up", few

    return kinds
