"""The words of a lesson's lines, and what an operation answers: shared by operations of Linux and Windows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["NAME", "Result", "Words"]

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(0x[0-9a-fA-F]+|[0-9]+)([KMGT]?)")
_PLACE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:([+-])(.+))?")
_LONGEST = 20
_WORD = (1 << 64) - 1


class Result(NamedTuple):
    """What an operation did.

    Attributes:
        notes: A line each.
        marks: Ranges (start, exclusive end) that it concerned.
        failure: The name of the error; empty if there was none.
        faults: Names of the kinds of faults of a touch.
    """

    notes: list[str]
    marks: list[tuple[int, int]]
    failure: str = ""
    faults: frozenset[str] = frozenset()


class Words:
    """The words of one line, taken from the front.

    Args:
        words: All of them.
        names: Addresses that have names.
    """

    def __init__(self, words: Iterable[str], names: dict[str, int]) -> None:
        self._words = list(words)
        self._names = names

    def next(self, what: str) -> str:
        """Take a word; ValueError says what is missing."""
        if not self._words:
            raise ValueError(f"{what} is missing")
        return self._words.pop(0)

    def rest(self) -> Iterator[str]:
        """Take what is left, one by one."""
        while self._words:
            yield self._words.pop(0)

    def end(self) -> None:
        """ValueError if anything is left."""
        if self._words:
            raise ValueError(f"{' '.join(self._words)!r} is too much")

    def number(self, what: str) -> int:
        """Take a number: ``4096``, ``0x1000``, ``4K``."""
        return number(self.next(what))

    def address(self) -> int:
        """Take a number, a name, or a name and a distance: ``buffer+4K``."""
        word = self.next("an address")
        found = _PLACE.fullmatch(word)
        if found is None:
            return number(word)
        name, sign, distance = found.groups()
        value = self._names[name]
        if sign:
            value += (1 if sign == "+" else -1) * number(distance)
        if not 0 <= value <= _WORD:
            raise ValueError(f"{word!r} is no address of 64 bits")
        return value

    def range(self) -> tuple[int, int]:
        """Take an address and a length."""
        return self.address(), self.number("a length")

    def name(self) -> str:
        """Take a name that an address may have."""
        name = self.next("a name")
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name")
        return name


def number(word: str) -> int:
    """Read a number of at most 64 bits."""
    found = _SIZE.fullmatch(word)
    if found is None or len(word) > _LONGEST:
        raise ValueError(f"{word!r} is no number (4096, 0x1000, 4K)")
    value = int(found[1], 0) * _UNITS[found[2]]
    if value > _WORD:
        raise ValueError(f"{word!r} has more than 64 bits")
    return value
