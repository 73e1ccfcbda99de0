"""``diff`` and ``watch``: how the address space of a process changes."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, NamedTuple

from quire.matching import pair_up
from quire.process.reading import maps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.process.reading import Detail, Maps
    from quire.process.vma import VMA

__all__ = ["Change", "Difference", "diff", "watch"]


class Change(NamedTuple):
    """A VMA that was there before and is there still, but not the same.

    Attributes:
        before: As it was.
        after: As it is.
    """

    before: VMA
    after: VMA

    @property
    def grown(self) -> int:
        """Bytes of addresses more than before; negative if it shrank."""
        return self.after.size - self.before.size

    @property
    def has_new_protection(self) -> bool:
        """Whether something else may be done with it now."""
        return self.after.protection != self.before.protection

    @property
    def resident(self) -> int | None:
        """Bytes in memory more than before; None where ``smaps`` was not read."""
        if self.after.resident is None or self.before.resident is None:
            return None
        return self.after.resident - self.before.resident


class Difference(NamedTuple):
    """The answer of `diff`; each VMA is in at most one of the lists.

    Attributes:
        added: New ones.
        removed: Those that are gone.
        changed: Those that grew, shrank, got another protection, or have other figures.
        virtual: Bytes of addresses more than before.
        resident: Bytes in memory more than before; None where ``smaps`` was not read.
        is_other_process: The two are not of one process, so that equal addresses mean nothing.
    """

    added: tuple[VMA, ...]
    removed: tuple[VMA, ...]
    changed: tuple[Change, ...]
    virtual: int
    resident: int | None
    is_other_process: bool


def diff(before: Maps, after: Maps) -> Difference:
    """Compare two readings.

    A VMA is the same if it maps the same thing (file and place in it, or name) and its range overlaps that
    of before. Where one was split, the first part that overlaps is the same one and the others are new;
    where several were merged, the others are gone.

    Args:
        before: The earlier reading.
        after: The later one.
    """
    pairs, removed = pair_up(before, after, _is_same)
    added = [new for old, new in pairs if old is None]
    changed = [Change(old, new) for old, new in pairs if old is not None and _differ(old, new)]
    told = before.detail == after.detail == "smaps"
    return Difference(
        tuple(added),
        tuple(removed),
        tuple(changed),
        sum(vma.size for vma in after) - sum(vma.size for vma in before),
        sum(vma.resident or 0 for vma in after) - sum(vma.resident or 0 for vma in before) if told else None,
        (before.pid, before.process.start_ticks) != (after.pid, after.process.start_ticks),
    )


def _differ(old: VMA, new: VMA) -> bool:
    return old[:3] != new[:3] or old.figures != new.figures or old.texts != new.texts


def _is_same(old: VMA, new: VMA) -> bool:
    """Tell whether two overlapping VMAs map the same thing at the same place."""
    if (old.major, old.minor, old.inode, old.name) != (new.major, new.minor, new.inode, new.name):
        return False
    return not old.inode or old.start - old.offset == new.start - new.offset


def watch(
    pid: int, interval_s: float, *, detail: Detail = "smaps", samples: int | None = None
) -> Iterator[Maps]:
    """Read a process again and again until it ends.

    Readings begin at multiples of the interval after the first, so that they do not drift; those that a slow
    reader misses are left out. Between them it blocks, without the GIL, and wakes up when the process ends.

    Args:
        pid: The process.
        interval_s: Seconds from the beginning of one reading to that of the next; 0 reads without a pause.
        detail: As for ``maps``.
        samples: How many readings at most; None goes on until the process ends.

    Yields:
        Readings of one process: should its number be used again, that one is not read.

    Raises:
        ProcessLookupError: There is no such process; at the first reading only.
        PermissionError: This user may not look at it.
        ValueError: The interval is negative or no number.
    """
    if not interval_s >= 0:
        raise ValueError(f"an interval is no less than 0 seconds, not {interval_s}")
    return _watch(pid, interval_s, detail, samples)


def _pause_s(began: float, interval_s: float, now: float) -> float:
    """Seconds from now to the next multiple of the interval after the beginning."""
    if not interval_s:
        return 0.0
    passed = int((now - began) / interval_s) + 1
    return max(began + passed * interval_s - now, 0.0)


def _watch(pid: int, interval_s: float, detail: Detail, samples: int | None) -> Iterator[Maps]:
    first = maps(pid, detail=detail)
    handle = os.pidfd_open(first.pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        began = first.process.monotonic
        latest = first
        taken = 0
        while samples is None or taken < samples:
            # A process whose memory is gone may wait for its parent to notice: it has ended.
            if latest.process.start_ticks != first.process.start_ticks or (taken and not latest):
                return
            yield latest
            taken += 1
            if taken == samples:
                return
            if poll.poll(_pause_s(began, interval_s, time.monotonic()) * 1000):
                return
            try:
                latest = maps(pid, detail=detail)
            except ProcessLookupError:
                return
    finally:
        os.close(handle)
