"""Reading a compressed member by random pages: one way of doing it, in a process of its own.

``python -m benches.members WAY PATH SIZE PAGES`` prints as JSON what it took: seconds to the first page and
in all, the process's largest resident set, and a sum of what was read.
"""

import json
import mmap
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np

from benches.common import PAGE, WORDS, peak_bytes

MEMBER = "data.bin"

Read = Callable[[int], bytes]


def quire_region(path: Path) -> Read:
    import quire

    view = memoryview(quire.open(f"{path}!/{MEMBER}"))
    return lambda offset: view[offset : offset + PAGE].tobytes()


def by_zipfile(path: Path) -> Read:
    member = zipfile.ZipFile(path).open(MEMBER)  # noqa: SIM115 - it stays open until the process ends

    def read(offset: int) -> bytes:
        member.seek(offset)
        return member.read(PAGE)

    return read


def whole_in_memory(path: Path) -> Read:
    data = zipfile.ZipFile(path).read(MEMBER)
    return lambda offset: data[offset : offset + PAGE]


def unpack_and_map(path: Path) -> Read:
    folder = tempfile.TemporaryDirectory(dir=path.parent)
    with open(zipfile.ZipFile(path).extract(MEMBER, folder.name), "rb") as file:
        view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def read(offset: int, _keep: object = folder) -> bytes:
        return view[offset : offset + PAGE]

    return read


def by_rapidgzip(path: Path) -> Read:
    import rapidgzip

    file = rapidgzip.open(str(path), parallelization=2)

    def read(offset: int) -> bytes:
        file.seek(offset)
        return file.read(PAGE)

    return read


def by_indexed_gzip(path: Path) -> Read:
    import indexed_gzip

    file = indexed_gzip.IndexedGzipFile(str(path))

    def read(offset: int) -> bytes:
        file.seek(offset)
        return file.read(PAGE)

    return read


def by_ratarmount(path: Path) -> Read:
    from ratarmountcore.mountsource.factory import open_mount_source

    source = open_mount_source(str(path), writeIndex=False)
    info = source.lookup(f"/{MEMBER}")
    if info is None:
        raise FileNotFoundError(MEMBER)
    file = source.open(info)

    def read(offset: int) -> bytes:
        file.seek(offset)
        return file.read(PAGE)

    return read


WAYS: dict[str, Callable[[Path], Read]] = {
    "quire": quire_region,
    "zipfile": by_zipfile,
    "zipfile, whole": whole_in_memory,
    "unpack and mmap": unpack_and_map,
    "rapidgzip": by_rapidgzip,
    "indexed_gzip": by_indexed_gzip,
    "ratarmountcore": by_ratarmount,
}


MODULES = {
    "quire": ("quire.region", "quire.sources"),
    "rapidgzip": ("rapidgzip",),
    "indexed_gzip": ("indexed_gzip",),
    "ratarmountcore": ("ratarmountcore.mountsource.factory",),
}
"""Imported before the clock starts."""


def main(way: str, path: Path, size: int, count: int) -> None:
    """Read pages at random and report."""
    chosen = np.random.default_rng(29).permutation(size // PAGE)[:count]
    for module in MODULES.get(way, ()):
        import_module(module)
    start = time.perf_counter()
    read = WAYS[way](path)
    total, first = 0, 0.0
    for page in chosen.tolist():
        data = read(page * PAGE)
        first = first or time.perf_counter() - start
        total += int(np.frombuffer(data, np.uint64, WORDS).sum())
    seconds = time.perf_counter() - start
    print(json.dumps({"first": first, "total": seconds, "peak": peak_bytes(), "sum": total % (1 << 64)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
