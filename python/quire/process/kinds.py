"""What a VMA is for: the types by which people look at memory, and the sums of each."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from quire.process.parsing import Header

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
_ARENA_BYTES = 64 << 20
"""glibc aligns arenas to this and reserves as much for each (HEAP_MAX_SIZE where long has 64 bits)."""
_MOST_GUARD_BYTES = 64 << 10


def classify(headers: Sequence[Header], stack_pointers: Collection[int] = (), threads: int = 1) -> list[Kind]:
    """Tell the kind of each VMA.

    Args:
        headers: All VMAs of a process, ascending.
        stack_pointers: Where stacks of threads are known to be.
        threads: How many threads the process has.

    Returns:
        A kind for each VMA. Where two would do, the more special one.
    """
    programs = {
        (header.major, header.minor, header.inode)
        for header in headers
        if header.inode and header.protection[2] == "x" and not header.name.startswith(_SHARED_MEMORY)
    }
    kinds = []
    pointers = sorted(stack_pointers)
    before: Header | None = None
    for place, header in enumerate(headers):
        after = headers[place + 1] if place + 1 < len(headers) else None
        kind = _by_name(header, programs)
        if kind is None and header.protection.startswith("---"):
            kind = Kind.RESERVED
        if kind is None and _has_any(pointers, header):
            kind = Kind.STACK
        if kind is None and threads > 1 and _has_guard(before, header):
            kind = Kind.STACK
        if kind is None and _is_arena(header, after):
            kind = Kind.HEAP
        kinds.append(kind or Kind.PRIVATE)
        before = header
    return kinds


def _by_name(header: Header, programs: set[tuple[int, int, int]]) -> Kind | None:
    """Tell the kind as far as name, file and sharing alone decide."""
    name = header.name
    if name.startswith(_QUIRE):
        return Kind.QUIRE
    if name.startswith(_SHARED_MEMORY):
        return Kind.SHAREABLE
    if header.inode:
        program = (header.major, header.minor, header.inode) in programs
        return Kind.IMAGE if program else Kind.MAPPED_FILE
    if name in _KERNEL_NAMES:
        return Kind.KERNEL
    if name == b"[heap]" or name.startswith(b"[anon: glibc: malloc"):
        return Kind.HEAP
    if name.startswith((b"[stack", b"[anon: glibc: pthread stack", b"[anon:stack_and_tls")):
        return Kind.STACK
    if name.startswith(b"/"):
        # Files of systems that number no inodes.
        return Kind.MAPPED_FILE
    if header.protection[3] == "s":
        return Kind.SHAREABLE
    return None


def _has_any(ascending: list[int], header: Header) -> bool:
    return any(header.start <= pointer < header.end for pointer in ascending)


def _has_guard(before: Header | None, header: Header) -> bool:
    """Tell whether a small inaccessible VMA ends where this private memory begins, as pthreads has it."""
    return (
        before is not None
        and before.end == header.start
        and before.protection == "---p"
        and not before.inode
        and before.end - before.start <= _MOST_GUARD_BYTES
        and header.protection[:2] == "rw"
    )


def _is_arena(header: Header, after: Header | None) -> bool:
    """Tell whether memory and the reservation behind it make up exactly one aligned arena of glibc."""
    if header.start % _ARENA_BYTES or header.protection != "rw-p":
        return False
    end = (
        header.end if after is None or after.start != header.end or after.protection != "---p" else after.end
    )
    return end - header.start == _ARENA_BYTES
