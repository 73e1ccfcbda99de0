"""Rules that differ between kernels, machines and settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quire._native import PAGE_SIZE

Overcommit = Literal["heuristic", "always", "never"]


@dataclass(frozen=True)
class Rules:
    """What a kernel does where kernels differ. Without arguments: Linux 6.18 on x86-64 with 47-bit addresses.

    `running_rules` finds those of the running kernel by trying.

    Attributes:
        task_size: Address after the last that a process can map.
        mmap_base: Where the search for a free place begins, downward.
        legacy_base: Where it begins, upward, once nothing is free below ``mmap_base``.
        brk_start: Where the heap begins.
        min_address: Lowest address that can be mapped (``vm.mmap_min_addr``).
        stack_guard_gap_pages: Pages kept free below a stack.
        stack_limit_bytes: RLIMIT_STACK; None is no limit.
        max_map_count: ``vm.max_map_count``: VMAs of one process.
        huge_page_bytes: Requests for private anonymous memory of a multiple of this size are aligned to it; 0
            if none.
        align_any_huge: Whether larger requests are aligned too that are no multiple (6.7 to 6.12).
        merge_into_unfaulted: Whether a range with faulted pages merges with a neighbour that has none (6.16).
        move_many: Whether ``mremap`` moves a range of several VMAs and holes (6.17).
        check_before_unmap: Whether ``mremap`` checks the source before it unmaps the target (6.17).
        dontunmap_drops_account: Whether MREMAP_DONTUNMAP forgets that the old VMA is charged (before a fix
            that reached 6.18).
        shrinking_move_charges: Whether a move that also shrinks charges what it cuts off, for good.
        uncharge_unfaulted: Whether ``mprotect`` gives back the charge of memory that becomes read-only before
            its first fault (6.2).
        guard_any: Whether MADV_GUARD_INSTALL takes files and read-only memory (6.15).
        guard_flag: Whether a VMA that had a guard is flagged, which makes a fork copy its entries (6.19, and
            later releases of 6.18).
        execute_only: Whether memory that is only executable cannot be read.
        fault_around_pages: Pages of a file that one read fault maps, if they are in the page cache.
        overcommit: ``vm.overcommit_memory``: 0 is ``heuristic``, 1 ``always``, 2 ``never``.
        memory_pages: Pages of memory and swap, which bound one request with ``heuristic``.
        commit_limit_pages: What all may be charged together with ``never``.
    """

    task_size: int = 0x7FFF_FFFF_F000
    mmap_base: int = 0x7FFF_F7FF_F000
    legacy_base: int = 0x2AAA_AAAA_A000
    brk_start: int = 0x5555_5555_9000
    min_address: int = 0x10000
    stack_guard_gap_pages: int = 256
    stack_limit_bytes: int | None = 8 << 20
    max_map_count: int = 65530
    huge_page_bytes: int = 2 << 20
    align_any_huge: bool = False
    merge_into_unfaulted: bool = True
    move_many: bool = True
    check_before_unmap: bool = True
    dontunmap_drops_account: bool = False
    shrinking_move_charges: bool = True
    uncharge_unfaulted: bool = True
    guard_any: bool = True
    guard_flag: bool = True
    execute_only: bool = False
    fault_around_pages: int = 16
    overcommit: Overcommit = "heuristic"
    memory_pages: int = (16 << 30) // PAGE_SIZE
    commit_limit_pages: int = (8 << 30) // PAGE_SIZE
