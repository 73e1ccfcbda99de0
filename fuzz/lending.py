"""Run random clients of a broker against the reference of banks and leases, other ones every time.

The longer form of ``tests/test_broker_model.py``. What disagrees is shrunk by hypothesis, printed as a list
of steps, and ends the run.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from brokermodel import Machine

EXAMPLES = 20
STEPS = 50


def main() -> None:
    """Run until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None, help="repeat a run")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    began = time.monotonic()
    rounds = 0
    try:
        while time.monotonic() - began < options.seconds:
            machine = hypothesis.seed(seed + rounds)(type("Lending", (Machine,), {}))
            run_state_machine_as_test(machine, settings=settings)
            rounds += 1
    finally:
        Machine.close_guests()
    print(f"{rounds * EXAMPLES} conversations of up to {STEPS} steps each, nothing found")


if __name__ == "__main__":
    main()
