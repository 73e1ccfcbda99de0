"""Reading the tables of large program files, against the parsers that Python users have."""

import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable

import lief
import numpy as np
import pefile
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

import quire.image
from benches.common import Peer, Plan, Row
from quire.image.elf import ElfImage


def measure(plan: Plan) -> list[Row]:
    """One row for ELF and, if the package index can be reached, one for PE."""
    rounds = 2 if plan.quick else 7
    rows = [_row("ELF", _largest_library(), _elf_peers(), rounds)]
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder:
        library = _windows_library(pathlib.Path(folder))
        if library is None:
            print("the row on PE files is left out: pip cannot download a wheel for Windows", file=sys.stderr)
        else:
            rows.append(_row("PE", library, _pe_peers(), rounds))
    return rows


Counter = Callable[[pathlib.Path], tuple[int, ...]]


def _row(kind: str, path: pathlib.Path, peers: dict[str, Counter], rounds: int) -> Row:
    counts = _ours(path)
    size = path.stat().st_size >> 20
    what = {
        "ELF": "dynamic symbols and relocations",
        "PE": "imports, exports and base relocations",
    }[kind]
    row = Row(
        f"Tables of a large {kind} file",
        f"Opening {path.name} ({size} MiB, in the page cache) and making a list of its {what}: "
        f"{' + '.join(str(count) for count in counts)} entries.",
        peers=[Peer(name, []) for name in peers],
    )
    for name, count in peers.items():
        theirs = count(path)
        if theirs != counts:
            row.notes.append(f"{name} lists {' + '.join(str(each) for each in theirs)}.")
    for _ in range(rounds):
        row.ours.append([_timed(_ours, path)])
        for peer, count in zip(row.peers, peers.values(), strict=True):
            peer.seconds.append(_timed(count, path))
    return row


def _timed(count: Counter, path: pathlib.Path) -> float:
    start = time.perf_counter()
    count(path)
    return time.perf_counter() - start


def _ours(path: pathlib.Path) -> tuple[int, ...]:
    with quire.image.read(path) as image:
        if isinstance(image, ElfImage):
            # The symbol at index 0, which the others list too, is counted.
            return len(image.dynamic_symbols()), len(image.relocations())
        return len(image.imports()), len(image.exports()), len(image.relocations())


def _elf_peers() -> dict[str, Counter]:
    def elftools(path: pathlib.Path) -> tuple[int, ...]:
        with open(path, "rb") as file:
            dynamic = next(each for each in ELFFile(file).iter_segments() if isinstance(each, DynamicSegment))
            tables = dynamic.get_relocation_tables()
            relocations = [one for name in tables for one in tables[name].iter_relocations()]
            return len([(each.name, each["st_value"]) for each in dynamic.iter_symbols()]), len(relocations)

    def with_lief(path: pathlib.Path) -> tuple[int, ...]:
        found = lief.ELF.parse(str(path))
        symbols = [(each.name, each.value) for each in found.dynamic_symbols]
        relocations = [(each.address, each.type) for each in found.dynamic_relocations]
        relocations += [(each.address, each.type) for each in found.pltgot_relocations]
        return len(symbols), len(relocations)

    return {"pyelftools": elftools, "LIEF": with_lief}


def _pe_peers() -> dict[str, Counter]:
    def with_pefile(path: pathlib.Path) -> tuple[int, ...]:
        theirs = pefile.PE(str(path), fast_load=True)
        kinds = ("IMPORT", "EXPORT", "BASERELOC")
        theirs.parse_data_directories(
            [pefile.DIRECTORY_ENTRY[f"IMAGE_DIRECTORY_ENTRY_{kind}"] for kind in kinds]
        )
        imports = [one for entry in theirs.DIRECTORY_ENTRY_IMPORT for one in entry.imports]
        relocations = [one for block in theirs.DIRECTORY_ENTRY_BASERELOC for one in block.entries if one.type]
        counts = len(imports), len(theirs.DIRECTORY_ENTRY_EXPORT.symbols), len(relocations)
        theirs.close()
        return counts

    def with_lief(path: pathlib.Path) -> tuple[int, ...]:
        found = lief.PE.parse(str(path))
        imports = [one.name for entry in found.imports for one in entry.entries]
        exports = [each.name for each in found.get_export().entries]
        relocations = [one.address for block in found.relocations for one in block.entries if one.position]
        return len(imports), len(exports), len(relocations)

    return {"pefile": with_pefile, "LIEF": with_lief}


def _largest_library() -> pathlib.Path:
    """The largest shared object that numpy brings."""
    site = pathlib.Path(np.__file__).parents[1]
    return max(
        [*site.glob("numpy.libs/*.so*"), *site.glob("numpy/**/*.so")], key=lambda path: path.stat().st_size
    )


def _windows_library(folder: pathlib.Path) -> pathlib.Path | None:
    """The largest library in numpy's wheel for Windows."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--platform=win_amd64", "--python-version=3.11", f"--dest={folder}", "numpy"]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        return None
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size * info.filename.endswith(".dll"))
        return pathlib.Path(archive.extract(largest, folder))
