r"""From the text of ``/proc/PID/maps`` and ``smaps`` to numbers.

A line that begins with a small hexadecimal digit starts a VMA, one that begins with a capital letter tells
something of it. A name cannot break this: the kernel writes a newline in it as ``\012``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["NO_DETAILS", "Details", "Header", "parse_header", "parse_maps", "parse_smaps"]

_HEADER = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)(?: +(.*))?"
)
_HEADER_STARTS = frozenset(b"0123456789abcdef")
_SIZE = re.compile(rb" *(\d+) kB *\Z")
_NUMBER = re.compile(rb" *(\d+) *\Z")


class Header(NamedTuple):
    """One line of ``maps``; the name is as the kernel writes it, with newlines escaped."""

    start: int
    end: int
    protection: str
    offset: int
    major: int
    minor: int
    inode: int
    name: bytes


class Details(NamedTuple):
    """What ``smaps`` tells of one VMA.

    Attributes:
        keys: Names of the figures, in the kernel's order; one tuple for all VMAs that have the same.
        figures: The figures, sizes in bytes.
        texts: Lines that are no figures, by their name: ``VmFlags`` and what later kernels may add.
    """

    keys: tuple[str, ...]
    figures: tuple[int, ...]
    texts: tuple[tuple[str, bytes], ...]


NO_DETAILS = Details((), (), ())


def parse_header(line: bytes) -> Header | None:
    """Parse the line that starts a VMA; None if it is not one."""
    match = _HEADER.fullmatch(line)
    if match is None:
        return None
    start, end, protection, offset, major, minor, inode, name = match.groups(b"")
    return Header(
        int(start, 16),
        int(end, 16),
        protection.decode("ascii"),
        int(offset, 16),
        int(major, 16),
        int(minor, 16),
        int(inode),
        name,
    )


def parse_maps(text: bytes, problems: list[str]) -> list[Header]:
    """Parse ``maps``.

    Args:
        text: The whole file.
        problems: What could not be understood is added here, in words.
    """
    headers = []
    for line in text.split(b"\n")[:-1]:
        header = parse_header(line)
        if header is None:
            problems.append(f"a line of maps is none that this version knows: {line[:200]!r}")
        else:
            headers.append(header)
    _complain_of_tail(text, problems)
    return headers


def parse_smaps(text: bytes, problems: list[str]) -> tuple[list[Header], list[Details]]:
    """Parse ``smaps``.

    Args:
        text: The whole file.
        problems: What could not be understood is added here, in words.

    Returns:
        The VMAs, and what is told of each.
    """
    lines = text.split(b"\n")[:-1]
    _complain_of_tail(text, problems)
    return _by_lines(lines, problems)


def _complain_of_tail(text: bytes, problems: list[str]) -> None:
    if text and not text.endswith(b"\n"):
        tail = text[text.rfind(b"\n") + 1 :]
        problems.append(f"the text ends in the middle of a line: {tail[:200]!r}")


def _by_lines(lines: list[bytes], problems: list[str]) -> tuple[list[Header], list[Details]]:
    """Parse line by line, whatever there is."""
    headers: list[Header] = []
    details: list[Details] = []
    figures: dict[str, int] = {}
    texts: list[tuple[str, bytes]] = []
    shapes: dict[tuple[str, ...], tuple[str, ...]] = {}

    def finish() -> None:
        if headers:
            keys = tuple(figures)
            details.append(Details(shapes.setdefault(keys, keys), tuple(figures.values()), tuple(texts)))
        figures.clear()
        texts.clear()

    for line in lines:
        if line and line[0] in _HEADER_STARTS and (header := parse_header(line)):
            finish()
            headers.append(header)
            continue
        name, colon, value = line.partition(b":")
        key = name.decode("ascii", "backslashreplace")
        if not colon or not headers:
            problems.append(f"a line of smaps is none that this version knows: {line[:200]!r}")
        elif key in figures:
            problems.append(f"smaps tells {key} of one VMA twice: {line[:200]!r}")
        elif size := _SIZE.match(value):
            figures[key] = int(size[1]) * 1024
        elif number := _NUMBER.match(value):
            figures[key] = int(number[1])
        else:
            texts.append((key, value.strip()))
    finish()
    return headers, details
