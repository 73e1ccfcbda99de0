"""Run random calls in the model of an address space and in real processes, and compare after each one.

The longer form of ``tests/test_space_differential.py``: other programs every time. A disagreement is shrunk
by hypothesis, printed with the calls that lead to it, and ends the run.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from spaceprograms import Comparison, DisagreementError

from quire.space import running_rules

PROGRAMS = 100


def main() -> int:
    """Compare until the number of operations, or the time, is reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000, help="stop after so many")
    parser.add_argument("--seconds", type=float, default=None, help="or after this time")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run")
    options = parser.parse_args()
    first = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    began = time.monotonic()
    with Comparison(running_rules()) as comparison:

        def report(word: str) -> None:
            seconds = time.monotonic() - began
            print(
                f"{word}: {comparison.operations} operations in {comparison.programs} programs,"
                f" {comparison.operations / seconds:.0f} a second, seed {first}",
                flush=True,
            )

        batch = 0
        while comparison.operations < options.operations:
            if options.seconds is not None and time.monotonic() - began > options.seconds:
                break
            try:
                comparison.run_random(first + batch, PROGRAMS)
            except DisagreementError as error:
                report("disagreement")
                print(error)
                return 1
            batch += 1
        report("no disagreement")
        failed = sum(comparison.failures.values())
        print(f"{failed} of them failed, in {len(comparison.failures)} ways, in the model as in the kernel")
    return 0


if __name__ == "__main__":
    sys.exit(main())
