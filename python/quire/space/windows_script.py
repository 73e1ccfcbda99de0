"""Operations of lessons on a process of Windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.space import windows
from quire.space.language import Result, Words, number
from quire.space.picture import PROTECTION_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.space.windows import WindowsSpace

__all__ = ["FAULTS", "OPERATIONS", "run"]

OPERATIONS = ("virtual_alloc", "virtual_free", "virtual_protect", "touch")
FAULTS = {
    0: "no-fault",
    windows.STATUS_ACCESS_VIOLATION: "access-violation",
    windows.STATUS_GUARD_PAGE_VIOLATION: "guard-page",
}
"""What a touch ends in, by its status."""

_TYPES = {
    "reserve": windows.MEM_RESERVE,
    "commit": windows.MEM_COMMIT,
    "reserve+commit": windows.MEM_RESERVE | windows.MEM_COMMIT,
}
_FREE_TYPES = {"decommit": windows.MEM_DECOMMIT, "release": windows.MEM_RELEASE}
_PROTECTIONS = {"none": windows.PAGE_NOACCESS} | {
    name.replace("-", ""): value for value, name in PROTECTION_NAMES.items() if name != "---"
}
_TOLD = {
    0: "the page is committed and may be used so",
    windows.STATUS_ACCESS_VIOLATION: "STATUS_ACCESS_VIOLATION: the page is not committed, or not for that",
    windows.STATUS_GUARD_PAGE_VIOLATION: "STATUS_GUARD_PAGE_VIOLATION, once: the guard is gone",
}


def run(verb: str, space: WindowsSpace, words: Words, name: Callable[[str, int, int], None]) -> Result:
    """Do one of `OPERATIONS`.

    Args:
        verb: Which.
        space: On which process.
        words: What comes after it in the line.
        name: Lets a name stand for an address and a length.

    Raises:
        ValueError: The line is not of the language. What Windows refuses is a result.
    """
    work = {"virtual_alloc": _alloc, "virtual_free": _free, "virtual_protect": _protect, "touch": _touch}
    try:
        return work[verb](space, words, name)
    except windows.Win32Error as error:
        return Result([str(error)], [], error.name)


def _alloc(space: WindowsSpace, words: Words, name: Callable[[str, int, int], None]) -> Result:
    length = words.number("a length")
    kind = _one_of(_TYPES, words.next("reserve, commit or reserve+commit"))
    protect = _protection(words)
    address, called, flags = 0, "", 0
    for word in words.rest():
        if word == "at":
            address = words.address()
        elif word == "name":
            called = words.name()
        elif word == "topdown":
            flags = windows.MEM_TOP_DOWN
        else:
            raise ValueError(f"{word!r} says nothing to virtual_alloc")
    first = space.virtual_alloc(address, length, kind | flags, protect)
    if called:
        name(called, first, length)
    return Result([f"= {first:#x}"], [_pages(max(first, address), length)])


def _free(space: WindowsSpace, words: Words, _name: Callable[[str, int, int], None]) -> Result:
    address = words.address()
    given = list(words.rest())
    length = number(given.pop(0)) if len(given) > 1 else 0
    if len(given) != 1:
        raise ValueError("decommit or release is missing, or something is too much")
    space.virtual_free(address, length, _one_of(_FREE_TYPES, given[0]))
    return Result(["done"], [_pages(address, length)] if length else [])


def _protect(space: WindowsSpace, words: Words, _name: Callable[[str, int, int], None]) -> Result:
    address, length = words.range()
    protect = _protection(words)
    words.end()
    old = space.virtual_protect(address, length, protect)
    guarded = " and a guard" if old & windows.PAGE_GUARD else ""
    return Result(
        [f"it was {PROTECTION_NAMES[old & ~windows.PAGE_GUARD]}{guarded}"], [_pages(address, length)]
    )


def _touch(space: WindowsSpace, words: Words, _name: Callable[[str, int, int], None]) -> Result:
    address = words.address()
    how = words.next("read or write")
    words.end()
    status = space.touch(address, _one_of({"read": 0, "write": 1}, how) == 1)
    failure = "" if status == 0 else FAULTS[status]
    return Result([_TOLD[status]], [_pages(address, 1)], failure, frozenset([FAULTS[status]]))


def _pages(address: int, length: int) -> tuple[int, int]:
    first = address & -windows.PAGE_BYTES
    return first, (address + length + windows.PAGE_BYTES - 1) & -windows.PAGE_BYTES


def _protection(words: Words) -> int:
    """Take ``r``, ``rw``, ``x``, ``rx``, ``rwx`` or ``none``, with ``+guard`` if wanted."""
    word = words.next("a protection")
    guard = windows.PAGE_GUARD if word.endswith("+guard") else 0
    return _one_of(_PROTECTIONS, word.removesuffix("+guard")) | guard


def _one_of(values: dict[str, int], word: str) -> int:
    if word not in values:
        raise ValueError(f"{word!r} is none of {', '.join(values)}")
    return values[word]
