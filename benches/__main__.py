"""``python -m benches``: measure all rows and write ``docs/benchmarks.md``."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Threads of a linear algebra library would be stopped by every fork, at the cost of the peer.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from benches import (
    brokering,
    diff,
    faults,
    growth,
    handover,
    images,
    lending,
    machine,
    maps,
    regions,
    report,
    sandbox,
    space,
    starting,
    versions,
    wheels,
)
from benches.common import FULL, QUICK, Plan, Row

MEASURES: dict[str, Callable[[Plan], list[Row]]] = {
    "versions": versions.measure,
    "handover": handover.measure,
    "diff": diff.measure,
    "first": lambda plan: [versions.first_snapshot(plan)],
    "faults": faults.measure,
    "regions": regions.measure,
    "wheels": wheels.measure,
    "maps": maps.measure,
    "images": images.measure,
    "space": space.measure,
    "sandbox": sandbox.measure,
    "broker": brokering.measure,
    "lending": lending.measure,
}
# These two have tables of their own in the report.
ROWS = (*MEASURES, "import", "growth")


def main() -> int:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, whose figures mean nothing")
    parser.add_argument("--without-ray", action="store_true", help="do not start Ray")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="measure only these")
    parser.add_argument("--output", type=Path, help="where the report goes; default docs/benchmarks.md")
    options = parser.parse_args()
    output = options.output
    if output is None:
        if options.quick or set(options.rows) != set(ROWS):
            parser.error("--output is needed: only a full run of all rows replaces docs/benchmarks.md")
        output = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
    plan = (QUICK if options.quick else FULL)._replace(with_ray=not options.without_ray)

    began = time.monotonic()

    def announce(name: str) -> bool:
        if name in options.rows:
            print(f"{time.monotonic() - began:6.1f} s  {name}", file=sys.stderr, flush=True)
        return name in options.rows

    load_before, busy = machine.load(), machine.busy()
    rows: list[Row] = []
    for name, measure in MEASURES.items():
        if announce(name):
            rows += measure(plan)
    started = starting.measure(plan) if announce("import") else None
    grown = growth.measure(plan) if announce("growth") else None
    report.write(
        report.Results(
            quick=plan.quick,
            machine=machine.describe(),
            load_before=load_before,
            busy=busy,
            load_after=machine.load(),
            minutes=(time.monotonic() - began) / 60,
            rows=rows,
            starting=started,
            starting_goal=starting.GOAL_SECONDS,
            growth=grown,
        ),
        output,
    )
    missed = [f"{row.title}: {peer.name}" for row in rows for peer in row.missed()]
    print(f"{output}: {len(missed)} goals missed" + "".join(f"\n  {each}" for each in missed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
