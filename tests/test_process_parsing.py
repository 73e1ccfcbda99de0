"""From text to VMAs: what the native parser and the rules for kinds do with what no process here shows."""

import os
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.process import Kind
from quire.process.kinds import classify
from quire.process.parsing import Columns, read, without_repeats

MIB = 1 << 20
LINES = [
    b"1000-2000 r-xp 00000000 fe:00 7 /bin/x",
    b"2000-3000 rw-p 00000000 00:00 0 ",
    b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]",
    b"Rss:                 4 kB",
    b"Pss:                 0 kB",
    b"THPeligible:           1",
    b"VmFlags: rd ex mr ",
    b"Brand New: of some kind",
    b"Huge: 99999999999999999 kB",
    b"",
    b"\xff\xfe",
    b"1000-2000 rw",
]
HEADER = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)(?: +(.*))?"
)


def parse(text: bytes, problems: list[str]) -> Columns:
    """Read a text from a file, as it comes from /proc."""
    fd = os.memfd_create("text")
    try:
        os.write(fd, text)
        os.lseek(fd, 0, os.SEEK_SET)
        return read(fd, problems)
    finally:
        os.close(fd)


def simply(lines: list[bytes]) -> list[tuple[int, dict[str, int], int]]:
    """The same by the simplest means: start, figures and number of other lines of each VMA."""
    found: list[tuple[int, dict[str, int], int]] = []
    for line in lines:
        header = HEADER.fullmatch(line)
        name, colon, value = line.partition(b":")
        if header:
            found.append((int(header[1], 16), {}, 0))
        elif colon and found:
            start, figures, others = found[-1]
            text = value.strip(b" ")
            number = re.fullmatch(rb"(\d+)( kB)?", text)
            size = int(number[1]) * (1024 if number[2] else 1) if number else 1 << 64
            if size < 1 << 64:
                figures[name.decode()] = size
            else:
                found[-1] = (start, figures, others + 1)
    return found


@given(st.lists(st.sampled_from(LINES)))
def test_any_lines_in_any_order(lines: list[bytes]) -> None:
    text = b"".join(line + b"\n" for line in lines)
    problems: list[str] = []
    rows = list(zip(*parse(text, problems), strict=True))
    read = [
        (row[0], dict(zip(row[8], struct.unpack(f"={len(row[8])}Q", row[9]), strict=True)), len(row[10]))
        for row in rows
    ]
    assert read == simply(lines)
    # Nothing is dropped: each line is a VMA, a figure, a text, or handed back.
    assert len(lines) == len(rows) + sum(len(row[8]) + len(row[10]) for row in rows) + len(problems)


@given(st.binary())
def test_any_bytes(text: bytes) -> None:
    problems: list[str] = []
    rows = parse(text, problems)
    assert rows.start or problems or not text


def test_what_is_no_open_file() -> None:
    with pytest.raises(ValueError, match="descriptor -1"):
        read(-1, [])
    fd = os.open("/", os.O_RDONLY)
    with pytest.raises(IsADirectoryError, match="read"):
        read(fd, [])
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        read(fd, [])


Row = tuple[object, ...]


def columns(rows: list[Row]) -> Columns:
    return Columns._make(list(column) for column in zip(*rows, strict=True))


def once(rows: list[Row], problems: list[str]) -> list[Row]:
    return list(zip(*without_repeats(columns(rows), problems), strict=True))


def row(start: int, end: int, protection: str = "rw-p", name: bytes = b"", inode: int = 0) -> Row:
    return (start, end, protection, 0, 0, 1, inode, name, (), b"", ())


def test_what_was_read_twice_is_given_once() -> None:
    problems: list[str] = []
    assert once([row(0, 2), row(2, 3), row(5, 9)], problems) == [row(0, 2), row(2, 3), row(5, 9)]
    assert problems == []
    # It grew after it had been read.
    assert once([row(0, 2), row(2, 3), row(2, 6), row(7, 8)], problems) == [
        row(0, 2),
        row(2, 6),
        row(7, 8),
    ]
    assert len(problems) == 1
    # It was merged with those before.
    assert once([row(1, 2), row(2, 3), row(0, 6)], []) == [row(0, 6)]
    # Something new lies over its end.
    assert once([row(0, 4), row(3, 6)], []) == [row(0, 3), row(3, 6)]


def test_kinds_that_are_rare() -> None:
    arena = 64 * MIB
    cases = [
        (row(0x1000, 0x2000, "r--p", b"/lib/x.so", 7), Kind.IMAGE),
        (row(0x2000, 0x3000, "r-xp", b"/lib/x.so", 7), Kind.IMAGE),
        (row(0x3000, 0x4000, "r-xp", b"/memfd:jit (deleted)", 8), Kind.SHAREABLE),
        (row(0x4000, 0x5000, "rw-s", b"/SYSV00000000 (deleted)", 9), Kind.SHAREABLE),
        (row(0x5000, 0x6000, "rw-s", b"anon_inode:[io_uring]", 10), Kind.SHAREABLE),
        (row(0x6000, 0x7000, "rw-p", b"[anon:scudo:primary]"), Kind.PRIVATE),
        (row(0x7000, 0x8000, "rw-p", b"[anon: glibc: malloc]"), Kind.HEAP),
        (row(0x8000, 0x9000, "r--p", b"[vvar]"), Kind.KERNEL),
        (row(0x9000, 0xA000, "r-xp", b"/memfd:quire:x.so (deleted)", 11), Kind.IMAGE),
        (row(0xA000, 0xB000, "r--p", b"/memfd:quire:x.so (deleted)", 11), Kind.IMAGE),
        (row(0xB000, 0xC000, "rw-s", b"/memfd:quire:data (deleted)", 12), Kind.QUIRE),
        (row(arena, arena + 0x21000), Kind.HEAP),
        (row(arena + 0x21000, 2 * arena, "---p"), Kind.RESERVED),
        (row(3 * arena, 4 * arena), Kind.HEAP),
        (row(5 * arena, 5 * arena + MIB), Kind.PRIVATE),
        (row(6 * arena + MIB, 6 * arena + MIB + 0x1000, "---p"), Kind.RESERVED),
        (row(6 * arena + MIB + 0x1000, 6 * arena + 9 * MIB), Kind.STACK),
        (row(7 * arena + MIB, 7 * arena + 2 * MIB), Kind.STACK),
    ]
    rows = [each for each, _ in cases]
    expected = [kind for _, kind in cases]
    assert classify(columns(rows), [7 * arena + MIB + 5], threads=2) == expected
    # With one thread a guard page proves nothing.
    alone = classify(columns(rows), [], threads=1)
    assert alone[-2:] == [Kind.PRIVATE, Kind.PRIVATE]
