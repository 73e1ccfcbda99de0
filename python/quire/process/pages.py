"""Page by page: what ``/proc/PID/pagemap`` tells of a range of addresses.

Only pages that are there, in memory or swapped out, are listed: a reservation of terabytes costs nothing.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quire._native import PAGE_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quire.process.procfs import Folder

__all__ = ["Pages", "read_pages"]

_PRESENT = np.uint64(1 << 63)
_SWAPPED = np.uint64(1 << 62)
_FILE = np.uint64(1 << 61)
_GUARD = np.uint64(1 << 58)
_EXCLUSIVE = np.uint64(1 << 56)
_SOFT_DIRTY = np.uint64(1 << 55)
_FRAME = np.uint64((1 << 55) - 1)
_SWAP_TYPE = np.uint64(0x1F)

_SCAN_PRESENT, _SCAN_SWAPPED, _SCAN_ZERO, _SCAN_HUGE = 1 << 3, 1 << 4, 1 << 5, 1 << 6
_SCAN_SIZE = 96
_PAGEMAP_SCAN = 3 << 30 | _SCAN_SIZE << 16 | ord("f") << 8 | 16
"""``_IOWR('f', 16, struct pm_scan_arg)``"""
_RUNS = 4096
_CHUNK_PAGES = 1 << 17


class Pages(NamedTuple):
    """The pages of a range that are in memory or swapped out, ascending.

    Attributes:
        start: Address of the range's first page.
        end: Address after its last page.
        numbers: For each page that is there, its number in the range, from 0.
        words: For each, what ``pagemap`` tells, as it is.
        huge: For each, whether a huge page holds it; None where this kernel does not tell (before 6.7).
        zero: For each, whether it is the page of zeros that all share; None as above.
        has_frames: Whether the kernel told numbers of frames, which takes CAP_SYS_ADMIN.
    """

    start: int
    end: int
    numbers: NDArray[np.int64]
    words: NDArray[np.uint64]
    huge: NDArray[np.bool_] | None
    zero: NDArray[np.bool_] | None
    has_frames: bool

    @property
    def total(self) -> int:
        """Pages of the range, those that are not there too."""
        return (self.end - self.start) // PAGE_SIZE

    @property
    def present(self) -> NDArray[np.bool_]:
        """For each page that is there, whether it is in memory and in the process's page table."""
        return _has(self.words, _PRESENT)

    @property
    def swapped(self) -> NDArray[np.bool_]:
        """For each, whether it is swapped out (or on its way to another place in memory)."""
        return _has(self.words, _SWAPPED)

    @property
    def file(self) -> NDArray[np.bool_]:
        """For each, whether it belongs to a file or to shared memory; not if it was copied on a write."""
        return _has(self.words, _FILE)

    @property
    def exclusive(self) -> NDArray[np.bool_]:
        """For each, whether no other page table has it; before Linux 4.2 always false."""
        return _has(self.words, _EXCLUSIVE)

    @property
    def soft_dirty(self) -> NDArray[np.bool_]:
        """For each, whether it was written since ``clear_refs``; true in new VMAs, false on some kernels."""
        return _has(self.words, _SOFT_DIRTY)

    @property
    def frames(self) -> NDArray[np.uint64] | None:
        """For each, the number of its frame in memory, 0 if it is in none; None without the permission."""
        if not self.has_frames:
            return None
        return np.where(self.present, self.words & _FRAME, np.uint64(0))

    def spread(self, values: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Put flags of the pages that are there in their places; false for all others of the range.

        Args:
            values: A flag for each page of ``numbers``, such as ``present``.

        Returns:
            A flag for each page of the range: one byte a page, so ask this of no range of terabytes.
        """
        all_pages = np.zeros(self.total, np.bool_)
        all_pages[self.numbers] = values
        return all_pages

    def counts(self, values: NDArray[np.bool_], cells: int) -> NDArray[np.int64]:
        """Count flags in equal parts of the range, for a picture of it, however large it is.

        Args:
            values: A flag for each page of ``numbers``.
            cells: How many parts, at least 1; the part of page ``n`` is ``n * cells // total``.

        Returns:
            A number of pages for each part.
        """
        if cells < 1:
            raise ValueError(f"a range has at least one part, not {cells}")
        chosen = self.numbers[values].astype(np.float64) if self.total > 2**31 else self.numbers[values]
        places = (chosen * cells // max(self.total, 1)).astype(np.int64)
        return np.bincount(np.minimum(places, cells - 1), minlength=cells)


def read_pages(folder: Folder, start: int, end: int) -> Pages:
    """Read what ``pagemap`` tells of a range. Blocks; the kernel's part runs without the GIL.

    Args:
        folder: The process.
        start: The first address, a multiple of the page size.
        end: The address after the last one, likewise.

    Raises:
        ValueError: An address is no multiple of the page size, or ``end`` is before ``start``.
        ProcessLookupError: The process is gone.
        PermissionError: This user may not look at it.
    """
    if start % PAGE_SIZE or end % PAGE_SIZE or not 0 <= start <= end <= 1 << 64:
        raise ValueError(f"{start:#x} to {end:#x} is no range of whole pages")
    with folder.opened("pagemap") as fd:
        runs = _scan(fd, start, end)
        if runs is None:
            numbers, words = _read_all(fd, start, end)
            huge = zero = None
        else:
            numbers, categories = _pages_of(runs, start)
            words = _read_words(fd, runs)
            # A page may have gone since the scan.
            there = _is_there(words)
            numbers, words, categories = numbers[there], words[there], categories[there]
            huge, zero = (categories & _SCAN_HUGE) != 0, (categories & _SCAN_ZERO) != 0
    return Pages(start, end, numbers, words, huge, zero, _may_see_frames(words))


def _has(words: NDArray[np.uint64], bit: np.uint64) -> NDArray[np.bool_]:
    flags: NDArray[np.bool_] = (words & bit) != 0
    return flags


def _is_there(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Leave out markers of userfaultfd, which look like swap entries, and guards."""
    marker = ((words & _SWAPPED) != 0) & ((words & _SWAP_TYPE) == _SWAP_TYPE)
    there: NDArray[np.bool_] = ((words & (_PRESENT | _SWAPPED)) != 0) & ~marker & ((words & _GUARD) == 0)
    return there


def _may_see_frames(words: NDArray[np.uint64]) -> bool:
    """Tell whether frames were told: without the permission the kernel gives 0 for all."""
    present = (words & _PRESENT) != 0
    return bool(((words & _FRAME) != 0)[present].any()) if present.any() else False


def _scan(fd: int, start: int, end: int) -> NDArray[np.uint64] | None:
    """Find pages that are there with PAGEMAP_SCAN.

    Returns:
        Rows of (start address, end address, categories); None if the kernel lacks the call.
    """
    found = [np.empty((0, 3), np.uint64)]
    vector = np.empty((_RUNS, 3), np.uint64)
    wanted = _SCAN_PRESENT | _SCAN_SWAPPED
    returned = wanted | _SCAN_ZERO | _SCAN_HUGE
    while start < end:
        argument = array.array(
            "Q", [_SCAN_SIZE, 0, start, end, 0, vector.ctypes.data, _RUNS, 0, 0, 0, wanted, returned]
        )
        try:
            count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument, True)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return None
            if error.errno == errno.EFAULT:
                # Addresses that no program can have, such as those of vsyscall.
                return found[0]
            raise
        found.append(vector[:count].copy())
        if argument[4] <= start:
            raise OSError(errno.EIO, "ioctl(PAGEMAP_SCAN) makes no progress")
        start = argument[4]
    return np.concatenate(found)


def _pages_of(runs: NDArray[np.uint64], start: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """List the pages of runs: numbers from ``start``, and categories."""
    firsts = ((runs[:, 0] - np.uint64(start)) // np.uint64(PAGE_SIZE)).astype(np.int64)
    lengths = ((runs[:, 1] - runs[:, 0]) // np.uint64(PAGE_SIZE)).astype(np.int64)
    before = np.cumsum(lengths) - lengths
    numbers = np.arange(lengths.sum(), dtype=np.int64) + np.repeat(firsts - before, lengths)
    return numbers, np.repeat(runs[:, 2], lengths)


def _read_words(fd: int, runs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Read ``pagemap`` of the pages of runs; runs that touch are read at once."""
    lengths = ((runs[:, 1] - runs[:, 0]) // np.uint64(PAGE_SIZE)).astype(np.int64)
    words = np.zeros(lengths.sum(), np.uint64)
    joins = np.flatnonzero(runs[1:, 0] != runs[:-1, 1]) + 1
    at = 0
    for group in np.split(np.arange(len(runs)), joins):
        if len(group):
            count = int(lengths[group].sum())
            _read_at(fd, int(runs[group[0], 0]) // PAGE_SIZE, words[at : at + count])
            at += count
    return words


def _read_all(fd: int, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Read ``pagemap`` of a whole range and keep the pages that are there."""
    numbers, words = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    chunk = np.empty(_CHUNK_PAGES, np.uint64)
    total = (end - start) // PAGE_SIZE
    for first in range(0, total, _CHUNK_PAGES):
        part = chunk[: min(_CHUNK_PAGES, total - first)]
        part[:] = 0
        if not _read_at(fd, start // PAGE_SIZE + first, part):
            break
        places = np.flatnonzero(_is_there(part))
        numbers.append(places + first)
        words.append(part[places])
    return np.concatenate(numbers), np.concatenate(words)


def _read_at(fd: int, page: int, words: NDArray[np.uint64]) -> bool:
    """Fill words from ``pagemap``; the rest stays where it ends, as it does behind the last address."""
    view = words.view(np.uint8).data
    at = 0
    while at < len(view):
        count = os.preadv(fd, [view[at:]], page * 8 + at)
        if count == 0:
            return at > 0
        at += count
    return True
