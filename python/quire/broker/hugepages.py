"""Huge pages in memory files, and page tables that are filled without a fault.

A gigabyte in pages of 4 KiB has 262,144 page table entries in each process that maps it; in huge pages of
2 MiB it has 512. The kernel makes huge pages of a memory file when it is asked to (``MADV_COLLAPSE``), also
where its settings say that memory files get none (``never``). Everything here is for speed: where the kernel
cannot do it, or has no 2 MiB in one piece, pages stay small and the rest works as it does with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import time
from pathlib import Path

from quire import _native

__all__ = ["HUGE_BYTES", "advise", "collapse", "fill_page_table"]

PAGE = _native.PAGE_SIZE
# Entries of a page table, each 8 bytes.
_ENTRIES = PAGE // 8
# Each call waits until every processor has answered.
_STEP_BYTES = 32 << 20
_MADV_POPULATE_READ = 22
_MADV_COLLAPSE = 25
_MADV_GUARD_INSTALL = 102
_MADV_GUARD_REMOVE = 103

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _huge_bytes() -> int:
    """Size of the huge pages that the kernel makes of small ones; where it makes none, 0."""
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except OSError:
        # It has none, or this process does not see /sys: pages stay small.
        return 0


HUGE_BYTES = _huge_bytes()


def advise(address: int, length: int, advice: int) -> None:
    """Call ``madvise``.

    Raises:
        OSError: The kernel refused.
    """
    if _libc.madvise(address, length, advice):
        number = ctypes.get_errno()
        raise OSError(number, f"madvise: {os.strerror(number)}")


def _whole(address: int, length: int) -> tuple[int, int]:
    """First address and length of the huge pages that lie within a range."""
    if not HUGE_BYTES:
        return address, 0
    first = -(-address // HUGE_BYTES) * HUGE_BYTES
    last = (address + length) // HUGE_BYTES * HUGE_BYTES
    return first, max(0, last - first)


def collapse(address: int, length: int, patience_ms: float) -> bool:
    """Make huge pages of what a mapping of a memory file shows, and enter them in its page table; blocks.

    Every whole huge page within the range must have one page in the file at least; holes become zeros. Those
    that are huge already are entered only. Of others the entries in every other mapping are dropped.

    Args:
        address: Where it is mapped; nothing is done unless that and the offset in the file are aligned alike.
        length: In bytes.
        patience_ms: After so much processor time it goes no further, in milliseconds: where the kernel has to
            make room in one piece by moving pages, a huge page can take a hundred times as long.

    Returns:
        Whether all that lies within the range are huge pages now.
    """
    first, huge = _whole(address, length)
    end = time.thread_time() + patience_ms / 1000
    step = max(_STEP_BYTES, HUGE_BYTES)
    for done in range(0, huge, step):
        if time.thread_time() > end or not _collapse(first + done, min(step, huge - done)):
            return False
    return huge > 0


def _collapse(first: int, length: int) -> bool:
    try:
        advise(first, length, _MADV_COLLAPSE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EBUSY):
            raise
        return False
    return True


def fill_page_table(address: int, length: int, huge: bool) -> None:
    """Enter every page of a new mapping of a memory file in the page table, so that no touch is a fault.

    Args:
        address: Where it is mapped; page aligned, as the length. Nobody touches it yet.
        length: In bytes.
        huge: The file consists of huge pages. They are entered without a fault where the kernel can; each
            that is not is one, as are 16 small pages.

    Raises:
        OSError: The kernel refused, EFAULT if the file has become shorter.
    """
    first, inside = _whole(address, length)
    if huge and inside:
        # The kernel enters a huge page where there is a table to enter it in. Guards are entered in tables
        # too, and their tables stay when they go.
        table = HUGE_BYTES * _ENTRIES
        with contextlib.suppress(OSError):  # Before 6.15: then they are faults.
            for at in (first, *range(-(-first // table) * table, first + inside, table)):
                advise(at, PAGE, _MADV_GUARD_INSTALL)
                advise(at, PAGE, _MADV_GUARD_REMOVE)
            _collapse(first, inside)
    try:
        advise(address, length, _MADV_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Before 5.14.
        for at in range(address, address + length, mmap.PAGESIZE):
            ctypes.string_at(at, 1)
