"""Fuzz what reads program files in Python: FatELF, ``#!`` lines, rules of ``binfmt_misc``, `why`.

Honest inputs are bent: bytes changed, cut out, doubled, cut off. Whatever comes, nothing but `Malformed` is
raised, what is accepted is consistent, and no descriptor stays open.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import os
import pathlib
import random
import sys
import tempfile
import time
import traceback

from quire.errors import Malformed
from quire.image import binfmt, fatelf, libraries, script
from quire.image.verdict import why

MAX_BYTES = 65536
RULE = b"enabled\ninterpreter /usr/bin/qemu\nflags: POCF\noffset 2\nmagic 7f454c46\nmask ffffff00\n"


def honest(folder: pathlib.Path) -> dict[str, list[bytes]]:
    """Inputs that are accepted, for each target."""
    program = pathlib.Path("/bin/true").read_bytes()[:MAX_BYTES]
    other = program[:18] + b"\xb7\x00" + program[20:]
    fatelf.glue([program, other], folder / "fat")
    fat = (folder / "fat").read_bytes()
    lines = [b"#!/bin/sh -e\n", b"#! /usr/bin/env -S sh -e \t\n", b"#!" + b"/" * 300 + b" x"]
    cache = pathlib.Path(libraries.CACHE)
    return {
        "fatelf": [fat, fat[: 8 + 48] + bytes(40)],
        "script": lines,
        "binfmt": [RULE, b"disabled\ninterpreter /i\nflags: \nextension .x\n"],
        "cache": [cache.read_bytes()] if cache.exists() else [],
        "why": [program, fat, *lines, b"MZ" + bytes(300), b"PK\3\4" + bytes(100)],
    }


def bent(rng: random.Random, data: bytes) -> bytes:
    """Change an input in a few places, mostly near its start."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(rng.choice([64, 256, len(out) + 1])) if out else 0
        kind = rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 1:
            value = rng.choice([0, 1, 0x7F, 0x80, 0xFF]) * 0x0101010101010101 % (1 << 64)
            out[at : at + 8] = value.to_bytes(8, "little")[: len(out[at : at + 8])]
        elif kind == 2:
            del out[at : at + rng.randint(1, 16)]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randint(1, 64)]
        elif kind == 4 and rng.random() < 0.2:
            del out[at:]
    return bytes(out[: 4 * MAX_BYTES])


def feed(target: str, data: bytes, folder: pathlib.Path) -> None:
    """Give an input to its parser and check what must hold."""
    if target == "fatelf":
        found = fatelf.problems(data)
        try:
            records = fatelf.records(data)
        except Malformed:
            assert found, "refused without a problem"
            return
        assert not found, found
        ends = sorted((each.offset, each.offset + each.size) for each in records)
        assert all(low[1] <= high[0] for low, high in itertools.pairwise(ends))
        assert ends[-1][1] <= len(data)
        for record in records:
            assert fatelf.select(records, record.full_target) == record
    elif target == "script":
        parsed = script.parse(data)
        assert b"\0" not in parsed.interpreter + (parsed.argument or b"")
    elif target == "binfmt":
        binfmt.parse("rule", data).matches(data, "/a.b")
    elif target == "cache":
        (folder / "cache").write_bytes(data)
        libraries.cached(str(folder / "cache"))
    else:
        verdict = why(data)
        assert verdict.runs in (True, False, None)
        assert verdict.runs or verdict.missing


def main() -> int:
    """Run for some seconds; 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    rng = random.Random(seed)
    done = refused = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        inputs = honest(folder)
        why(inputs["why"][0])
        before = len(os.listdir("/proc/self/fd"))
        end = time.monotonic() + args.seconds
        while time.monotonic() < end:
            target = rng.choice([each for each, examples in inputs.items() if examples])
            data = bent(rng, rng.choice(inputs[target]))
            try:
                feed(target, data, folder)
            except Malformed:
                refused += 1
            except Exception:  # noqa: BLE001 - what must not be raised is what is looked for
                traceback.print_exc()
                print(f"target {target}, seed {seed}, base64: {base64.b64encode(data).decode()}")
                return 1
            done += 1
        left = len(os.listdir("/proc/self/fd")) - before
    print(f"programs: {done} inputs, {refused} refused, {left} descriptors left, seed {seed}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
