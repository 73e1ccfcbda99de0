"""mmap, munmap and brk."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from quire._native import PAGE_SIZE
from quire.space.constants import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_GROWSDOWN,
    MAP_MODELLED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_TYPE,
    PAGE_MASK,
    PAGE_SHIFT,
    PROT_ALL,
    PROT_WRITE,
    VM_ACCOUNT,
    VM_GROWSDOWN,
    VM_MAYACCESS,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_NORESERVE,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    page_align,
)
from quire.space.merging import Piece, merge_new, split
from quire.space.outcome import CallError, Change
from quire.space.placement import gap_start, place
from quire.space.vma import VMA, File

if TYPE_CHECKING:
    from quire.space.state import State

_WORD = 1 << 64


def check_word(call: str, **values: int) -> None:
    """Refuse what no register can hold: misuse, and not an error of the kernel's."""
    for name, value in values.items():
        if not 0 <= value < _WORD:
            raise ValueError(f"{call}: {name} {value} does not fit 64 bits")


def mmap(
    state: State, address: int, length: int, prot: int, flags: int, file: File | None, offset: int
) -> int:
    """Map memory; see `AddressSpace.mmap`."""
    check_word("mmap", address=address, length=length, offset=offset)
    if flags & ~MAP_MODELLED or prot & ~PROT_ALL:
        raise ValueError(
            f"mmap: the model has no flags {flags & ~MAP_MODELLED:#x}, protection {prot & ~PROT_ALL:#x}"
        )
    if offset & PAGE_MASK:
        raise CallError(errno.EINVAL, "mmap", f"offset {offset:#x} is not a multiple of the page size")
    if flags & MAP_ANONYMOUS:
        file = None
    elif file is None:
        raise CallError(errno.EBADF, "mmap", "neither a file nor MAP_ANONYMOUS")
    if not length:
        raise CallError(errno.EINVAL, "mmap", "length is 0")
    fixed = bool(flags & (MAP_FIXED | MAP_FIXED_NOREPLACE))
    rules = state.rules
    if not fixed:
        address &= ~PAGE_MASK
        if 0 < address < rules.min_address:
            address = page_align(rules.min_address)
    length = page_align(length)
    if not length or length >= _WORD:
        raise CallError(errno.ENOMEM, "mmap", "length overflows")
    pgoff = offset >> PAGE_SHIFT
    if pgoff + (length >> PAGE_SHIFT) >= _WORD:
        raise CallError(errno.EOVERFLOW, "mmap", "offset and length overflow")
    if state.tree.count > rules.max_map_count:
        raise CallError(errno.ENOMEM, "mmap", f"{state.tree.count} VMAs, more than vm.max_map_count")
    kind = flags & MAP_TYPE
    align = file is None and kind not in (MAP_SHARED, MAP_SHARED_VALIDATE)
    address = place(state, "mmap", address, length, fixed=fixed, align=align)
    if flags & MAP_FIXED_NOREPLACE:
        there = state.tree.first_after(address)
        if there is not None and there.start < address + length:
            raise CallError(errno.EEXIST, "mmap", f"{there.start:#x}-{there.end:#x} is in the way")
    vm_flags = prot | VM_MAYACCESS
    if flags & MAP_GROWSDOWN:
        vm_flags |= VM_GROWSDOWN
    vm_flags = _check_kind(vm_flags, prot, kind, flags, file)
    if file is None:
        pgoff = 0 if vm_flags & VM_SHARED else address >> PAGE_SHIFT
    if flags & MAP_NORESERVE and rules.overcommit != "never":
        vm_flags |= VM_NORESERVE
    place_new(state, "mmap", address, length, vm_flags, pgoff, file)
    return address


def _check_kind(vm_flags: int, prot: int, kind: int, flags: int, file: File | None) -> int:
    """Add what private and shared mappings of files and of anonymous memory have; refuse what cannot be."""
    if kind not in (MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE) or (
        file is None and kind == MAP_SHARED_VALIDATE
    ):
        raise CallError(errno.EINVAL, "mmap", "neither MAP_SHARED nor MAP_PRIVATE")
    if file is not None:
        if kind == MAP_SHARED_VALIDATE and flags & MAP_FIXED_NOREPLACE:
            raise CallError(
                errno.EOPNOTSUPP, "mmap", "MAP_SHARED_VALIDATE refuses flags that it does not know"
            )
        if kind != MAP_PRIVATE:
            if prot & PROT_WRITE and not file.writable:
                raise CallError(errno.EACCES, "mmap", f"{file.name} was not opened for writing")
            vm_flags |= VM_SHARED | VM_MAYSHARE
            if not file.writable:
                vm_flags &= ~(VM_MAYWRITE | VM_SHARED)
        if vm_flags & VM_GROWSDOWN:
            raise CallError(errno.EINVAL, "mmap", "a mapping of a file cannot grow down")
    elif kind == MAP_SHARED:
        if vm_flags & VM_GROWSDOWN:
            raise CallError(errno.EINVAL, "mmap", "shared memory cannot grow down")
        vm_flags |= VM_SHARED | VM_MAYSHARE
    return vm_flags


def place_new(
    state: State, call: str, address: int, length: int, vm_flags: int, pgoff: int, file: File | None
) -> VMA:
    """Map at an address that is decided, in place of what is there."""
    end = address + length
    pages = length >> PAGE_SHIFT
    old = cut_out(state, call, address, end)
    charge = 0
    if vm_flags & (VM_NORESERVE | VM_SHARED | VM_WRITE) == VM_WRITE:
        freed = sum((vma.end - vma.start) >> PAGE_SHIFT for vma in old if vma.flags & VM_ACCOUNT)
        charge = pages
        if not state.machine.charge(pages - freed):
            raise CallError(errno.ENOMEM, call, f"{pages - freed} pages cannot be charged")
        state.machine.uncharge(pages - freed)
        vm_flags |= VM_ACCOUNT
    for vma in old:
        state.discard(vma)
    before, after = state.tree.neighbours(address, end)
    state.machine.committed_pages += charge
    merged = merge_new(state, Piece(address, end, vm_flags, pgoff, file), before, after)
    if merged is not None:
        return merged
    if vm_flags & VM_SHARED and file is None:
        file = _shared_memory(state, call, length, vm_flags)
    vma = VMA(address, end, vm_flags, pgoff, file)
    if file is not None:
        file.mappings += 1
    state.tree.insert(vma)
    state.changes.append(Change("created", address, end, vma.protection))
    return vma


def _shared_memory(state: State, call: str, length: int, vm_flags: int) -> File:
    """Make the file behind shared anonymous memory, charged as a whole."""
    file = File("/dev/zero (deleted)", length, in_memory=True)
    if not vm_flags & VM_NORESERVE:
        pages = length >> PAGE_SHIFT
        if not state.machine.charge(pages):
            raise CallError(errno.ENOMEM, call, f"{pages} pages cannot be charged")
        file.charged_pages = pages
    return file


def cut_out(state: State, call: str, start: int, end: int) -> list[VMA]:
    """Split what crosses the ends of a range; return the VMAs inside it.

    Raises:
        CallError: ENOMEM if one VMA would become three with no VMA left to spend.
    """
    found = state.tree.overlapping(start, end)
    if not found:
        return found
    first = found[0]
    if first.start < start:
        if first.end > end and not state.may_split():
            raise CallError(errno.ENOMEM, call, "a hole in a VMA needs one more than vm.max_map_count")
        split(state, first, start, keep_upper=True)
    last = found[-1]
    if last.end > end:
        split(state, last, end, keep_upper=False)
    return found


def munmap(state: State, address: int, length: int) -> int:
    """Unmap a range; see `AddressSpace.munmap`."""
    check_word("munmap", address=address, length=length)
    task_size = state.rules.task_size
    if address & PAGE_MASK or address > task_size or length > task_size - address:
        raise CallError(
            errno.EINVAL, "munmap", f"{address:#x} + {length:#x} is not a range of pages in the space"
        )
    if not length:
        raise CallError(errno.EINVAL, "munmap", "length is 0")
    unmap(state, "munmap", address, address + page_align(length))
    return 0


def unmap(state: State, call: str, start: int, end: int) -> None:
    """Unmap a range of whole pages that is inside the space."""
    for vma in cut_out(state, call, start, end):
        state.discard(vma)


def brk(state: State, address: int) -> int:
    """Move the end of the heap; see `AddressSpace.brk`."""
    check_word("brk", address=address)
    old = page_align(state.brk_now)
    new = page_align(address)
    if address < state.brk_start:
        return state.brk_now
    if new == old:
        state.brk_now = address
        return address
    tree = state.tree
    if address <= state.brk_now:
        vma = tree.first_after(new)
        if vma is None or vma.start >= old:
            return state.brk_now
        try:
            unmap(state, "brk", new, old)
        except CallError:
            # The call reports no errors: it returns the break, which stays where it was.
            return state.brk_now
        state.brk_now = address
        return address
    rules = state.rules
    if new > rules.task_size:
        return state.brk_now
    after = tree.first_after(old)
    limit = new + PAGE_SIZE
    if after is not None and limit > gap_start(state, after):
        return state.brk_now
    if _extend_heap(state, old, new):
        state.brk_now = address
    return state.brk_now


def _extend_heap(state: State, old: int, new: int) -> bool:
    pages = (new - old) >> PAGE_SHIFT
    if state.tree.count > state.rules.max_map_count or not state.machine.charge(pages):
        return False
    flags = VM_READ | VM_WRITE | VM_MAYACCESS | VM_ACCOUNT
    piece = Piece(old, new, flags, old >> PAGE_SHIFT, None)
    before = state.tree.before(old)
    if before is not None and before.end <= state.brk_start:
        before = None
    if merge_new(state, piece, before, None, only_below=True) is None:
        state.tree.insert(VMA(old, new, flags, old >> PAGE_SHIFT))
        state.changes.append(Change("created", old, new, "rw-p"))
    return True
