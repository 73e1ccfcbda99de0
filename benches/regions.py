"""Regions: reading compressed members through memory, against the codec alone and against other ways."""

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import quire
from benches.common import MIB, PAGE, Peer, Plan, Row, peak_bytes
from benches.members import MEMBER, WAYS

SIZE = 200 * MIB
QUICK_SIZE = 16 * MIB
STEP = 256 << 10
CODEC_GOAL = 0.9
GZIP_WAYS = ("rapidgzip", "indexed_gzip")
FROM_THE_START = ("zipfile", "ratarmountcore")
"""They decode from the start again for each step backwards, for minutes: their first page is measured."""
SHARE = 0.01


def content(size: int) -> bytes:
    """Rows of numbers as text, of the kind that is kept in compressed files."""
    rng = np.random.default_rng(17)
    rows = size // 24
    numbers = np.column_stack([rng.integers(0, 2000, rows), rng.normal(50, 9, rows).round(3)])
    lines = [f"{int(count):6d},{value:10.3f},ok\n" for count, value in numbers[: 1 << 16]]
    block = "".join(lines).encode()
    # Shifted copies with a changing mark, so that blocks compress alike and differ.
    marked = [b"%012d;%s" % (number, block) for number in range(size // len(block) + 1)]
    return b"".join(marked)[:size]


class Files:
    """The member in every form that is measured."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self.data = content(size)
        self.crc = zlib.crc32(self.data)
        self.zip = folder / "deflated.zip"
        with zipfile.ZipFile(self.zip, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            archive.writestr(MEMBER, self.data)
        self.gzip = folder / "data.gz"
        self.zstd = folder / "data.zst"
        self.gzip.write_bytes(gzip_of(self.data))
        self.zstd.write_bytes(zstd_of(self.data))


def gzip_of(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, 6)


def zstd_of(data: bytes) -> bytes:
    """Frames of 256 KiB, the way ``quire pack`` writes them."""
    import zstandard

    packer = zstandard.ZstdCompressor(level=3)
    return b"".join(packer.compress(data[start : start + STEP]) for start in range(0, len(data), STEP))


def measure(plan: Plan) -> list[Row]:
    """Measure all rows on regions but those on single faults."""
    size = QUICK_SIZE if plan.quick else SIZE
    rounds = 2 if plan.quick else 7
    home = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = name
        try:
            files = Files(folder, size)
            return [
                *(_sequential(kind, path, files, rounds) for kind, path in _kinds(files)),
                *_random(files, folder, min(rounds, 5)),
                _refill(files, rounds),
            ]
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if home is not None:
                os.environ["XDG_CACHE_HOME"] = home


def _kinds(files: Files) -> Iterator[tuple[str, str]]:
    yield "deflated zip member", f"{files.zip}!/{MEMBER}"
    yield "zstandard file", str(files.zstd)


def forget(folder: Path) -> None:
    """Remove what earlier rounds have cached."""
    shutil.rmtree(folder / "quire", ignore_errors=True)


def _sequential(kind: str, target: str, files: Files, rounds: int) -> Row:
    row = Row(
        f"sequential read of a {kind}",
        f"{files.size // MIB} MiB, read once from the first byte to the last through a numpy view, a sum of"
        f" each {STEP // 1024} KiB; opening and closing are counted and nothing is cached. For the codec"
        " alone: the same source without a region, read into bytes in the same steps; and a loop around the"
        " codec's own library.",
    )
    alone = Peer("the codec alone", [], CODEC_GOAL)
    library = Peer("zlib in Python" if "zip" in kind else "zstandard in Python", [])
    folder = files.zip.parent
    for number in range(rounds + 1):
        forget(folder)
        ours = _timed(lambda: _through_region(target))
        forget(folder)
        codec = _timed(lambda: _through_source(target))
        plain = _timed(lambda: _through_library(kind, files))
        if number:
            row.ours.append([ours])
            alone.seconds.append(codec)
            library.seconds.append(plain)
    row.peers = [alone, library]
    rate = files.size / MIB / row.spread.median
    row.bounds = (
        f"the codec: {rate:.0f} MiB/s reach the reader; what is added is a copy into pages and faults"
    )
    return row


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _through_region(target: str) -> None:
    with quire.open(target) as region:
        array = region.array("u1")
        for start in range(0, len(array), STEP):
            int(array[start : start + STEP].max())
        del array


def _through_source(target: str) -> None:
    with quire.open_source(target) as source:
        for start in range(0, source.size, STEP):
            piece = source.read(start, min(STEP, source.size - start))
            int(np.frombuffer(piece, np.uint8).max())


def _through_library(kind: str, files: Files) -> None:
    if "zip" in kind:
        with zipfile.ZipFile(files.zip).open(MEMBER) as member:
            while piece := member.read(STEP):
                int(np.frombuffer(piece, np.uint8).max())
        return
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(
        files.zstd.read_bytes(), read_across_frames=True
    ) as reader:
        while piece := reader.read(STEP):
            int(np.frombuffer(piece, np.uint8).max())


def _random(files: Files, folder: Path, rounds: int) -> list[Row]:
    """1 % of the pages at random, each way in a process of its own."""
    what = (
        f"1 % of the pages of a member of {files.size // MIB} MiB, at random, in a process of its own each"
        " time; from opening on, imports not counted. "
    )
    first = Row(
        "the first byte of a random page of a deflated member", what + "Until the first page is there."
    )
    total = Row("1 % of a deflated member, at random pages", what + "Until all are there.")
    peak = Row(
        "memory of that process",
        "The largest resident set of the processes of the row above, in place of times: read s as GB.",
    )
    ways = [way for way in WAYS if way != "quire"]
    figures: dict[str, list[dict[str, Any]]] = {}
    known = "quire, checkpoints cached"
    for _ in range(rounds):
        forget(folder)
        sums = set()
        for way in ("quire", known, *ways):
            path = files.gzip if way in GZIP_WAYS else files.zip
            if way == known:
                # Checkpoints are kept once all of a member was passed.
                _through_source(f"{path}!/{MEMBER}")
            pages = 1 if way in FROM_THE_START else int(files.size // PAGE * SHARE)
            outcome = _run("quire" if way == known else way, path, files.size, pages)
            if outcome is None:
                continue
            sums.add((pages, outcome["sum"]))
            figures.setdefault(way, []).append(outcome)
        if len(sums) != len({pages for pages, _ in sums}):
            raise RuntimeError(f"the ways read different bytes: {sums}")
    for row, key, unit in ((first, "first", 1.0), (total, "total", 1.0), (peak, "peak", 1e-9)):
        row.ours = [[outcome[key] * unit] for outcome in figures["quire"]]
        row.peers = [
            Peer(way, [outcome[key] * unit for outcome in figures[way]])
            for way in (known, *ways)
            if way in figures and (key == "first" or way not in FROM_THE_START)
        ]
        row.bounds = "the codec, which must pass everything before the last page asked for once"
    total.notes.append(
        "zipfile's own seek and ratarmountcore decode from the start again for each step backwards, for"
        " minutes: only their first page is measured."
    )
    missing = [way for way in ways if way not in figures]
    if missing:
        total.notes.append(f"Not installed, so not measured: {', '.join(missing)}.")
    return [first, total, peak]


def _run(way: str, path: Path, size: int, pages: int) -> dict[str, Any] | None:
    """Run one way; None if what it needs is not installed."""
    done = subprocess.run(
        [sys.executable, "-m", "benches.members", way, str(path), str(size), str(pages)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "ModuleNotFoundError" in done.stderr:
        return None
    if done.returncode:
        raise RuntimeError(done.stderr)
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def _refill(files: Files, rounds: int) -> Row:
    limit = max(files.size // 2, 80 * MIB)
    row = Row(
        "reading a region under a memory limit",
        f"The zstandard file of {files.size // MIB} MiB read twice in a process whose cgroup is limited to"
        f" {limit // MIB} MiB, with no swap, against the same process without a limit; its CRC-32 is right.",
    )
    free = Peer("without a limit", [])
    for number in range(rounds + 1):
        limited, unlimited = _limited(files, limit), _limited(files, None)
        if limited is None or unlimited is None:
            row.notes.append("No cgroup could be made, so nothing was measured.")
            row.ours, row.peers = [[float("nan")]], []
            return row
        if number:
            row.ours.append([limited["seconds"]])
            free.seconds.append(unlimited["seconds"])
            row.part("largest resident set, in GB instead of s", limited["peak"] / 1e9)
            row.part("windows filled again, in thousands instead of s", limited["refills"] / 1e3)
    row.peers = [free]
    row.bounds = "refilling what the kernel took: each byte is decoded twice"
    return row


def _limited(files: Files, limit: int | None) -> dict[str, float] | None:
    from tests.cgroups import Refused, limited_group

    receive, send = multiprocessing.Pipe(duplex=False)
    try:
        with contextlib.nullcontext() if limit is None else limited_group(limit) as procs:
            arguments = (str(files.zstd), files.crc, procs, send)
            child = multiprocessing.get_context("spawn").Process(target=read_twice, args=arguments)
            child.start()
            outcome: dict[str, float] = receive.recv()
            child.join()
            return outcome
    except Refused:
        return None


def read_twice(path: str, crc: int, procs: str | None, send: Any) -> None:
    """In a process of its own: enter the group, read everything twice."""
    if procs is not None:
        Path(procs).write_text(str(os.getpid()))
    start = time.perf_counter()
    with quire.open(path) as region:
        for _ in range(2):
            with memoryview(region) as view:
                if zlib.crc32(view) != crc:
                    raise RuntimeError("wrong bytes")
        refills = region.stats.refills
    send.send({"seconds": time.perf_counter() - start, "peak": peak_bytes(), "refills": refills})
