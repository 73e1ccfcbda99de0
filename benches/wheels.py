"""Importing packages from their wheels, against unpacking them first and against having them installed."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import quire
from benches.common import MIB, Peer, Plan, Row, Spread

ROOT = Path(__file__).resolve().parent.parent
WHEELHOUSE = ROOT / "target" / f"wheels-{sys.implementation.cache_tag}"
GOAL = 2.0


class Package(NamedTuple):
    """What is imported, what it needs, and a first real call."""

    name: str
    needs: tuple[str, ...]
    call: str


PACKAGES = (
    Package("numpy", (), "import numpy as np; np.linalg.inv(np.eye(100) + np.ones((100, 100)))"),
    Package(
        "pandas",
        ("numpy", "python-dateutil", "six"),
        "import pandas as pd; pd.DataFrame({'a': [1, 2, 3], 'b': [1, 1, 2]}).groupby('b').sum()",
    ),
    Package(
        "pyarrow",
        (),
        "import pyarrow as pa, pyarrow.compute as pc; pc.sum(pc.multiply(pa.array(range(1000)), 2))",
    ),
)

SITE = "site-packages"
UNPACKED = "unpacked to a temporary folder first"
OURS = "quire"
FRESH = "quire, code compiled anew"
WAYS = {
    SITE: "sys.path.insert(0, {site!r})",
    UNPACKED: """
import zipfile
for wheel in {wheels!r}:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall({folder!r})
sys.path.insert(0, {folder!r})
""",
    OURS: """
sys.path.insert(0, {home!r})
import quire.wheels
quire.wheels.enable()
sys.path[:1] = {wheels!r}
""",
}
WAYS[FRESH] = WAYS[OURS]

# Nothing of this interpreter's own packages is seen. PSS counts a page that n processes map as 1/n; memfds as
# a whole are beside it, for what of them is not mapped is in memory too.
PROGRAM = """
import sys, time
began = time.perf_counter()
{way}
{call}
seconds = time.perf_counter() - began
import json, os
rollup = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
held = 0
for fd in os.listdir("/proc/self/fd"):
    place = f"/proc/self/fd/{{fd}}"
    if os.path.exists(place) and os.readlink(place).startswith("/memfd:"):
        held += os.stat(place).st_blocks * 512
pss = int(rollup["Pss"].split()[0]) * 1024
print(json.dumps({{"seconds": seconds, "pss": pss, "memfds": held}}), flush=True)
os._exit(0)
"""


class Figures(NamedTuple):
    """Of one process: seconds, and bytes of memory when the call had returned."""

    seconds: float
    pss: int
    memfds: int


def _once(way: str, package: Package, wheels: list[str], site: str, cache: str) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        home = str(Path(quire.__file__).parents[1])
        before = WAYS[way].format(site=site, wheels=wheels, folder=folder, home=home)
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", PROGRAM.format(way=before, call=package.call)],
            env=os.environ | {"QUIRE_CODE_CACHE": "off" if way == FRESH else cache},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    return Figures(**json.loads(done.stdout))


def _files(*places: str) -> Iterator[Path]:
    for place in map(Path, places):
        yield from (path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]


def _evict(*places: str) -> None:
    """Ask the kernel to drop files from the page cache; no privilege is needed for what is on disk."""
    for path in _files(*places):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _row(plan: Plan, package: Package, wheels: list[str], site: str, cache: str, cold: bool) -> Row:
    state = "cold" if cold else "warm"
    names = ", ".join(Path(wheel).name.split("-")[0] for wheel in wheels)
    what = (
        f"A new interpreter, from before the path is made to after `{package.call}`, with {names} from there."
        " In site-packages, as pip makes it, everything is compiled. What is unpacked is not, and is removed"
        " off the clock. quire keeps compiled code in the user's cache folder: kept by the round that is not"
        " counted, or, in the last peer, not at all."
    )
    if cold:
        what += (
            " Before each start, the wheels, the folder of site-packages and the cache folder were dropped"
            " from the page cache with POSIX_FADV_DONTNEED; the interpreter and its library were not."
        )
    row = Row(
        f"Import {package.name} and call it, {state} page cache",
        what,
        bounds="shared objects are decompressed whole, and executing the modules takes the rest",
    )
    row.peers = [Peer(SITE, []), Peer(UNPACKED, [], GOAL), Peer(FRESH, [])]
    pss: dict[str, list[float]] = {}
    held: list[float] = []
    for number in range((2 if plan.quick else 9) + 1):
        for way in WAYS:
            if cold:
                _evict(site, cache, *wheels)
            figures = _once(way, package, wheels, site, cache)
            if not number:
                continue
            pss.setdefault(way, []).append(figures.pss)
            if way == OURS:
                row.ours.append([figures.seconds])
                held.append(figures.memfds)
            else:
                next(peer for peer in row.peers if peer.name == way).seconds.append(figures.seconds)
    sizes = "; ".join(f"{way}: {Spread.of(sample).median / MIB:.1f} MiB" for way, sample in pss.items())
    row.notes.append(
        f"Proportional set size of the process afterwards, medians: {sizes}. Memory files of quire, mapped or"
        f" not: {Spread.of(held).median / MIB:.1f} MiB."
    )
    return row


def measure(plan: Plan) -> list[Row]:
    """Measure each package, warm and cold; of a smoke run, numpy warm. Without wheels there is no row."""
    packages = PACKAGES[:1] if plan.quick else PACKAGES
    names = list(dict.fromkeys(name for package in packages for name in (package.name, *package.needs)))
    command = [sys.executable, str(ROOT / "tools" / "wheelhouse.py"), str(WHEELHOUSE), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return [Row("Importing from wheels", f"Not measured: {done.stderr.strip()[-500:]}")]
    wheel = dict(zip(names, done.stdout.splitlines(), strict=True))
    rows = []
    for package in packages:
        wheels = [wheel[name] for name in (package.name, *package.needs)]
        # On disk, for what is in memory has no page cache to be dropped from.
        with tempfile.TemporaryDirectory(dir=WHEELHOUSE) as folder:
            site, cache = f"{folder}/site", f"{folder}/cache"
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--no-index",
                "--target",
                site,
            ]
            subprocess.run([*pip, *wheels], check=True, stderr=subprocess.DEVNULL)
            os.mkdir(cache, 0o700)
            states = [False] if plan.quick else [False, True]
            rows += [_row(plan, package, wheels, site, cache, cold) for cold in states]
    return rows
