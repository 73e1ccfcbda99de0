"""``sharing``: which pages several processes really have in common."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from quire._native import PAGE_SIZE
from quire.process.reading import maps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quire.process.pages import Pages
    from quire.process.reading import Maps
    from quire.process.vma import VMA

__all__ = ["Shared", "Sharing", "sharing"]

Evidence = Literal["frames", "file pages"]

_Places = tuple["NDArray[np.uint64]", "NDArray[np.int64]"]


class Shared(NamedTuple):
    """What the processes have in common under one name.

    Attributes:
        name: Of the mapped file or memory, as the first process that has it calls it; empty for memory
            without a name.
        bytes: Resident memory that at least two of the processes have.
        all_bytes: Resident memory that all of them have.
    """

    name: bytes
    bytes: int
    all_bytes: int


class Sharing(NamedTuple):
    """The answer of `sharing`. Sizes are in bytes of resident memory.

    Attributes:
        pids: The processes, in the order asked for.
        evidence: ``frames``: pages are the same because the numbers of their frames are, anonymous memory
            included. ``file pages``: frames were not told, so only pages of files and shared memory are
            compared, by file and offset, where both processes have them in their page tables and neither
            has copied them; anonymous memory that is shared since a fork is missing.
        resident: Of each process: what was compared.
        pairs: Of each two processes (places in ``pids``, the smaller first): what both have.
        bytes: What at least two have.
        all_bytes: What all have.
        unknown: Of each process: anonymous memory that somebody else has too, who it is does not show; 0 with
            ``frames``.
        names: By name, the largest first.
        partial: What could not be read, in words.
    """

    pids: tuple[int, ...]
    evidence: Evidence
    resident: tuple[int, ...]
    pairs: dict[tuple[int, int], int]
    bytes: int
    all_bytes: int
    unknown: tuple[int, ...]
    names: tuple[Shared, ...]
    partial: tuple[str, ...]


class _Process(NamedTuple):
    """Pages of one process, each once: what identifies them, and of which VMA they are."""

    maps: Maps
    keys: NDArray[np.uint64]
    owners: NDArray[np.int64]
    unknown_pages: int


def sharing(*pids: int, frames: bool = True) -> Sharing:
    """Tell which resident pages processes have in common.

    The processes go on meanwhile: each is looked at once, one after the other. Blocks; the cost grows with
    what is resident.

    Args:
        pids: At least two processes, all different.
        frames: Compare numbers of frames where the kernel tells them, which takes CAP_SYS_ADMIN. False
            compares pages of files only.

    Raises:
        ProcessLookupError: A process is not there, or ended meanwhile.
        PermissionError: This user may not look at a process.
        ValueError: There are fewer than two, or one is named twice.
    """
    found = [maps(pid, detail="maps") for pid in pids]
    numbers = tuple(each.pid for each in found)
    if len(set(numbers)) < 2 or len(set(numbers)) != len(numbers):
        raise ValueError(f"sharing compares two or more different processes, not {pids}")
    pages = [list(each.pages_of_all()) for each in found]
    told = frames and all(any(part.has_frames for _, part in process) for process in pages)
    files: dict[tuple[int, int, int], int] = {}
    processes = [
        _by_frames(each, process) if told else _by_files(each, process, files)
        for each, process in zip(found, pages, strict=True)
    ]
    return _compare(numbers, "frames" if told else "file pages", processes)


def _by_frames(maps_: Maps, pages: list[tuple[VMA, Pages]]) -> _Process:
    """Identify pages by their frames; those of zeros, which everybody has, are left out."""
    parts: list[_Places] = []
    for index, (_, part) in enumerate(pages):
        frames = part.frames
        if frames is not None and len(frames):
            real = frames != 0
            if part.zero is not None:
                real &= ~part.zero
            parts.append((frames[real], np.full(int(real.sum()), index, np.int64)))
    return _each_once(maps_, parts, 0)


def _by_files(
    maps_: Maps, pages: list[tuple[VMA, Pages]], files: dict[tuple[int, int, int], int]
) -> _Process:
    """Identify pages of files by file and page number; count the anonymous ones that somebody has too."""
    parts: list[_Places] = []
    unknown = 0
    for index, (vma, part) in enumerate(pages):
        is_zero = np.zeros(len(part.numbers), np.bool_) if part.zero is None else part.zero
        own = part.present & ~part.file & ~is_zero
        unknown += int((own & ~part.exclusive).sum())
        if vma.inode:
            file = files.setdefault((vma.major, vma.minor, vma.inode), len(files))
            numbers = part.numbers[part.present & part.file].astype(np.uint64)
            first = np.uint64((file << 44) + vma.offset // PAGE_SIZE)
            parts.append((numbers + first, np.full(len(numbers), index, np.int64)))
    return _each_once(maps_, parts, unknown)


def _each_once(maps_: Maps, parts: list[_Places], unknown_pages: int) -> _Process:
    keys = np.concatenate([np.empty(0, np.uint64), *(keys for keys, _ in parts)])
    owners = np.concatenate([np.empty(0, np.int64), *(owners for _, owners in parts)])
    unique, places = np.unique(keys, return_index=True)
    return _Process(maps_, unique, owners[places], unknown_pages)


def _compare(pids: tuple[int, ...], evidence: Evidence, processes: list[_Process]) -> Sharing:
    pairs = {
        (one, other): len(np.intersect1d(processes[one].keys, processes[other].keys, True)) * PAGE_SIZE
        for one, other in itertools.combinations(range(len(processes)), 2)
    }
    keys, counts = np.unique(np.concatenate([process.keys for process in processes]), return_counts=True)
    names: dict[bytes, list[int]] = {}
    left = counts >= 2
    for process in processes:
        # A page is told under the name that the first process has for it.
        mine = np.isin(keys, process.keys) & left
        left &= ~mine
        places = np.searchsorted(process.keys, keys[mine])
        in_all = counts[mine] == len(processes)
        for owner in np.unique(process.owners[places]):
            here = process.owners[places] == owner
            row = names.setdefault(process.maps[int(owner)].name, [0, 0])
            row[0] += int(here.sum()) * PAGE_SIZE
            row[1] += int((here & in_all).sum()) * PAGE_SIZE
    shared = (Shared(name, total, in_all) for name, (total, in_all) in names.items())
    return Sharing(
        pids,
        evidence,
        tuple(len(process.keys) * PAGE_SIZE for process in processes),
        pairs,
        int((counts >= 2).sum()) * PAGE_SIZE,
        int((counts == len(processes)).sum()) * PAGE_SIZE,
        tuple(process.unknown_pages * PAGE_SIZE for process in processes),
        tuple(sorted(shared, key=lambda each: -each.bytes)),
        tuple(f"process {process.maps.pid}: {why}" for process in processes for why in process.maps.partial),
    )
