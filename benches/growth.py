"""How each cost grows with the segment and with what was changed."""

import dataclasses
import time

import numpy as np

import quire
from benches.common import (
    GIB,
    MIB,
    PAGE,
    Plan,
    Spread,
    Words,
    available_bytes,
    fill,
    places,
    store,
    warm_for_version,
)
from benches.handover import hand_over
from benches.receiving import Receiver

FRACTIONS = (0.0, 0.0001, 0.001, 0.01, 0.1, 1.0)

WRITES, SNAPSHOT, DIFF, HANDOVER, MAP = COSTS = (
    "stores after a snapshot",
    "snapshot()",
    "diff",
    "hand-over",
    "map()",
)


@dataclasses.dataclass
class Growth:
    """All cells, and those that were left out.

    Attributes:
        cells: By cost, size in bytes and fraction changed: seconds.
        left_out: Why some were not measured.
    """

    cells: dict[tuple[str, int, float], Spread] = dataclasses.field(default_factory=dict)
    left_out: list[str] = dataclasses.field(default_factory=list)


def measure(plan: Plan) -> Growth:
    """Measure one segment at a time, from the least changed to the most."""
    growth = Growth()
    rng = np.random.default_rng(23)
    with Receiver("snapshot") as receiver:
        for size_bytes in plan.sizes:
            if available_bytes() < size_bytes * 1.25 + GIB // 4:
                growth.left_out.append(f"{size_bytes // MIB} MiB: too little memory was free")
                continue
            _measure_size(plan, size_bytes, rng, receiver, growth)
    return growth


def _rounds(plan: Plan, size_bytes: int, fraction: float) -> int:
    if plan.quick:
        return 2
    if size_bytes * fraction > 4 * GIB:
        return 2
    return 5 if size_bytes > GIB or fraction == 1 else 9


def _measure_size(
    plan: Plan, size_bytes: int, rng: np.random.Generator, receiver: Receiver, growth: Growth
) -> None:
    segment = quire.Segment(size_bytes)
    words: Words = segment.array("u8")
    fill(words)
    pages = size_bytes // PAGE
    newest = segment.snapshot()
    value = 1 << 40
    for fraction in FRACTIONS:
        changed = int(pages * fraction)
        # The old version, the new one, and the writer's copies, until their stripes are rewritten.
        need = 2.2 * changed * PAGE + GIB // 4
        if available_bytes() < need:
            growth.left_out.append(
                f"{size_bytes // MIB} MiB, {fraction:.2%} changed: {need / GIB:.0f} GiB would have to be free"
            )
            continue
        sample: dict[str, list[float]] = {cost: [] for cost in COSTS}
        for _ in range(_rounds(plan, size_bytes, fraction)):
            warm_for_version(changed)
            value += 2
            if changed:
                where = places(rng, pages, changed)
                sample[WRITES].append(store(words, where, value) - store(words, where, value + 1))
            else:
                sample[WRITES].append(0.0)
            start = time.perf_counter()
            snapshot = segment.snapshot()
            taken = time.perf_counter()
            newest.diff(snapshot)
            compared = time.perf_counter()
            mapping = snapshot.map()
            mapped = time.perf_counter()
            mapping.close()
            newest.close()
            newest = snapshot
            sample[SNAPSHOT].append(taken - start)
            sample[DIFF].append(compared - taken)
            sample[MAP].append(mapped - compared)
            sample[HANDOVER].append(hand_over(receiver, newest))
        for cost, values in sample.items():
            growth.cells[cost, size_bytes, fraction] = Spread.of(values)
    newest.close()
    del words
    segment.close()
