"""Byte ranges that differ between two snapshots."""

# numpy is imported when an array is first asked for.
# ruff: noqa: PLC0415

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from quire._native import PAGE_SIZE

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Ranges"]

_SHOWN = 4


class Ranges(Sequence[tuple[int, int]]):
    """An immutable sequence of half-open byte ranges ``(start, stop)``.

    Those that ``Snapshot.diff`` returns are page aligned, ascending, disjoint and merged. They are kept in 16
    bytes each, and made into tuples when asked for. Equal to any list, tuple or Ranges of equal pairs.
    """

    __slots__ = ("_flat",)

    _flat: memoryview[int]

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        """Take pairs in the order given.

        Args:
            pairs: Ranges in bytes; the start is inclusive, the stop is not, and lies after it.

        Raises:
            ValueError: A pair is not 0 <= start < stop.
            OverflowError: A number does not fit in 64 bits.
        """
        flat = array("Q")
        for start, stop in pairs:
            if not 0 <= start < stop:
                raise ValueError(f"({start}, {stop}) is not a range of bytes")
            flat.append(start)
            flat.append(stop)
        self._flat = memoryview(flat).toreadonly()

    @classmethod
    def _from_native(cls, packed: bytes) -> Ranges:
        """Wrap the bytes that the native ``diff`` returns: native-endian u64 starts and stops in turn."""
        ranges = cls.__new__(cls)
        ranges._flat = memoryview(packed).cast("Q")
        return ranges

    @property
    def total_bytes(self) -> int:
        """Sum of the lengths, in bytes."""
        return sum(self._flat[1::2]) - sum(self._flat[::2])

    @property
    def total_pages(self) -> int:
        """Sum of the lengths, in pages; a part of a page counts as one."""
        return -(-self.total_bytes // PAGE_SIZE)

    def array(self) -> npt.NDArray[Any]:
        """Return a read-only numpy view of shape ``(n, 2)`` and dtype ``uint64``: starts and stops."""
        import numpy as np

        return np.frombuffer(self._flat, np.uint64, len(self._flat)).reshape(-1, 2)

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self._flat) // 2

    @overload
    def __getitem__(self, key: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, key: slice) -> Ranges: ...
    def __getitem__(self, key: int | slice) -> tuple[int, int] | Ranges:
        """Return one pair, or the Ranges of a slice.

        Raises:
            IndexError: There is no such pair.
        """
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                return Ranges(self[place] for place in range(start, stop, step))
            part = Ranges.__new__(Ranges)
            part._flat = self._flat[2 * start : 2 * max(start, stop)]
            return part
        place = range(len(self))[key]
        return self._flat[2 * place], self._flat[2 * place + 1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the pairs in order."""
        numbers = iter(self._flat)
        return zip(numbers, numbers, strict=True)

    def __eq__(self, other: object) -> bool:
        """Compare with another sequence of pairs."""
        if isinstance(other, Ranges):
            return self._flat == other._flat
        if not isinstance(other, list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(
            isinstance(theirs, list | tuple) and mine == tuple(theirs)
            for mine, theirs in zip(self, other, strict=True)
        )

    def __hash__(self) -> int:
        """Hash as the tuple of pairs does, because they are equal."""
        return hash(tuple(self))

    def __reduce__(self) -> tuple[type[Ranges], tuple[tuple[tuple[int, int], ...]]]:
        """Pickle as pairs, which no byte order can garble."""
        return Ranges, (tuple(self),)

    def __repr__(self) -> str:
        """Show the first few pairs, and how much there is in all."""
        shown = ", ".join(str(pair) for pair in self[:_SHOWN])
        if len(self) <= _SHOWN:
            return f"Ranges([{shown}])"
        return f"<Ranges [{shown}, ...] {len(self)} ranges, {self.total_bytes} bytes>"
