"""What a version costs the writer, against fork and a copy."""

import mmap
import os
import time

import numpy as np

import quire
from benches.common import (
    MIB,
    PAGE,
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
    warm,
    warm_for_version,
)
from benches.forking import Forker, huge_pages_possible

WHAT = (
    "All that a version costs the writer: the stores after the previous version (one word in each page"
    " chosen), less the same stores to the same pages once they are writable, plus the call that makes the"
    " version. The newest version alone is kept. For fork: the call, and its copies on write, of memory that"
    " a small process of its own holds; its child waits and is killed after the round. For np.copyto: the"
    " call."
)

WRITES = "stores after a snapshot, the extra time"
SNAPSHOT = "snapshot()"
DROP = "closing the version before it (in no figure)"
BARE = "the same stores into a bare private mapping of a memfd, the extra time"


class Ours:
    """A segment, and its newest snapshot."""

    def __init__(self, size_bytes: int) -> None:
        self.segment = quire.Segment(size_bytes)
        self.words: Words = self.segment.array("u8")
        fill(self.words)
        self.newest = self.segment.snapshot()
        self.value = 1 << 40
        self.most_layers = self.newest.layers
        self.copied_pages = 0
        self.changed_pages = 0

    def version(self, where: Places, row: Row) -> float:
        """Store, take a snapshot, drop the one before; add the parts to the row and return the cost."""
        warm_for_version(len(where))
        self.value += 2
        writes = store(self.words, where, self.value)
        writes -= store(self.words, where, self.value + 1)
        start = time.perf_counter()
        snapshot = self.segment.snapshot()
        call = time.perf_counter() - start
        row.part(WRITES, writes)
        row.part(SNAPSHOT, call)
        row.part(DROP, timed(self.newest.close))
        self.newest = snapshot
        self.most_layers = max(self.most_layers, snapshot.layers)
        self.copied_pages += snapshot.stats.pages_copied
        self.changed_pages += len(where)
        return writes + call

    def close(self) -> None:
        self.newest.close()
        del self.words
        self.segment.close()


class Bare:
    """A private mapping of a memfd: the kernel's own cost of a page's first store."""

    def __init__(self, size_bytes: int) -> None:
        descriptor = os.memfd_create("bench", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size_bytes)
        with mmap.mmap(descriptor, size_bytes) as memory:
            fill(np.frombuffer(memory, "u8"))
        self._descriptor = descriptor
        self._size = size_bytes

    def writes(self, where: Places) -> float:
        warm_for_version(len(where))
        memory = mmap.mmap(self._descriptor, self._size, flags=mmap.MAP_PRIVATE)
        words = np.frombuffer(memory, "u8")
        seconds = store(words, where, 1) - store(words, where, 2)
        del words
        memory.close()
        return seconds

    def close(self) -> None:
        os.close(self._descriptor)


def measure(plan: Plan) -> list[Row]:
    """Measure 1 % and 0.1 %."""
    goals = ((0.01, (4.0, 1.3, 4.0), 3), (0.001, (10.0, 2.0, 20.0), 10))
    return [_measure(plan, *each) for each in goals]


def _measure(plan: Plan, fraction: float, goals: tuple[float, float, float], per_round: int) -> Row:
    pages = plan.size_bytes // PAGE
    changed = int(pages * fraction)
    row = Row(
        f"A version of {plan.size_bytes // MIB} MiB, {fraction:.1%} of pages changed at random".replace(
            ".0%", "%"
        ),
        WHAT,
    )
    small = Peer("fork, 4 KiB pages", [], goals[0])
    huge = Peer("fork, huge pages", [], goals[1])
    copy = Peer("np.copyto into a kept buffer", [], goals[2])
    rng = np.random.default_rng(20)
    huge_possible = huge_pages_possible()
    if not huge_possible:
        row.notes.append("This machine gives no huge pages on request, so fork with them was not measured.")
    source: Words = np.zeros(plan.size_bytes // 8, "u8")
    fill(source)
    kept = source.copy()
    ours, bare = Ours(plan.size_bytes), Bare(plan.size_bytes)
    huge_bytes = []
    details: dict[str, list[float]] = {}
    with Forker(plan.size_bytes, huge=False) as forker, Forker(plan.size_bytes, huge=True) as huge_forker:
        # The first round is not counted: it makes page tables and fills caches.
        for number in range(plan.rounds + 1):
            # A version in which stripes are rewritten takes as much memory as the segment.
            warm(plan.size_bytes + 64 * MIB)
            where = places(rng, pages, changed)
            sample = Row("", "")
            group = [
                ours.version(where if again == 0 else places(rng, pages, changed), sample)
                for again in range(per_round)
            ]
            by_fork = forker.version(where, number)
            by_huge_fork = huge_forker.version(where, number) if huge_possible else None
            source[where] = number
            by_copy = timed(lambda: np.copyto(kept, source))
            bare_writes = bare.writes(where)
            if number == 0:
                continue
            row.ours.append(group)
            for name, values in sample.parts.items():
                row.parts.setdefault(name, []).extend(values)
            row.part(BARE, bare_writes)
            small.seconds.append(by_fork.version)
            details.setdefault("fork, 4 KiB pages: the call", []).append(by_fork.call)
            details.setdefault("fork, 4 KiB pages: its child's end (in no figure)", []).append(by_fork.drop)
            if by_huge_fork:
                huge.seconds.append(by_huge_fork.version)
                huge_bytes.append(by_huge_fork.huge_bytes)
                details.setdefault("fork, huge pages: the call", []).append(by_huge_fork.call)
            copy.seconds.append(by_copy)
    row.parts.update(details)
    row.peers = [peer for peer in (small, huge, copy) if peer.seconds]
    versions = sum(map(len, row.ours))
    row.notes.append(
        f"Memory was warmed before each round: as much as the segment. {versions} versions in {plan.rounds}"
        f" rounds, {changed} pages each; at most {ours.most_layers} layers."
        " Mean and worst include the rewriting of stripes and the merging of layers."
    )
    row.notes.append(_bursts(row.parts[SNAPSHOT], ours.copied_pages / ours.changed_pages))
    if huge_bytes:
        row.notes.append(
            f"Fork with huge pages got new memory for every round, {min(huge_bytes) / plan.size_bytes:.0%} of"
            " it or more in huge pages: its copies on write split them, and a second fork would cost more."
        )
    bare_median = median_of(row.parts[BARE])
    row.bounds = (
        f"the stores after a snapshot take {1e3 * median_of(row.parts[WRITES]):.2f} ms"
        f" ({1e6 * median_of(row.parts[WRITES]) / changed:.2f} µs for each page), where a bare private"
        f" mapping of a memfd takes {1e3 * bare_median:.2f} ms ({1e6 * bare_median / changed:.2f} µs): the"
        f" kernel's fault and copy. snapshot() takes {1e3 * median_of(row.parts[SNAPSHOT]):.2f} ms"
    )
    ours.close()
    bare.close()
    return row


def _bursts(calls: list[float], copies_per_page: float) -> str:
    """Say how much of the time the expensive calls take."""
    usual = median_of(calls)
    bursts = [seconds for seconds in calls if seconds > 5 * usual]
    share = sum(bursts) / sum(calls)
    text = f"{copies_per_page:.1f} pages were copied for each page changed."
    if bursts:
        text += (
            f" {len(bursts)} of the {len(calls)} calls of snapshot() took more than five times the median,"
            f" {1e3 * median_of(bursts):.0f} ms in the median; they are {share:.0%} of its time."
        )
    return text


def first_snapshot(plan: Plan) -> Row:
    """The first snapshot of a segment, of which nothing is copied, against a copy."""
    row = Row(
        f"The first snapshot of {plan.size_bytes // MIB} MiB",
        "A new segment is filled, then its first snapshot is taken: nothing of the data is copied.",
    )
    source: Words = np.zeros(plan.size_bytes // 8, "u8")
    fill(source)
    fresh = Peer("np.copy (memory warmed)", [])
    for _ in range(max(3, plan.diffs // 3)):
        segment = quire.Segment(plan.size_bytes)
        words = segment.array("u8")
        fill(words)
        start = time.perf_counter()
        snapshot = segment.snapshot()
        row.ours.append([time.perf_counter() - start])
        snapshot.close()
        del words
        segment.close()
        warm(plan.size_bytes)
        fresh.seconds.append(timed(source.copy))
    row.peers = [fresh]
    return row
