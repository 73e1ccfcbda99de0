"""exec: a load plan becomes an address space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire._native import PAGE_SIZE
from quire.space.constants import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_GROWSDOWN,
    MAP_MODELLED,
    MAP_PRIVATE,
    PAGE_MASK,
)
from quire.space.faults import touch
from quire.space.mapping import mmap, munmap, unmap
from quire.space.protecting import mprotect

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quire.image.operations import Operation
    from quire.space.state import State
    from quire.space.vma import File

# What a stack has before the first instruction: 128 KiB below the page of arguments.
STACK_PAGES = 33


def execute(state: State, plan: Iterable[Operation], files: Mapping[str, File]) -> int:
    """Replace the whole space by what a plan maps; see `AddressSpace.exec`."""
    unmap(state, "exec", 0, state.rules.task_size)
    for operation in plan:
        call, address, length = operation.call, operation.address, operation.length
        if call == "mmap":
            file = None if operation.file is None else files[operation.file]
            flags = int(operation.flags) & MAP_MODELLED
            mmap(state, address, length, int(operation.protection), flags, file, operation.offset)
        elif call == "munmap":
            munmap(state, address, length)
        elif call == "mprotect":
            mprotect(state, address, length, int(operation.protection))
        elif call in ("zero", "copy", "relocate"):
            for page in range(address & ~PAGE_MASK, address + length, PAGE_SIZE):
                touch(state, page, write=True)
        elif call == "brk":
            state.brk_start = state.brk_now = address
        elif call == "stack":
            top = state.rules.task_size
            size = STACK_PAGES * PAGE_SIZE
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_GROWSDOWN
            mmap(state, top - size, size, int(operation.protection), flags, None, 0)
            touch(state, top - PAGE_SIZE, write=True)
        else:
            raise ValueError(f"exec: a plan has no operation {call!r}")
    return 0
