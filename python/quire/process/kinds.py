"""What a VMA is for: the types by which people look at memory, and the sums of each."""

from __future__ import annotations

import bisect
import enum
from operator import itemgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from quire.process.parsing import END, NAME, START

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from quire.process.parsing import Row

__all__ = ["Kind", "Total", "classify"]


class Kind(enum.StrEnum):
    """What a range of addresses is for."""

    IMAGE = "image"
    """A file of which some VMA of the process is executable: programs, shared objects, all of their parts."""
    MAPPED_FILE = "mapped file"
    """Any other file, a device too."""
    HEAP = "heap"
    """What ``brk`` gave, and the arenas of the C library where they are evident."""
    STACK = "stack"
    """The main thread's, and those of other threads where they are evident."""
    PRIVATE = "private data"
    """Any other private anonymous memory."""
    SHAREABLE = "shareable"
    """Shared memory that is no named file: memfds, ``/dev/shm``, System V, shared anonymous memory."""
    QUIRE = "quire"
    """Memory of this library: segments, layers of snapshots, regions, mirrors."""
    PAGE_TABLES = "page tables"
    """What the kernel holds to translate the addresses; no VMA."""
    KERNEL = "kernel"
    """What the kernel shows to programs: vdso, vvar, vsyscall."""
    RESERVED = "reserved"
    """Private memory that may not be touched (``PROT_NONE``)."""
    UNUSABLE = "unusable"
    """The gap that the kernel keeps below a stack; no VMA."""


class Total(NamedTuple):
    """Sums over the VMAs of one kind, in bytes.

    Attributes:
        vmas: Number of VMAs.
        virtual: Address space.
        committed: Of it what may be touched: all but ``PROT_NONE``.
        resident: In memory; None where ``smaps`` was not read.
        proportional: In memory, each page divided by how often it is mapped; None as above.
    """

    vmas: int
    virtual: int
    committed: int
    resident: int | None
    proportional: int | None


_KERNEL_NAMES = frozenset(
    (b"[vdso]", b"[vvar]", b"[vvar_vclock]", b"[vsyscall]", b"[vectors]", b"[sigpage]", b"[uprobes]")
)
_SHARED_MEMORY = (
    b"/memfd:",
    b"/dev/shm/",
    b"/SYSV",
    b"/dev/zero (deleted)",
    b"/anon_hugepage",
    b"[anon_shmem:",
    b"anon_inode:",
)
_QUIRE = (b"/memfd:quire-", b"/memfd:quire:")
_PROTECTION: Final = 2
_MAJOR: Final = 4
_MINOR: Final = 5
_INODE: Final = 6
_ESSENCE = itemgetter(_PROTECTION, _INODE, NAME)
_PRIVATE_ACCESSIBLE = frozenset(
    f"{r}{w}{x}p" for r in "r-" for w in "w-" for x in "x-" if f"{r}{w}{x}" != "---"
)
_ARENA_BYTES = 64 << 20
"""glibc aligns arenas to this and reserves as much for each (HEAP_MAX_SIZE where long has 64 bits)."""
_MOST_GUARD_BYTES = 64 << 10


def classify(rows: Sequence[Row], stack_pointers: Collection[int] = (), threads: int = 1) -> list[Kind]:
    """Tell the kind of each VMA.

    Args:
        rows: All VMAs of a process, ascending.
        stack_pointers: Where stacks of threads are known to be.
        threads: How many threads the process has.

    Returns:
        A kind for each VMA. Where two would do, the more special one.
    """
    programs = {
        (row[_MAJOR], row[_MINOR], row[_INODE])
        for row in rows
        if row[_INODE] and row[_PROTECTION][2] == "x" and not row[NAME].startswith(_SHARED_MEMORY)
    }
    # Where there are many VMAs, nearly all are private memory without a name: only the others are looked at.
    kinds = [Kind.PRIVATE] * len(rows)
    special = [
        place
        for place, (protection, inode, name) in enumerate(map(_ESSENCE, rows))
        if name or inode or protection not in _PRIVATE_ACCESSIBLE
    ]
    for place in special:
        row = rows[place]
        program = (row[_MAJOR], row[_MINOR], row[_INODE]) in programs
        kinds[place] = _by_name(row[NAME], row[_INODE], row[_PROTECTION], program)
    pointers = sorted(stack_pointers)
    if threads > 1 or pointers:
        for place, row in enumerate(rows):
            if kinds[place] is Kind.PRIVATE and (
                _is_any_within(pointers, row[START], row[END])
                or (place and row[_PROTECTION][:2] == "rw" and _is_guard(rows[place - 1], row[START]))
            ):
                kinds[place] = Kind.STACK
    aligned = [place for place, start in enumerate(map(itemgetter(START), rows)) if not start % _ARENA_BYTES]
    for place in aligned:
        whole = _arena_end(rows, place) == rows[place][START] + _ARENA_BYTES
        if kinds[place] is Kind.PRIVATE and rows[place][_PROTECTION][:2] == "rw" and whole:
            kinds[place] = Kind.HEAP
    return kinds


def _by_name(name: bytes, inode: int, protection: str, program: bool) -> Kind:
    """Tell the kind as far as one VMA alone decides."""
    if name.startswith(_QUIRE):
        return Kind.QUIRE
    if name.startswith(_SHARED_MEMORY):
        return Kind.SHAREABLE
    if inode or name.startswith(b"/"):
        # Some file systems number no inodes.
        return Kind.IMAGE if program else Kind.MAPPED_FILE
    if name in _KERNEL_NAMES:
        return Kind.KERNEL
    if name == b"[heap]" or name.startswith(b"[anon: glibc: malloc"):
        return Kind.HEAP
    if name.startswith((b"[stack", b"[anon: glibc: pthread stack", b"[anon:stack_and_tls")):
        return Kind.STACK
    if protection[3] == "s":
        return Kind.SHAREABLE
    return Kind.RESERVED if protection.startswith("---") else Kind.PRIVATE


def _is_any_within(ascending: list[int], start: int, end: int) -> bool:
    place = bisect.bisect_left(ascending, start)
    return place < len(ascending) and ascending[place] < end


def _is_guard(row: Row, end: int) -> bool:
    """Tell whether a VMA is what pthreads has below a stack: small, private, inaccessible."""
    return (
        row[END] == end
        and row[_PROTECTION] == "---p"
        and not row[_INODE]
        and end - row[START] <= _MOST_GUARD_BYTES
    )


def _arena_end(rows: Sequence[Row], place: int) -> int:
    """Tell where a VMA ends together with a reservation behind it: these two make an arena of glibc."""
    end = rows[place][END]
    if place + 1 < len(rows):
        after = rows[place + 1]
        if after[START] == end and after[_PROTECTION] == "---p" and not after[_INODE]:
            return after[END]
    return end
