"""The VMAs of one space in order of their addresses: found in O(log n), with the highest gap of a size.

Two levels: chunks of up to ``2 * CHUNK`` VMAs, each a list of starts beside a list of VMAs, so that a look-up
is two bisections of integers and an insertion moves a few hundred pointers. Each chunk knows the largest gap
between two of its VMAs, so that a search for a gap passes over whole chunks; the knowledge is made anew only
when it is asked for.

Invariants: no chunk is empty; ``_first[i] == _starts[i][0]``; VMAs do not overlap; ``_gaps[i]`` is -1
(unknown) or at least as large as each gap between two VMAs of chunk i.
"""

from bisect import bisect_right
from collections.abc import Iterator

from quire.space.vma import VMA

CHUNK = 192


class VMATree:
    """An ordered set of VMAs that do not overlap."""

    __slots__ = ("_first", "_gaps", "_last", "_starts", "_vmas", "count")

    def __init__(self) -> None:
        self.count = 0
        self._first: list[int] = []
        self._starts: list[list[int]] = []
        self._vmas: list[list[VMA]] = []
        self._gaps: list[int] = []
        self._last: VMA | None = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[VMA]:
        for chunk in self._vmas:
            yield from chunk

    def at(self, address: int) -> VMA | None:
        """Return the VMA that holds the address, or None."""
        last = self._last
        if last is not None and last.start <= address < last.end:
            return last
        row = bisect_right(self._first, address) - 1
        if row < 0:
            return None
        vma = self._vmas[row][bisect_right(self._starts[row], address) - 1]
        if address < vma.end:
            self._last = vma
            return vma
        return None

    def first_after(self, address: int) -> VMA | None:
        """Return the first VMA that ends after the address: it holds the address or is the next one."""
        last = self._last
        if last is not None and last.start <= address < last.end:
            return last
        row = bisect_right(self._first, address) - 1
        if row < 0:
            return self._vmas[0][0] if self._vmas else None
        chunk = self._vmas[row]
        column = bisect_right(self._starts[row], address) - 1
        if chunk[column].end <= address:
            column += 1
            if column == len(chunk):
                row += 1
                return self._vmas[row][0] if row < len(self._vmas) else None
        return chunk[column]

    def before(self, address: int) -> VMA | None:
        """Return the last VMA that starts before the address."""
        row = bisect_right(self._first, address - 1) - 1
        if row < 0:
            return None
        return self._vmas[row][bisect_right(self._starts[row], address - 1) - 1]

    def neighbours(self, start: int, end: int) -> tuple[VMA | None, VMA | None]:
        """Return the last VMA that starts before ``start`` and the first that starts at ``end`` or after it.

        The range must hold no VMA's start but ``start`` itself.
        """
        row = bisect_right(self._first, start - 1) - 1
        if row < 0:
            before = None
            row = column = 0
        else:
            column = bisect_right(self._starts[row], start - 1)
            before = self._vmas[row][column - 1]
        while row < len(self._vmas):
            chunk = self._vmas[row]
            while column < len(chunk):
                if chunk[column].start >= end:
                    return before, chunk[column]
                column += 1
            row += 1
            column = 0
        return before, None

    def overlapping(self, start: int, end: int) -> list[VMA]:
        """Return the VMAs that have an address in the range, in order."""
        row = bisect_right(self._first, start) - 1
        if row < 0:
            row = column = 0
        else:
            column = bisect_right(self._starts[row], start) - 1
            if self._vmas[row][column].end <= start:
                column += 1
        found: list[VMA] = []
        while row < len(self._vmas):
            chunk = self._vmas[row]
            while column < len(chunk):
                vma = chunk[column]
                if vma.start >= end:
                    return found
                found.append(vma)
                column += 1
            row += 1
            column = 0
        return found

    def insert(self, vma: VMA) -> None:
        """Add a VMA; its range must be free."""
        self.count += 1
        start = vma.start
        row = bisect_right(self._first, start) - 1
        if row < 0:
            if not self._first:
                self._first.append(start)
                self._starts.append([start])
                self._vmas.append([vma])
                self._gaps.append(-1)
                return
            row = 0
        starts = self._starts[row]
        column = bisect_right(starts, start)
        starts.insert(column, start)
        self._vmas[row].insert(column, vma)
        if not column:
            self._first[row] = start
        if not column or column + 1 == len(starts):
            # What was outside of the chunk is a gap inside it now.
            self._gaps[row] = -1
        if len(starts) > 2 * CHUNK:
            self._split(row)
        # Otherwise gaps only became smaller, so that what is known remains an upper bound; a search that
        # finds nothing in this chunk makes it exact.

    def remove(self, vma: VMA) -> None:
        """Take a VMA out."""
        self.count -= 1
        if self._last is vma:
            self._last = None
        row, column = self._locate(vma.start)
        starts = self._starts[row]
        self._gaps[row] = -1
        del starts[column]
        del self._vmas[row][column]
        if not starts:
            del self._first[row], self._starts[row], self._vmas[row], self._gaps[row]
        elif not column:
            self._first[row] = starts[0]

    def resize(self, vma: VMA, start: int, end: int) -> None:
        """Change the ends of a VMA; it must keep its place among the others."""
        row, column = self._locate(vma.start)
        if start != vma.start:
            if start > vma.start:
                self._gaps[row] = -1
            self._starts[row][column] = start
            if not column:
                self._first[row] = start
            vma.start = start
        if end < vma.end:
            self._gaps[row] = -1
        vma.end = end

    def gaps_from_top(self, length: int, low: int, high: int) -> Iterator[tuple[int, int, VMA | None]]:
        """Yield gaps in ``[low, high)`` that have the length, highest first, each with the VMA above it.

        Bounds are clipped to the range. The tree must not change meanwhile.
        """
        vmas = self._vmas
        after: VMA | None = None
        top = high
        row = bisect_right(self._first, high - 1) - 1
        if row + 1 < len(vmas):
            after = vmas[row + 1][0]
        while row >= 0:
            chunk = vmas[row]
            # Above the last VMA of the chunk.
            last = (
                bisect_right(self._starts[row], high - 1) - 1
                if self._starts[row][-1] >= high
                else len(chunk) - 1
            )
            if last + 1 < len(chunk):
                after = chunk[last + 1]
            bottom = chunk[last].end
            if top - max(bottom, low) >= length:
                yield max(bottom, low), top, after
            top, after = chunk[last].start, chunk[last]
            known = self._gaps[row]
            if known < 0:
                known = self._gaps[row] = self._largest_gap(row)
            if known >= length:
                found = False
                for column in range(last - 1, -1, -1):
                    bottom = chunk[column].end
                    if top - bottom >= length:
                        found = True
                        if top - max(bottom, low) >= length:
                            yield max(bottom, low), top, chunk[column + 1]
                    top = chunk[column].start
                if not found and last == len(chunk) - 1:
                    self._gaps[row] = self._largest_gap(row)
            top, after = chunk[0].start, chunk[0]
            if top <= low:
                return
            row -= 1
        if top - low >= length:
            yield low, top, after

    def _largest_gap(self, row: int) -> int:
        """Return the largest gap between two VMAs of a chunk."""
        chunk = self._vmas[row]
        if len(chunk) < 2:
            return 0
        ends = [vma.end for vma in chunk]
        return max(map(int.__sub__, self._starts[row][1:], ends))

    def _locate(self, start: int) -> tuple[int, int]:
        row = bisect_right(self._first, start) - 1
        return row, bisect_right(self._starts[row], start) - 1

    def _split(self, row: int) -> None:
        starts, vmas = self._starts[row], self._vmas[row]
        self._starts[row : row + 1] = [starts[:CHUNK], starts[CHUNK:]]
        self._vmas[row : row + 1] = [vmas[:CHUNK], vmas[CHUNK:]]
        self._first.insert(row + 1, starts[CHUNK])
        self._gaps[row : row + 1] = [-1, -1]

    def check(self) -> None:
        """Check the invariants; AssertionError if one does not hold."""
        assert len(self._first) == len(self._starts) == len(self._vmas) == len(self._gaps)
        end = count = 0
        for row, chunk in enumerate(self._vmas):
            assert chunk
            assert self._starts[row] == [vma.start for vma in chunk]
            assert self._first[row] == chunk[0].start
            assert self._gaps[row] < 0 or self._gaps[row] >= self._largest_gap(row)
            for vma in chunk:
                assert end <= vma.start < vma.end, f"{vma} begins before {end:#x}"
                end = vma.end
                count += 1
        assert count == self.count
