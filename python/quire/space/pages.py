"""Page tables and the frames they point to.

A table is a dictionary of nodes of as many entries as one page of a real page table has, so that an empty
gigabyte costs nothing and the cost of the real table can be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.space.constants import ENTRIES, PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.space.vma import File

NODE_SHIFT = PAGE_SHIFT + ENTRIES.bit_length() - 1
LEVELS = 4
_INDEX = ENTRIES - 1


class Frame:
    """One page of memory.

    Attributes:
        mapped: How many page table entries of all spaces point to it.
        file: Whose page it is, or None for anonymous memory.
        number: A number of its own; its page number in the file if it has one.
        lazily_free: Whether MADV_FREE lets the kernel take it until it is written again.
    """

    __slots__ = ("file", "lazily_free", "mapped", "number")

    def __init__(self, file: File | None, number: int) -> None:
        self.file = file
        self.number = number
        self.mapped = 0
        self.lazily_free = False

    def __repr__(self) -> str:
        return f"<Frame {self.number} of {self.file.name if self.file is not None else 'anonymous memory'}>"


ZERO = Frame(None, 0)
"""The page of zeros, which every read of untouched private memory shows."""
GUARD = Frame(None, -1)
"""Not a page: the marker of MADV_GUARD_INSTALL."""


class PageTable:
    """Which frame is at each page of one space, and whether it can be written without a fault.

    Entries are frames for what is write-protected; those that can be written are in ``writable`` too.
    """

    __slots__ = ("nodes", "writable")

    def __init__(self) -> None:
        self.nodes: dict[int, dict[int, Frame]] = {}
        self.writable: set[int] = set()

    def get(self, page: int) -> Frame | None:
        """Return what a page number maps to, or None."""
        node = self.nodes.get(page // ENTRIES)
        return None if node is None else node.get(page & _INDEX)

    def set(self, page: int, frame: Frame, *, writable: bool) -> None:
        """Let a page map to a frame, in place of what it mapped to."""
        node = self.nodes.setdefault(page // ENTRIES, {})
        old = node.get(page & _INDEX)
        if old is not None:
            old.mapped -= 1
        node[page & _INDEX] = frame
        frame.mapped += 1
        if writable:
            self.writable.add(page)
        elif old is not None:
            self.writable.discard(page)

    def range(self, first: int, last: int) -> Iterator[tuple[int, Frame]]:
        """Yield page numbers in ``[first, last)`` that map to something, in order, with their frames."""
        for number in self._node_numbers(first, last):
            node = self.nodes[number]
            base = number * ENTRIES
            for index in sorted(node):
                if first <= base + index < last:
                    yield base + index, node[index]

    def zap(self, first: int, last: int, *, guards: bool = True) -> int:
        """Drop the entries of ``[first, last)``; return how many pages were dropped.

        Args:
            first: First page number.
            last: Page number after the last.
            guards: Whether markers of guard pages go too.
        """
        if not self.nodes:
            return 0
        dropped = 0
        writable = self.writable
        for number in self._node_numbers(first, last):
            node = self.nodes[number]
            base = number * ENTRIES
            if last - first < len(node):
                found = [
                    page - base
                    for page in range(max(first, base), min(last, base + ENTRIES))
                    if page - base in node
                ]
            else:
                found = [index for index in node if first <= base + index < last]
            for index in found:
                frame = node[index]
                if frame is GUARD:
                    if not guards:
                        continue
                else:
                    dropped += 1
                del node[index]
                frame.mapped -= 1
                writable.discard(base + index)
            if not node:
                del self.nodes[number]
        return dropped

    def move(self, first: int, last: int, to: int) -> None:
        """Move the entries of ``[first, last)`` to pages from ``to`` on, which must have none."""
        entries = [(page, frame, page in self.writable) for page, frame in self.range(first, last)]
        if not entries:
            return
        for page, frame, writable in entries:
            self.set(page - first + to, frame, writable=writable)
        self.zap(first, last)

    def protect(self, first: int, last: int) -> None:
        """Take the permission to write from the entries of ``[first, last)``."""
        if self.writable and self.nodes:
            if last - first < len(self.writable):
                self.writable.difference_update(range(first, last))
            else:
                self.writable = {page for page in self.writable if not first <= page < last}

    def table_pages(self) -> int:
        """Return how many pages the entries take as a table of four levels, its root included."""
        numbers = set(self.nodes)
        total = len(numbers)
        for _ in range(LEVELS - 1):
            numbers = {number // ENTRIES for number in numbers} or {0}
            total += len(numbers)
        return total

    def _node_numbers(self, first: int, last: int) -> list[int]:
        low, high = first // ENTRIES, (last - 1) // ENTRIES
        if high - low < len(self.nodes):
            return [number for number in range(low, high + 1) if number in self.nodes]
        return sorted(number for number in self.nodes if low <= number <= high)
