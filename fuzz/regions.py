"""Touch pages of regions millions of times, with discards, forks and other threads: no wrong byte, no leak.

``python regions.py --faults N`` goes on until N touches of missing pages were served, and prints how many.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

import quire

PAGE = quire.PAGE_SIZE
PAGES = 2048
SIZE = PAGES * PAGE - 123
# Which share of the touches each backend serves. The first wakes another thread for each, and is slower.
SHARES = {"thread": 0.2, "signal": 0.4, "sigsegv": 0.4}
KINDS = ("bytes", "file", "deflated")
# Windows with readahead hide touches; at random and one page wide they do not.
WINDOW = PAGE
MIB = 1 << 20


@dataclass(frozen=True)
class Held:
    """What the process holds."""

    descriptors: int
    threads: int
    mappings: int
    resident: int

    @classmethod
    def now(cls) -> Held:
        status = Path("/proc/self/status").read_text("ascii")
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        if found is None:
            raise RuntimeError("no VmRSS in /proc/self/status")
        with open("/proc/self/maps", "rb") as maps:
            mappings = sum(1 for _ in maps)
        return cls(
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            mappings,
            int(found[1]) << 10,
        )

    def leaks(self, before: Held) -> list[str]:
        """What is more than before; idle threads of the pager's and arenas of the allocator may be."""
        found = []
        if self.descriptors > before.descriptors:
            found.append(f"{self.descriptors - before.descriptors} descriptors")
        if self.threads > before.threads + 48:
            found.append(f"{self.threads - before.threads} threads")
        if self.mappings > before.mappings + 2 * 48 + 20:
            found.append(f"{self.mappings - before.mappings} mappings")
        if self.resident > before.resident + 48 * MIB:
            found.append(f"{(self.resident - before.resident) // MIB} MiB")
        return found


class Inputs:
    """The bytes to be seen, and sources of them."""

    def __init__(self, folder: Path) -> None:
        self.data = np.random.default_rng(7).integers(1, 256, SIZE, np.uint8)
        # Each page says which it is.
        self.data[::PAGE] = np.arange(len(self.data[::PAGE])) % 251
        self.plain = folder / "plain"
        self.plain.write_bytes(self.data.tobytes())
        self.archive = folder / "a.zip"
        with zipfile.ZipFile(self.archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("m", self.data.tobytes())

    @contextlib.contextmanager
    def region(self, kind: str, faults: str, shared: bool, discard: str) -> Iterator[quire.Region]:
        target = {"bytes": self.data, "file": self.plain, "deflated": f"{self.archive}!/m"}[kind]
        with quire.Region(
            target, faults=faults, shared=shared, discard=discard, window_bytes=WINDOW
        ) as region:
            yield region


def fail(text: str) -> NoReturn:
    """End the process, also from another thread than the main one."""
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


def check(region: quire.Region, inputs: Inputs, pages: np.ndarray, within: int) -> None:
    """Touch pages at one offset, in an order that no readahead follows."""
    at = np.minimum(pages * PAGE + within, SIZE - 1)
    if not np.array_equal(region.array("u1")[at], inputs.data[at]):
        fail(f"wrong bytes in {region}")


def forked(region: quire.Region, inputs: Inputs) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            check(region, inputs, np.arange(0, PAGES, 16), 5)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0:
        fail(f"a child of {region} ended with {code}")


def disturb(region: quire.Region, inputs: Inputs, rng: random.Random, done: threading.Event) -> None:
    """Until done: what other threads of a program do."""
    while not done.is_set():
        at = rng.randrange(SIZE - 9 * PAGE)
        step = rng.randrange(4)
        if step == 0:
            region.discard(at, 8 * PAGE)
        elif step == 1:
            with region.pin(at, PAGE) as view:
                if view != inputs.data[at : at + PAGE].data:
                    fail(f"wrong bytes pinned in {region}")
        elif step == 2:
            if region.read(at, 3 * PAGE) != inputs.data[at : at + 3 * PAGE].tobytes():
                fail(f"wrong bytes read from {region}")
        else:
            region.prefetch(at, 8 * PAGE, wait=False)


def episode(inputs: Inputs, rng: random.Random, faults: str, most: int) -> int:
    """The life of one region. Returns how many touches were served."""
    generator = np.random.default_rng(rng.getrandbits(32))
    kind = rng.choices(KINDS, [5, 4, 1])[0]
    shared = rng.random() < 0.25
    discard = rng.choice(["kernel", "pressure", "never"])
    rounds = 4 if kind == "deflated" else 60
    with inputs.region(kind, faults, shared, discard) as region:
        # Sharing pages, this backend would not notice that they are gone.
        can_discard = not (shared and faults == "sigsegv")
        done = threading.Event()
        other = threading.Thread(target=disturb, args=(region, inputs, random.Random(rng.random()), done))
        with_others = rng.random() < 0.3
        if with_others:
            other.start()
        try:
            for turn in range(rounds if can_discard else 1):
                check(region, inputs, generator.permutation(PAGES), rng.randrange(PAGE))
                if turn % 20 == 3:
                    forked(region, inputs)
                region.discard()
                if region.stats.faults > most:
                    break
        finally:
            done.set()
            if with_others:
                other.join()
        return region.stats.faults


def soak(most: int, seed: int) -> dict[str, int]:
    """Serve so many touches, and raise SystemExit if a byte is wrong or something leaks."""
    rng = random.Random(seed)
    served = dict.fromkeys(SHARES, 0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        inputs = Inputs(Path(folder))
        for faults in SHARES:
            for _ in range(6):
                served[faults] += episode(inputs, rng, faults, min(20_000, most // 30))
        before = Held.now()
        while sum(served.values()) < most:
            faults = min(SHARES, key=lambda name: served[name] / SHARES[name])
            served[faults] += episode(inputs, rng, faults, most)
        after = Held.now()
    if found := after.leaks(before):
        raise SystemExit(f"leaked {', '.join(found)}: {before} before, {after} after")
    print(f"before: {before}\nafter:  {after}")
    return served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1_000_000, help="touches of missing pages to serve")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    options = parser.parse_args()
    print(f"== regions, {options.faults} faults, --seed {options.seed}", flush=True)
    started = time.monotonic()
    served = soak(options.faults, options.seed)
    seconds = time.monotonic() - started
    shares = ", ".join(f"{count} by {faults}" for faults, count in served.items())
    print(f"{sum(served.values())} faults in {seconds:.0f} s: {shares}; nothing wrong, nothing leaked")


if __name__ == "__main__":
    main()
