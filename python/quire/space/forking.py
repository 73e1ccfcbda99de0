"""fork: what a child gets of each VMA."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from quire.space.constants import (
    PAGE_SHIFT,
    VM_ACCOUNT,
    VM_DONTCOPY,
    VM_MAYBE_GUARD,
    VM_SHARED,
    VM_WIPEONFORK,
)
from quire.space.outcome import CallError
from quire.space.vma import VMA, fork_chain

if TYPE_CHECKING:
    from quire.space.state import State


def fork(parent: State, child: State) -> None:
    """Fill an empty space with copies of a parent's VMAs; private pages are shared until one writes.

    Raises:
        CallError: ENOMEM if the charge of the copies is refused; the child is left with nothing.
    """
    child.brk_start, child.brk_now = parent.brk_start, parent.brk_now
    for vma in parent.tree:
        if vma.flags & VM_DONTCOPY:
            continue
        pages = (vma.end - vma.start) >> PAGE_SHIFT
        if vma.flags & VM_ACCOUNT and not parent.machine.charge(pages):
            for copied in list(child.tree):
                child.discard(copied)
            raise CallError(errno.ENOMEM, "fork", f"{pages} pages cannot be charged")
        copy = VMA(vma.start, vma.end, vma.flags, vma.pgoff, vma.file)
        if vma.file is not None:
            vma.file.mappings += 1
        child.tree.insert(copy)
        if vma.flags & VM_WIPEONFORK:
            continue
        fork_chain(copy, vma)
        if vma.anon_vma is None and not vma.flags & VM_MAYBE_GUARD:
            # Faults of the child find these pages again: the kernel does not copy the entries.
            continue
        first, last = vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT
        if not vma.flags & VM_SHARED:
            parent.table.protect(first, last)
        for page, frame in parent.table.range(first, last):
            child.table.set(page, frame, writable=False)
