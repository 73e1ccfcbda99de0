"""Where a mapping goes: hints, fixed addresses, the search from the top, huge-page alignment."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from quire._native import PAGE_SIZE
from quire.space.constants import PAGE_MASK, PAGE_SHIFT, VM_GROWSDOWN
from quire.space.outcome import CallError

if TYPE_CHECKING:
    from quire.space.state import State
    from quire.space.vma import VMA


def gap_start(state: State, vma: VMA) -> int:
    """Return where a VMA begins for what is placed below it: a stack keeps its guard gap free."""
    if vma.flags & VM_GROWSDOWN:
        return max(0, vma.start - (state.rules.stack_guard_gap_pages << PAGE_SHIFT))
    return vma.start


def search(state: State, length: int) -> int | None:
    """Find the highest free range below ``mmap_base``, else the lowest above ``legacy_base``.

    Returns:
        Its first address, or None.
    """
    high = state.rules.mmap_base
    while True:
        for _, top, after in state.tree.gaps_from_top(length, PAGE_SIZE, high):
            start = top if after is None else gap_start(state, after)
            if start >= top:
                return top - length
            # Room above a stack's guard gap is no room, and what lies above its lower end is not looked at
            # again.
            high = start
            break
        else:
            return _search_upward(state, length)


def _search_upward(state: State, length: int) -> int | None:
    rules = state.rules
    address = rules.legacy_base
    while address + length <= rules.task_size:
        vma = state.tree.first_after(address)
        if vma is None or address + length <= gap_start(state, vma):
            return address
        address = vma.end
    return None


def place(state: State, call: str, hint: int, length: int, *, fixed: bool, align: bool) -> int:
    """Decide the address of a mapping.

    Args:
        state: The space.
        call: For messages.
        hint: Address asked for; 0 is none.
        length: In bytes, whole pages.
        fixed: Whether the address must be the hint.
        align: Whether it is private anonymous memory, which may be aligned for huge pages.

    Returns:
        The first address.

    Raises:
        CallError: ENOMEM if nothing is free or the length is beyond the space, EINVAL for a fixed address
            that is not aligned, EPERM for one below ``min_address``.
    """
    rules = state.rules
    if length > rules.task_size:
        raise CallError(errno.ENOMEM, call, f"{length:#x} bytes are more than an address space has")
    if fixed:
        address = hint
        if address > rules.task_size - length:
            raise CallError(errno.ENOMEM, call, f"{address:#x} + {length:#x} is beyond the address space")
        if address & PAGE_MASK:
            raise CallError(errno.EINVAL, call, f"address {address:#x} is not a multiple of the page size")
    else:
        found = _near(state, hint, length)
        if found is None and align and not hint:
            found = _aligned(state, length)
        if found is None:
            found = search(state, length)
        if found is None:
            raise CallError(errno.ENOMEM, call, f"no free range of {length:#x} bytes")
        address = found
    if address < rules.min_address:
        raise CallError(errno.EPERM, call, f"address {address:#x} is below vm.mmap_min_addr")
    return address


def _near(state: State, hint: int, length: int) -> int | None:
    """Return the hint, rounded down to a page, if the range is free there."""
    hint &= ~PAGE_MASK
    if not hint or hint > state.rules.task_size - length:
        return None
    vma = state.tree.first_after(hint)
    if vma is None or hint + length <= gap_start(state, vma):
        return hint
    return None


def _aligned(state: State, length: int) -> int | None:
    """Return an address that is aligned for huge pages, where the rules say so, or None."""
    huge = state.rules.huge_page_bytes
    if not huge or length < huge or (length % huge and not state.rules.align_any_huge):
        return None
    found = search(state, length + huge)
    if found is None:
        return None
    # The wider range begins somewhere; the next boundary in it is taken, a whole step up if it begins on one.
    return found + huge - found % huge
