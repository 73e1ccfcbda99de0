"""mremap: grow, shrink, move, duplicate."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from quire.space.constants import (
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE_MASK,
    PAGE_SHIFT,
    VM_ACCOUNT,
    VM_MAYSHARE,
    page_align,
)
from quire.space.mapping import check_word, unmap
from quire.space.merging import Piece, merge_new
from quire.space.outcome import CallError, Change
from quire.space.placement import place
from quire.space.vma import VMA, clone_chain, unlink_chain

if TYPE_CHECKING:
    from quire.space.state import State

_KNOWN = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
_WORD = 1 << 64


def mremap(state: State, address: int, old: int, new: int, flags: int, target: int) -> int:
    """Resize or move a mapping; see `AddressSpace.mremap`."""
    check_word("mremap", address=address, old_length=old, new_length=new, new_address=target)
    old, new = page_align(old) % _WORD, page_align(new) % _WORD
    _check(state, address, old, new, flags, target)
    if flags & MREMAP_FIXED and old == new and state.rules.move_many:
        return _move_many(state, address, old, flags, target)
    vma = state.tree.at(address)
    if vma is None:
        raise CallError(errno.EFAULT, "mremap", f"nothing is mapped at {address:#x}")
    if flags & (MREMAP_FIXED | MREMAP_DONTUNMAP):
        return _move_to(state, vma, address, old, new, flags, target)
    if new == old:
        if state.rules.check_before_unmap:
            return address
        _check_source(vma, address, old)
        return address
    if new < old:
        _shrink(state, address, old, new)
        return address
    return _grow(state, vma, address, old, new, flags)


def _check(state: State, address: int, old: int, new: int, flags: int, target: int) -> None:
    """Refuse arguments that are wrong whatever is mapped."""
    task_size = state.rules.task_size
    if flags & ~_KNOWN:
        raise CallError(errno.EINVAL, "mremap", f"unknown flags {flags & ~_KNOWN:#x}")
    if address & PAGE_MASK:
        raise CallError(errno.EINVAL, "mremap", f"address {address:#x} is not a multiple of the page size")
    if not new:
        raise CallError(errno.EINVAL, "mremap", "the new length is 0")
    if not flags & (MREMAP_FIXED | MREMAP_DONTUNMAP):
        if state.rules.check_before_unmap and new > task_size:
            raise CallError(errno.EINVAL, "mremap", "the new length is beyond the address space")
        return
    if target & PAGE_MASK:
        raise CallError(errno.EINVAL, "mremap", f"new address {target:#x} is not a multiple of the page size")
    if not flags & MREMAP_MAYMOVE:
        raise CallError(errno.EINVAL, "mremap", "a new place without MREMAP_MAYMOVE")
    if flags & MREMAP_DONTUNMAP and old != new:
        raise CallError(errno.EINVAL, "mremap", "MREMAP_DONTUNMAP with another length")
    if new > task_size or target > task_size - new:
        raise CallError(errno.EINVAL, "mremap", "the new range is beyond the address space")
    # The kernel's sum wraps around.
    if address < target + new and target < (address + old) % _WORD:
        raise CallError(errno.EINVAL, "mremap", "the new range overlaps the old one")
    if state.tree.count + 2 >= state.rules.max_map_count - 3:
        raise CallError(errno.ENOMEM, "mremap", "a move could need more VMAs than vm.max_map_count")


def _shrink(state: State, address: int, old: int, new: int) -> None:
    if address + old > state.rules.task_size:
        raise CallError(errno.EINVAL, "mremap", f"{address:#x} + {old:#x} is beyond the address space")
    unmap(state, "mremap", address + new, address + old)


def _check_source(vma: VMA, address: int, old: int) -> None:
    """Refuse what the VMA at the old address does not allow."""
    if not old and not vma.flags & VM_MAYSHARE:
        raise CallError(errno.EINVAL, "mremap", "private memory cannot be duplicated (old length 0)")
    if old > vma.end - address:
        raise CallError(
            errno.EFAULT, "mremap", f"{address:#x} + {old:#x} is beyond the VMA {vma.start:#x}-{vma.end:#x}"
        )


def _move_many(state: State, address: int, length: int, flags: int, target: int) -> int:
    """Move all VMAs of a range, keeping the holes between them; those done before a failure stay moved."""
    end = address + length
    at = target
    last_end = 0
    first = True
    done = address
    while done < end:
        vma = state.tree.first_after(done)
        if vma is None or vma.start >= end:
            break
        start = max(vma.start, done)
        stop = min(vma.end, end)
        if first and vma.start > address:
            break
        if not first:
            at += vma.start - last_end
        last_end = vma.end
        size = stop - start
        _move_to(state, vma, start, size, size, flags, at)
        first = False
        at += size
        done = stop
    if first:
        raise CallError(errno.EFAULT, "mremap", f"nothing is mapped at {address:#x}")
    return target


def _move_to(state: State, vma: VMA, address: int, old: int, new: int, flags: int, target: int) -> int:
    """Move one VMA, or a part of it, to a place that is given or hinted at."""
    if state.rules.check_before_unmap:
        _check_source(vma, address, min(old, new))
    if flags & MREMAP_FIXED:
        unmap(state, "mremap", target, target + new)
        found = state.tree.at(address)
        if found is None:
            raise CallError(errno.EFAULT, "mremap", "the new range held the old one")
        vma = found
    cut_off = max(0, old - new)
    if cut_off:
        _shrink(state, address, old, new)
        old = new
        found = state.tree.at(address)
        assert found is not None
        vma = found
    _check_source(vma, address, old)
    if cut_off and vma.flags & VM_ACCOUNT and state.rules.shrinking_move_charges:
        # The kernel takes the difference of the lengths for growth.
        pages = cut_off >> PAGE_SHIFT
        if not state.machine.charge(pages):
            raise CallError(errno.ENOMEM, "mremap", f"{pages} pages cannot be charged")
        state.machine.leaked_pages += pages
    return _move(state, vma, address, old, new, flags, target)


def _grow(state: State, vma: VMA, address: int, old: int, new: int, flags: int) -> int:
    _check_source(vma, address, old)
    offset = vma.pgoff + ((address - vma.start) >> PAGE_SHIFT)
    if offset + (new >> PAGE_SHIFT) >= _WORD:
        raise CallError(errno.EINVAL, "mremap", "offset and length overflow")
    delta = new - old
    if vma.end - address == old and _free_above(state, vma, vma.end + delta):
        if vma.flags & VM_ACCOUNT and not state.machine.charge(delta >> PAGE_SHIFT):
            raise CallError(errno.ENOMEM, "mremap", f"{delta >> PAGE_SHIFT} pages cannot be charged")
        after = state.tree.first_after(vma.end)
        piece = Piece(
            vma.end,
            vma.end + delta,
            vma.flags,
            vma.pgoff + ((vma.end - vma.start) >> PAGE_SHIFT),
            vma.file,
            vma.anon_vma,
            vma,
        )
        merged = merge_new(state, piece, vma, after)
        assert merged is vma
        return address
    if not flags & MREMAP_MAYMOVE:
        raise CallError(errno.ENOMEM, "mremap", "no room to grow in place, and no MREMAP_MAYMOVE")
    return _move(state, vma, address, old, new, flags, 0)


def _free_above(state: State, vma: VMA, end: int) -> bool:
    if end > state.rules.task_size:
        return False
    after = state.tree.first_after(vma.end)
    return after is None or after.start >= end


def _move(state: State, vma: VMA, address: int, old: int, new: int, flags: int, target: int) -> int:
    """Copy a part of a VMA to another place with its pages, and unmap the original unless told otherwise."""
    given = bool(flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))
    target = place(
        state,
        "mremap",
        target if given else 0,
        new,
        fixed=bool(flags & MREMAP_FIXED),
        align=vma.file is None,
    )
    if state.tree.count >= state.rules.max_map_count - 3:
        raise CallError(errno.ENOMEM, "mremap", "a move could need more VMAs than vm.max_map_count")
    keep = bool(flags & MREMAP_DONTUNMAP)
    if vma.flags & VM_ACCOUNT:
        pages = (new if keep else new - old) >> PAGE_SHIFT
        if not state.machine.charge(pages):
            raise CallError(errno.ENOMEM, "mremap", f"{pages} pages cannot be charged")
    pgoff = vma.pgoff + ((address - vma.start) >> PAGE_SHIFT)
    if vma.file is None and vma.anon_vma is None:
        # Nothing ties the offset to pages yet, so it is made anew: the copy can merge where it goes.
        pgoff = target >> PAGE_SHIFT
    before, after = state.tree.neighbours(target, target + new)
    piece = Piece(target, target + new, vma.flags, pgoff, vma.file, vma.anon_vma, vma)
    copy = merge_new(state, piece, before, after)
    if copy is None:
        copy = VMA(target, target + new, vma.flags, pgoff, vma.file)
        if vma.file is not None:
            vma.file.mappings += 1
        if vma.chain:
            clone_chain(copy, vma)
        state.tree.insert(copy)
        state.changes.append(Change("created", target, target + new, copy.protection))
    elif copy.start <= address < copy.end:
        # The original is a part of what grew over the target.
        vma = copy
    state.table.move(address >> PAGE_SHIFT, (address + old) >> PAGE_SHIFT, target >> PAGE_SHIFT)
    state.changes.append(Change("moved", address, address + old, f"to {target:#x}"))
    if keep:
        if state.rules.dontunmap_drops_account:
            # Those kernels forget the charge of the whole VMA, and never give it back.
            if vma.flags & VM_ACCOUNT:
                state.machine.leaked_pages += (vma.end - vma.start) >> PAGE_SHIFT
            vma.flags &= ~VM_ACCOUNT
        if copy is not vma and vma.start == address and vma.end == address + old:
            unlink_chain(vma)
    elif old:
        accounted = vma.flags & VM_ACCOUNT
        unmap(state, "mremap", address, address + old)
        if accounted:
            # The charge went with the pages: what unmapping gave back is taken again.
            state.machine.committed_pages += old >> PAGE_SHIFT
    return target
