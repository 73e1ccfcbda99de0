"""What a touch of an address does."""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING, NamedTuple

from quire.space.constants import (
    ENTRIES,
    PAGE_MASK,
    PAGE_SHIFT,
    VM_ACCESS,
    VM_ACCOUNT,
    VM_EXEC,
    VM_GROWSDOWN,
    VM_SHARED,
    VM_WRITE,
)
from quire.space.merging import prepare_anonymous
from quire.space.outcome import Change
from quire.space.pages import GUARD, ZERO, Frame

if TYPE_CHECKING:
    from quire.space.state import State
    from quire.space.vma import VMA, File


class FaultKind(enum.Enum):
    """How a touch was served."""

    NONE = "no fault"
    MINOR = "minor"
    MAJOR = "major"
    COW = "copy on write"
    STACK_GROWTH = "stack growth"
    SIGSEGV = "SIGSEGV"
    SIGBUS = "SIGBUS"


class Fault(NamedTuple):
    """What a touch did.

    Attributes:
        kind: How it was served, or which signal it is.
        why: In a sentence.
        changes: Of the VMA, if a stack grew.
    """

    kind: FaultKind
    why: str
    changes: tuple[Change, ...] = ()

    @property
    def errno(self) -> int:
        """What a system call that touches the address returns: EFAULT for a signal, else 0."""
        return errno.EFAULT if self.kind in (FaultKind.SIGSEGV, FaultKind.SIGBUS) else 0


def touch(state: State, address: int, *, write: bool) -> Fault:
    """Read or write one byte; see `AddressSpace.touch`."""
    vma = state.tree.first_after(address)
    if vma is None:
        return Fault(FaultKind.SIGSEGV, "nothing is mapped there")
    changes: tuple[Change, ...] = ()
    if address < vma.start:
        why = _cannot_grow(state, vma, address)
        if why is not None:
            return Fault(FaultKind.SIGSEGV, why)
        changes = (_grow(state, vma, address),)
    flags = vma.flags
    if not flags & (VM_WRITE if write else VM_ACCESS):
        return Fault(FaultKind.SIGSEGV, f"{vma.protection} forbids it", changes)
    if flags & VM_ACCESS == VM_EXEC and state.rules.execute_only:
        return Fault(FaultKind.SIGSEGV, "the memory is only executable", changes)
    page = address >> PAGE_SHIFT
    frame = state.table.get(page)
    if frame is GUARD:
        return Fault(FaultKind.SIGSEGV, "a guard page", changes)
    if frame is not None:
        fault = _on_present(state, vma, page, frame) if write else Fault(FaultKind.NONE, "the page is mapped")
    elif vma.file is None:
        fault = _on_anonymous(state, vma, page, write=write)
    else:
        fault = _on_file(state, vma, vma.file, page, write=write)
    if changes and fault.kind is FaultKind.MINOR:
        return Fault(FaultKind.STACK_GROWTH, changes[0].detail, changes)
    return fault


def _cannot_grow(state: State, vma: VMA, address: int) -> str | None:
    """Say why the VMA above an address cannot grow down to it, or None if it can."""
    if not vma.flags & VM_GROWSDOWN:
        return "nothing is mapped there"
    address &= ~PAGE_MASK
    rules = state.rules
    if address < rules.min_address:
        return "a stack cannot grow below vm.mmap_min_addr"
    before = state.tree.before(vma.start)
    gap = rules.stack_guard_gap_pages << PAGE_SHIFT
    if (
        before is not None
        and not before.flags & VM_GROWSDOWN
        and before.flags & VM_ACCESS
        and address - before.end < gap
    ):
        return f"the guard gap above {before.start:#x}-{before.end:#x} must stay free"
    # The kernel makes the anon_vma before it looks at the limits.
    prepare_anonymous(state, vma)
    if (vma.start - address) >> PAGE_SHIFT > vma.pgoff:
        return "the offset of the stack would be negative"
    if rules.stack_limit_bytes is not None and vma.end - address > rules.stack_limit_bytes:
        return "the stack would be larger than RLIMIT_STACK"
    if not state.machine.charge((vma.start - address) >> PAGE_SHIFT):
        return "the pages cannot be charged"
    return None


def _grow(state: State, vma: VMA, address: int) -> Change:
    """Let a stack begin at the page of the address; the charge was made to see whether it is allowed."""
    start = address & ~PAGE_MASK
    pages = (vma.start - start) >> PAGE_SHIFT
    if not vma.flags & VM_ACCOUNT:
        state.machine.uncharge(pages)
    vma.pgoff -= pages
    state.tree.resize(vma, start, vma.end)
    return Change("grown", start, vma.end, f"by {pages} pages")


def _on_present(state: State, vma: VMA, page: int, frame: Frame) -> Fault:
    """Write to a page that is mapped."""
    table = state.table
    if page in table.writable:
        frame.lazily_free = False
        return Fault(FaultKind.NONE, "the page is mapped")
    if vma.flags & VM_SHARED:
        table.writable.add(page)
        return Fault(FaultKind.MINOR, "the shared page may be written now")
    if frame.file is None and frame is not ZERO and frame.mapped == 1:
        table.writable.add(page)
        frame.lazily_free = False
        return Fault(FaultKind.MINOR, "nobody else has the page: it is used again")
    prepare_anonymous(state, vma)
    why = "the page of zeros was copied" if frame is ZERO else f"the page was copied; {frame.mapped} had it"
    table.set(page, Frame(None, page), writable=True)
    return Fault(FaultKind.COW, why)


def _on_anonymous(state: State, vma: VMA, page: int, *, write: bool) -> Fault:
    if not write:
        state.table.set(page, ZERO, writable=False)
        return Fault(FaultKind.MINOR, "the page of zeros was mapped")
    prepare_anonymous(state, vma)
    state.table.set(page, Frame(None, page), writable=True)
    return Fault(FaultKind.MINOR, "a new page was made")


def _on_file(state: State, vma: VMA, file: File, page: int, *, write: bool) -> Fault:
    index = vma.pgoff + page - (vma.start >> PAGE_SHIFT)
    private_write = write and not vma.flags & VM_SHARED
    if private_write:
        # The kernel makes it ready before it asks the file for the page.
        prepare_anonymous(state, vma)
    if index << PAGE_SHIFT >= file.size_bytes:
        if not write:
            _map_around(state, vma, file, page)
        return Fault(FaultKind.SIGBUS, f"beyond the end of {file.name or 'the file'}")
    major = index not in file.cache and not file.in_memory
    if index not in file.cache:
        file.cache[index] = Frame(file, index)
    if private_write:
        state.table.set(page, Frame(None, page), writable=True)
        return Fault(FaultKind.MAJOR if major else FaultKind.COW, "the page of the file was copied")
    if not write:
        _map_around(state, vma, file, page)
    state.table.set(page, file.cache[index], writable=bool(vma.flags & VM_SHARED and vma.flags & VM_WRITE))
    if major:
        return Fault(FaultKind.MAJOR, "the page was read from the file")
    return Fault(FaultKind.MINOR, "a page of the page cache was mapped")


def _map_around(state: State, vma: VMA, file: File, page: int) -> None:
    """Map what the page cache has of the pages around a read fault."""
    around = state.rules.fault_around_pages
    if around <= 1:
        return
    base = vma.start >> PAGE_SHIFT
    slot = page % ENTRIES
    below = min(slot, page - base)
    first = max(slot - slot % around, slot - below)
    last = min(first + around, ENTRIES, slot + (vma.end >> PAGE_SHIFT) - page)
    cache = file.cache
    writable = bool(vma.flags & VM_SHARED and vma.flags & VM_WRITE)
    table = state.table
    for at in range(page - slot + first, page - slot + last):
        cached = cache.get(vma.pgoff + at - base)
        if cached is not None and table.get(at) is None and cached.number << PAGE_SHIFT < file.size_bytes:
            table.set(at, cached, writable=writable)
