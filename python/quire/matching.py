"""Which ranges of two lists are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["pair_up"]


class _Range(Protocol):
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


T = TypeVar("T", bound=_Range)


def pair_up(
    before: Sequence[T], after: Sequence[T], is_same: Callable[[T, T], bool]
) -> tuple[list[tuple[T | None, T]], list[T]]:
    """Find for each range what it was before: the first it overlaps that is the same and not taken.

    Args:
        before: Half-open ranges in ascending order that do not overlap each other.
        after: The same, later.
        is_same: Asked about two that overlap, the earlier one first.

    Returns:
        Each range of ``after`` in order, with what it was or None; and what is left of ``before``.
    """
    pairs: list[tuple[T | None, T]] = []
    taken: set[int] = set()
    first = 0
    for new in after:
        while first < len(before) and before[first].end <= new.start:
            first += 1
        twin = None
        at = first
        while twin is None and at < len(before) and before[at].start < new.end:
            if at not in taken and is_same(before[at], new):
                twin = before[at]
                taken.add(at)
            at += 1
        pairs.append((twin, new))
    return pairs, [old for at, old in enumerate(before) if at not in taken]
