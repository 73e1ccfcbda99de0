"""mprotect and madvise: what changes the flags of a part of a VMA, or drops its pages."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from quire.space.constants import (
    MADV_DOFORK,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MADV_KEEPONFORK,
    MADV_WIPEONFORK,
    PAGE_MASK,
    PAGE_SHIFT,
    PROT_ALL,
    VM_ACCESS,
    VM_ACCOUNT,
    VM_DONTCOPY,
    VM_MAYBE_GUARD,
    VM_MAYWRITE,
    VM_NORESERVE,
    VM_SHARED,
    VM_STICKY,
    VM_WIPEONFORK,
    VM_WRITE,
    page_align,
)
from quire.space.mapping import check_word
from quire.space.merging import modify, prepare_anonymous
from quire.space.outcome import CallError, Change
from quire.space.pages import GUARD, ZERO

if TYPE_CHECKING:
    from quire.space.state import State
    from quire.space.vma import VMA

_WORD = 1 << 64


def mprotect(state: State, address: int, length: int, prot: int) -> int:
    """Change the protection of a range; see `AddressSpace.mprotect`."""
    check_word("mprotect", address=address, length=length)
    if address & PAGE_MASK:
        raise CallError(errno.EINVAL, "mprotect", f"address {address:#x} is not a multiple of the page size")
    if not length:
        return 0
    end = address + page_align(length)
    if end >= _WORD or end <= address:
        raise CallError(errno.ENOMEM, "mprotect", "address and length overflow")
    if prot & ~PROT_ALL:
        raise CallError(errno.EINVAL, "mprotect", f"unknown protection {prot:#x}")
    vma = state.tree.first_after(address)
    if vma is None or vma.start > address:
        raise CallError(errno.ENOMEM, "mprotect", f"nothing is mapped at {address:#x}")
    done = address
    while done < end:
        if vma is None or vma.start > done:
            raise CallError(
                errno.ENOMEM, "mprotect", f"nothing is mapped at {done:#x}; what is below was changed"
            )
        flags = prot | vma.flags & ~VM_ACCESS
        if flags & ~(flags >> 4) & VM_ACCESS:
            raise CallError(
                errno.EACCES, "mprotect", f"{vma.start:#x}-{vma.end:#x} was not opened for this access"
            )
        stop = min(vma.end, end)
        done = _protect(state, vma, done, stop, flags)
        vma = state.tree.first_after(done)
    return 0


def _protect(state: State, vma: VMA, start: int, end: int, flags: int) -> int:
    """Give a part of one VMA its new flags; return the end of the VMA that has it then."""
    old = vma.flags
    if flags == old:
        return vma.end
    pages = (end - start) >> PAGE_SHIFT
    charged = uncharged = 0
    if flags & VM_WRITE:
        if not old & (VM_ACCOUNT | VM_WRITE | VM_SHARED | VM_NORESERVE):
            if not state.machine.charge(pages):
                raise CallError(errno.ENOMEM, "mprotect", f"{pages} pages cannot be charged")
            charged = pages
            flags |= VM_ACCOUNT
    elif old & VM_ACCOUNT and vma.file is None and vma.anon_vma is None and state.rules.uncharge_unfaulted:
        flags &= ~VM_ACCOUNT
        uncharged = pages
    got = modify(state, vma, start, end, flags)
    if got is None:
        state.machine.uncharge(charged)
        raise CallError(errno.ENOMEM, "mprotect", "splitting a VMA needs more than vm.max_map_count")
    state.machine.uncharge(uncharged)
    got.flags = flags | got.flags & VM_STICKY
    if old & VM_WRITE and not flags & VM_WRITE:
        state.table.protect(start >> PAGE_SHIFT, end >> PAGE_SHIFT)
    state.changes.append(Change("changed", start, end, f"now {got.protection}"))
    return got.end


def madvise(state: State, address: int, length: int, advice: int) -> int:
    """Give advice on a range; see `AddressSpace.madvise`."""
    check_word("madvise", address=address, length=length)
    if advice not in _ADVICE:
        raise ValueError(f"madvise: the model does not know advice {advice}")
    if address & PAGE_MASK:
        raise CallError(errno.EINVAL, "madvise", f"address {address:#x} is not a multiple of the page size")
    rounded = page_align(length)
    if rounded >= _WORD or address + rounded >= _WORD:
        raise CallError(errno.EINVAL, "madvise", "address and length overflow")
    end = address + rounded
    hole = False
    done = address
    while done < end:
        vma = state.tree.first_after(done)
        if vma is None or vma.start >= end:
            hole = True
            break
        if vma.start > done:
            hole = True
            done = vma.start
        stop = min(vma.end, end)
        _advise(state, vma, done, stop, advice)
        done = stop
    if hole:
        raise CallError(errno.ENOMEM, "madvise", "the range has holes; what is mapped in it was advised")
    return 0


def _advise(state: State, vma: VMA, start: int, end: int, advice: int) -> None:
    if advice in _FLAGS:
        add, remove = _FLAGS[advice]
        if advice == MADV_WIPEONFORK and (vma.file is not None or vma.flags & VM_SHARED):
            raise CallError(errno.EINVAL, "madvise", "only private anonymous memory can be wiped on fork")
        flags = vma.flags & ~remove | add
        if flags == vma.flags:
            return
        got = modify(state, vma, start, end, flags)
        if got is None:
            raise CallError(errno.EAGAIN, "madvise", "splitting a VMA needs more than vm.max_map_count")
        got.flags = flags | got.flags & VM_STICKY
        state.changes.append(Change("changed", start, end, ", ".join(got.flag_names)))
        return
    first, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
    if advice == MADV_DONTNEED:
        state.table.zap(first, last, guards=False)
    elif advice == MADV_FREE:
        if vma.file is not None:
            raise CallError(errno.EINVAL, "madvise", "only private anonymous memory can be freed lazily")
        for _, frame in state.table.range(first, last):
            if frame is not ZERO and frame is not GUARD and frame.mapped == 1:
                frame.lazily_free = True
        state.table.protect(first, last)
    elif advice == MADV_GUARD_INSTALL:
        if not state.rules.guard_any and (vma.file is not None or not vma.flags & VM_MAYWRITE):
            raise CallError(
                errno.EINVAL, "madvise", "guards need private anonymous memory that may be written"
            )
        if state.rules.guard_flag:
            vma.flags |= VM_MAYBE_GUARD
        if vma.file is None or not state.rules.guard_flag:
            # An anon_vma makes a fork copy the markers; without the flag, files get one too.
            prepare_anonymous(state, vma)
        state.table.zap(first, last)
        for page in range(first, last):
            state.table.set(page, GUARD, writable=False)
    else:
        for page, frame in list(state.table.range(first, last)):
            if frame is GUARD:
                state.table.zap(page, page + 1)


_FLAGS = {
    MADV_DONTFORK: (VM_DONTCOPY, 0),
    MADV_DOFORK: (0, VM_DONTCOPY),
    MADV_WIPEONFORK: (VM_WIPEONFORK, 0),
    MADV_KEEPONFORK: (0, VM_WIPEONFORK),
}
_ADVICE = {*_FLAGS, MADV_DONTNEED, MADV_FREE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE}
