"""Finding what differs, against a comparison of all bytes."""

import time

import numpy as np

import quire
from benches.common import (
    MIB,
    PAGE,
    WORDS,
    Peer,
    Places,
    Plan,
    Row,
    Words,
    fill,
    median_of,
    places,
    store,
    timed,
    warm_for_version,
)

CHANGED = 100
BLOCK_PAGES = 256
AGAIN = "the same pair compared once more (in no figure)"
CALL = "diff of a snapshot of one page with itself"
PER_ROUND = 5


class Pair:
    """A segment and pairs of its snapshots, each of which is compared once."""

    def __init__(self, size_bytes: int, rng: np.random.Generator) -> None:
        self._segment = quire.Segment(size_bytes)
        self._words: Words = self._segment.array("u8")
        fill(self._words)
        self._pages = size_bytes // PAGE
        self._rng = rng
        self._value = 1 << 40
        self._newest = self._segment.snapshot()

    def diff(self, row: Row | None = None) -> float:
        """Change pages, take a snapshot, compare it with the one before; return the seconds of diff."""
        self._value += 1
        warm_for_version(CHANGED)
        store(self._words, places(self._rng, self._pages, CHANGED), self._value)
        snapshot = self._segment.snapshot()
        start = time.perf_counter()
        ranges = self._newest.diff(snapshot)
        seconds = time.perf_counter() - start
        found = sum(stop - start for start, stop in ranges) // PAGE
        if found != CHANGED:
            raise RuntimeError(f"diff found {found} pages where {CHANGED} were changed")
        if row is not None:
            row.part(AGAIN, timed(lambda: self._newest.diff(snapshot)))
        self._newest.close()
        self._newest = snapshot
        return seconds

    def close(self) -> None:
        self._newest.close()
        del self._words
        self._segment.close()


def compare(one: Words, other: Words, mask: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> Places:
    """Compare two arrays with numpy, a block that fits the cache at a time; return the pages that differ."""
    ones, others = one.reshape(-1, WORDS), other.reshape(-1, WORDS)
    found = []
    for start in range(0, len(ones), BLOCK_PAGES):
        stop = min(start + BLOCK_PAGES, len(ones))
        differs = np.not_equal(ones[start:stop], others[start:stop], out=mask[: stop - start])
        # Eight flags at a time: any() of bytes takes longer than the comparison.
        found.append(start + np.flatnonzero(differs.view("u8").any(axis=1)))
    pages: Places = np.concatenate(found)
    return pages


def measure(plan: Plan) -> list[Row]:
    """Measure 100 pages of one size against numpy, then all sizes."""
    row = Row(
        f"diff, {CHANGED} pages of {plan.size_bytes // MIB} MiB",
        f"{CHANGED} pages, chosen at random, are changed by one word between two snapshots, each pair"
        " compared once. For numpy: np.not_equal of two kept arrays, reduced for each page, in blocks"
        " that fit the cache.",
    )
    peer = Peer("numpy comparison", [], 1000.0)
    rng = np.random.default_rng(22)
    one: Words = np.zeros(plan.size_bytes // 8, "u8")
    fill(one)
    other = one.copy()
    mask = np.empty((BLOCK_PAGES, WORDS), np.bool_)
    pair = Pair(plan.size_bytes, rng)
    for number in range(plan.diffs + 1):
        where = places(rng, len(one) // WORDS, CHANGED)
        other[:] = one
        other[where] += np.uint64(1)
        group = [pair.diff(row) for _ in range(PER_ROUND)]
        start = time.perf_counter()
        found = compare(one, other, mask)
        seconds = time.perf_counter() - start
        if len(found) != CHANGED:
            raise RuntimeError(f"numpy found {len(found)} pages where {CHANGED} were changed")
        # The first round makes page tables and fills caches.
        if number:
            row.ours.append(group)
            peer.seconds.append(seconds)
    pair.close()
    row.peers = [peer]
    segment = quire.Segment(PAGE)
    with segment.snapshot() as snapshot:
        for _ in range(plan.diffs):
            row.part(CALL, timed(lambda: snapshot.diff(snapshot)))
    segment.close()
    call = median_of(row.parts[CALL])
    row.bounds = (
        f"diff takes {1e6 * row.spread.median:.0f} µs for {CHANGED} pages in as many leaves of the page"
        f" table, of which {1e6 * call:.1f} µs are the call; {1e6 * median_of(row.parts[AGAIN]):.0f} µs"
        " remain when the same pair is compared once more, the rest being the first access to the nodes and"
        " pages of a new layer"
    )
    return [row, _sizes(plan, rng)]


def _sizes(plan: Plan, rng: np.random.Generator) -> Row:
    row = Row(
        f"diff, {CHANGED} pages, by the segment's size",
        "As above, quire alone. Flat where the changed pages lie in as many leaves of the page table (one"
        " leaf is 512 pages); a small segment has fewer leaves than changed pages.",
    )
    for size_bytes in plan.sizes:
        pair = Pair(size_bytes, rng)
        pair.diff()
        row.parts[f"{size_bytes // MIB} MiB"] = [pair.diff() for _ in range(plan.diffs)]
        pair.close()
    row.ours = [row.parts[f"{plan.sizes[-1] // MIB} MiB"]]
    return row
