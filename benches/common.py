"""What every row shares: timing, warming of memory, and the figures of a row with their spread."""

import dataclasses
import mmap
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

PAGE = 4096
WORDS = PAGE // 8
MIB = 1 << 20
GIB = 1 << 30

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


class Plan(NamedTuple):
    """How much to measure.

    Attributes:
        quick: A smoke run: it shows that everything runs, and its figures mean nothing.
        size_bytes: Of the segment in the rows that name one size.
        rounds: Interleaved rounds of the rows on versions.
        handovers: Rounds of the row on handing over.
        diffs: Rounds of the row on diff.
        sizes: Of the segments in the rows on growth, in bytes.
        with_ray: Measure Ray if it is installed.
    """

    quick: bool
    size_bytes: int
    rounds: int
    handovers: int
    diffs: int
    sizes: tuple[int, ...]
    with_ray: bool


FULL = Plan(
    quick=False,
    size_bytes=GIB,
    rounds=40,
    handovers=15,
    diffs=15,
    sizes=(16 * MIB, 64 * MIB, 256 * MIB, GIB, 8 * GIB),
    with_ray=True,
)
QUICK = Plan(
    quick=True,
    size_bytes=64 * MIB,
    rounds=3,
    handovers=3,
    diffs=3,
    sizes=(16 * MIB, 64 * MIB),
    with_ray=True,
)


class Spread(NamedTuple):
    """Figures of a sample; the quartiles of a sample of one are its only value."""

    size: int
    median: float
    mean: float
    low_quartile: float
    high_quartile: float
    least: float
    worst: float

    @classmethod
    def of(cls, sample: Iterable[float]) -> "Spread":
        values = sorted(sample)
        if len(values) == 1:
            low = high = values[0]
        else:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(
            len(values),
            statistics.median(values),
            statistics.fmean(values),
            low,
            high,
            values[0],
            values[-1],
        )


@dataclasses.dataclass(frozen=True)
class Peer:
    """What quire is compared with.

    Attributes:
        name: As in the report.
        seconds: One figure for each round.
        goal: The ratio to reach; None if it is shown for comparison only.
    """

    name: str
    seconds: list[float]
    goal: float | None = None


@dataclasses.dataclass
class Row:
    """One piece of work, measured for quire and its peers in interleaved rounds.

    Attributes:
        title: What was done.
        what: What exactly was timed, as sentences.
        ours: For each round the figures of quire, at least one, in seconds.
        peers: In the order of the report.
        parts: Where quire's time goes, or bare kernel work to compare it with: figures by name, in seconds.
        bounds: What bounds the row, for a reader who sees that it misses its goal.
        notes: More to know.
    """

    title: str
    what: str
    ours: list[list[float]] = dataclasses.field(default_factory=list)
    peers: list[Peer] = dataclasses.field(default_factory=list)
    parts: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    bounds: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)

    def part(self, name: str, seconds: float) -> None:
        """Add a figure to a part."""
        self.parts.setdefault(name, []).append(seconds)

    @property
    def spread(self) -> Spread:
        """All figures of quire."""
        return Spread.of(value for group in self.ours for value in group)

    def ratios(self, peer: Peer) -> tuple[float, float, Spread]:
        """Return ratio of medians, ratio of means, and the spread of the ratio round by round."""
        ours, theirs = self.spread, Spread.of(peer.seconds)
        by_round = [
            seconds / statistics.median(group) for seconds, group in zip(peer.seconds, self.ours, strict=True)
        ]
        return theirs.median / ours.median, theirs.mean / ours.mean, Spread.of(by_round)

    def missed(self) -> list[Peer]:
        """Return the peers of which the goal was not reached, by the ratio of medians."""
        return [peer for peer in self.peers if peer.goal is not None and self.ratios(peer)[0] < peer.goal]


def timed(work: Callable[[], object]) -> float:
    """Return how long a call took, in seconds; what it returns is dropped after the clock was read."""
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result
    return seconds


def available_bytes() -> int:
    """Return ``MemAvailable``."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def warm(size_bytes: int) -> None:
    """Touch memory and give it back, so that what is timed next does not pay for memory that was idle.

    A virtual machine takes idle memory away from its guest; the first touch then costs seconds per GiB.
    """
    size_bytes = min(size_bytes, available_bytes() // 2)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, max(size_bytes, PAGE), flags=flags).close()


def warm_for_version(changed_pages: int) -> None:
    """Warm what a version of so many changed pages takes: copies on write, a layer, page tables."""
    warm(3 * changed_pages * PAGE + 32 * MIB)


def places(rng: np.random.Generator, pages: int, count: int) -> Places:
    """Choose pages at random, and one word in each; return the indices of the words, in random order."""
    chosen = rng.choice(pages, size=count, replace=False) if count < pages else rng.permutation(pages)
    result: Places = chosen.astype(np.int64) * WORDS + rng.integers(0, WORDS, size=count)
    return result


def fill(words: Words) -> None:
    """Give every page content of its own."""
    count = len(words) // WORDS
    words.reshape(count, WORDS)[:, 0] = np.arange(1, count + 1, dtype=np.uint64)


def store(words: Words, where: Places, value: int) -> float:
    """Store a word at each place; return the seconds it took."""
    number = np.uint64(value)
    start = time.perf_counter()
    words[where] = number
    return time.perf_counter() - start


def peak_bytes() -> int:
    """Largest resident set of this process so far.

    Not getrusage, whose figure begins with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def median_of(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)
