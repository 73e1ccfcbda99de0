"""What a VMA is for: the types by which people look at memory, and the sums of each."""

from __future__ import annotations

import bisect
import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

    from quire.process.parsing import Columns

__all__ = ["LIBRARY", "Kind", "Total", "classify"]


class Kind(enum.StrEnum):
    """What a range of addresses is for."""

    IMAGE = "image"
    """A file of which some VMA of the process is executable: programs, shared objects, all of their parts.

    Shared objects that this library loaded out of archives too.
    """
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
LIBRARY = b"/memfd:quire:"
"""How the names of files begin that hold shared objects out of archives (``quire.linking``)."""
_PRIVATE_ACCESSIBLE = frozenset(
    f"{r}{w}{x}p" for r in "r-" for w in "w-" for x in "x-" if f"{r}{w}{x}" != "---"
)
_ARENA_BYTES = 64 << 20
"""glibc aligns arenas to this and reserves as much for each (HEAP_MAX_SIZE where long has 64 bits)."""
_MOST_GUARD_BYTES = 64 << 10


def classify(columns: Columns, stack_pointers: Collection[int] = (), threads: int = 1) -> list[Kind]:
    """Tell the kind of each VMA.

    Args:
        columns: All VMAs of a process, ascending.
        stack_pointers: Where stacks of threads are known to be.
        threads: How many threads the process has.

    Returns:
        A kind for each VMA. Where two would do, the more special one.
    """
    starts, ends, protections, inodes, names = (
        columns.start,
        columns.end,
        columns.protection,
        columns.inode,
        columns.name,
    )
    files = list(zip(columns.major, columns.minor, inodes, strict=True))
    programs = {
        file
        for file, protection, name in zip(files, protections, names, strict=True)
        if file[2]
        and protection[2] == "x"
        and (name.startswith(LIBRARY) or not name.startswith(_SHARED_MEMORY))
    }
    # Where there are many VMAs, nearly all are private memory without a name: only the others are looked at.
    kinds = [Kind.PRIVATE] * len(starts)
    for place, (protection, inode, name) in enumerate(zip(protections, inodes, names, strict=True)):
        if name or inode or protection not in _PRIVATE_ACCESSIBLE:
            kinds[place] = _by_name(name, inode, protection, files[place] in programs)
    pointers = sorted(stack_pointers)
    if threads > 1 or pointers:
        for place, kind in enumerate(kinds):
            if kind is Kind.PRIVATE and (
                _is_any_within(pointers, starts[place], ends[place])
                or (place and protections[place][:2] == "rw" and _is_guard(columns, place - 1, starts[place]))
            ):
                kinds[place] = Kind.STACK
    aligned = [place for place, start in enumerate(starts) if not start % _ARENA_BYTES]
    for place in aligned:
        whole = _arena_end(columns, place) == starts[place] + _ARENA_BYTES
        if kinds[place] is Kind.PRIVATE and protections[place][:2] == "rw" and whole:
            kinds[place] = Kind.HEAP
    return kinds


def _by_name(name: bytes, inode: int, protection: str, program: bool) -> Kind:
    """Tell the kind as far as one VMA alone decides."""
    if name.startswith(_QUIRE):
        return Kind.IMAGE if program else Kind.QUIRE
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


def _is_guard(columns: Columns, place: int, end: int) -> bool:
    """Tell whether a VMA is what pthreads has below a stack: small, private, inaccessible."""
    return (
        columns.end[place] == end
        and columns.protection[place] == "---p"
        and not columns.inode[place]
        and end - columns.start[place] <= _MOST_GUARD_BYTES
    )


def _arena_end(columns: Columns, place: int) -> int:
    """Tell where a VMA ends together with a reservation behind it: these two make an arena of glibc."""
    end = columns.end[place]
    after = place + 1
    if after == len(columns.start) or columns.start[after] != end:
        return end
    is_reservation = columns.protection[after] == "---p" and not columns.inode[after]
    return columns.end[after] if is_reservation else end
