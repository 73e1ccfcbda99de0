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
FIRST = "quire, for the first time"
EAGER = "quire, shared objects whole in memory"
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
WAYS[FRESH] = WAYS[FIRST] = WAYS[EAGER] = WAYS[OURS]
SETTINGS = {FRESH: {"QUIRE_CODE_CACHE": "off"}, EAGER: {"QUIRE_LIBRARIES": "whole"}}
ROUNDS = 9

# Nothing of this interpreter's own packages is seen. PSS counts a page that n processes map as 1/n. What
# memory files have that is not mapped is memory too, which PSS does not have. Pages of a private mapping that
# are anonymous are copies beside the file's.
PROGRAM = """
import sys, time
began = time.perf_counter()
{way}
{call}
seconds = time.perf_counter() - began
import json, os
pss, mapped, inode = 0, {{}}, None
for line in open("/proc/self/smaps"):
    first, *rest = line.split()
    if not first.endswith(":"):
        inode = int(rest[3]) if rest[4:] and rest[4].startswith("/memfd:") else None
    elif first == "Pss:":
        pss += int(rest[0]) * 1024
    elif first in ("Rss:", "Anonymous:") and inode is not None:
        mapped[inode] = mapped.get(inode, 0) + int(rest[0]) * (1024 if first == "Rss:" else -1024)
held = {{}}
for fd in os.listdir("/proc/self/fd"):
    place = f"/proc/self/fd/{{fd}}"
    if os.path.exists(place) and os.readlink(place).startswith("/memfd:"):
        held[os.stat(place).st_ino] = os.stat(place).st_blocks * 512
unmapped = sum(max(0, size - mapped.get(inode, 0)) for inode, size in held.items())
objects = sys.modules["quire.wheels"].stats().values() if "quire.wheels" in sys.modules else ()
size = sum(each.size_bytes for each in objects)
missing = sum(each.lazy_bytes - each.filled_bytes for each in objects)
print(json.dumps({{"seconds": seconds, "pss": pss, "unmapped": unmapped, "size": size, "missing": missing}}))
"""


class Figures(NamedTuple):
    """Of one process: seconds, and bytes of memory when the call had returned.

    Attributes:
        seconds: From before the path was made until then.
        pss: Proportional set size.
        unmapped: Of its memory files, what it has not mapped.
        size: Length of the shared objects that quire loaded.
        missing: What of them was not in memory.
    """

    seconds: float
    pss: int
    unmapped: int
    size: int
    missing: int


def _once(way: str, package: Package, wheels: list[str], site: str, cache: str) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        home = str(Path(quire.__file__).parents[1])
        if way == FIRST:
            cache = f"{folder}/cache"
        settings = {"XDG_CACHE_HOME": cache, "QUIRE_CODE_CACHE": "", "QUIRE_LIBRARIES": ""}
        before = WAYS[way].format(site=site, wheels=wheels, folder=folder, home=home)
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", PROGRAM.format(way=before, call=package.call)],
            env=os.environ | settings | SETTINGS.get(way, {}),
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
        " off the clock. quire keeps compiled code, checkpoints and notes of what was touched in the user's"
        f" cache folder: kept by the round that is not counted. In {FRESH!r} compiled code is not; in"
        f" {FIRST!r} the folder is new for each process. {EAGER!r} is QUIRE_LIBRARIES=whole."
    )
    if cold:
        what += (
            " Before each start, the wheels, the folder of site-packages and the cache folder were dropped"
            " from the page cache with POSIX_FADV_DONTNEED; the interpreter and its library were not."
        )
    row = Row(
        f"Import {package.name} and call it, {state} page cache",
        what,
        bounds="modules are executed and objects linked, wherever they are from; beside that, what the"
        " dynamic linker reads of each object is decompressed at once, and the rest when it is touched, with"
        " what the stream has between",
    )
    row.peers = [Peer(SITE, []), Peer(UNPACKED, [], GOAL), Peer(FRESH, []), Peer(FIRST, []), Peer(EAGER, [])]
    memory: dict[str, list[float]] = {way: [] for way in WAYS}
    filled: list[float] = []
    for number in range((2 if plan.quick else ROUNDS) + 1):
        for way in WAYS:
            if cold:
                _evict(site, cache, *wheels)
            figures = _once(way, package, wheels, site, cache)
            if not number:
                continue
            memory[way].append(figures.pss + figures.unmapped)
            if way == OURS:
                row.ours.append([figures.seconds])
                filled.append(1 - figures.missing / figures.size)
            else:
                next(peer for peer in row.peers if peer.name == way).seconds.append(figures.seconds)
    sizes = "; ".join(f"{way}: {Spread.of(sample).median / MIB:.1f} MiB" for way, sample in memory.items())
    row.notes.append(
        "Memory of the process afterwards, medians: its proportional set size and what of its memory files it"
        f" has not mapped. {sizes}. Pages of other files that it has not mapped are the page cache's, and not"
        f" counted. Of the {figures.size / MIB:.1f} MiB of shared objects that were loaded,"
        f" {Spread.of(filled).median:.0%} were in memory in quire."
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
