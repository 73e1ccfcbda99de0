"""FatELF: ELF files for several machines in one file. ``docs/formats.md`` has the layout."""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.errors import Malformed
from quire.image.content import copy_to_memory, opened, pieces
from quire.image.machines import (
    IDENT_BYTES,
    Ident,
    identify,
    kernel_runs,
    machine_name,
    machine_number,
    native,
)
from quire.output import whole_file
from quire.sources import FileSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from quire.image.content import Content
    from quire.sources import Source

__all__ = [
    "MAGIC",
    "Record",
    "extract",
    "glue",
    "is_fatelf",
    "member",
    "problems",
    "record_for_this_machine",
    "record_to_execute",
    "records",
    "select",
    "split",
]

MAGIC = b"\xfa\x70\x0e\x1f"
"""The first bytes of every FatELF file."""

_VERSION = 1
_HEADER = struct.Struct("<4sHBB")
_RECORD = struct.Struct("<HBBBBHQQ")
_RECORDS_MAX = 255
_ALIGNMENT = 4096
# Kernels for these can have pages of 64 KiB.
_LARGE_PAGES = {"aarch64", "ia64", "loongarch", "mips", "ppc", "ppc64", "sparcv9"}
_BYTE_ORDERS = {0: "big", 1: "little", 2: "big"}
_WORD_BITS = {1: 32, 2: 64}


@dataclass(frozen=True, slots=True)
class Record:
    """One ELF file in a FatELF file."""

    ident: Ident
    """What it is for."""
    offset: int
    """Where it starts, in bytes; a multiple of 4096."""
    size: int
    """Its length in bytes."""

    @property
    def target(self) -> str:
        """What `select` finds it by, if no other record has the same."""
        return self.ident.name

    @property
    def full_target(self) -> str:
        """What `select` finds it by whatever other records there are."""
        it = self.ident
        order = "le" if it.byte_order == "little" else "be"
        return f"{machine_name(it.machine)}:{it.bits}:{order}:osabi{it.osabi}:version{it.osabi_version}"


def is_fatelf(head: bytes) -> bool:
    """Tell by a file's first bytes whether it says that it is a FatELF file."""
    return head[:4] == MAGIC


def records(data: Content) -> tuple[Record, ...]:
    """Read the records of a FatELF file, all of which are checked, with the ELF headers they point to.

    Args:
        data: A path, a source or bytes.

    Returns:
        In the order of the file; at least one.

    Raises:
        Malformed: It is no FatELF file of version 1, or breaks one of its rules.
        OSError: It cannot be opened.
        PageError: Its bytes cannot be had.
    """
    with opened(data) as source:
        return _records(source)


def problems(data: Content) -> list[str]:
    """List every rule of the format that a file breaks; none if it is a good FatELF file.

    Raises:
        OSError: It cannot be opened.
        PageError: Its bytes cannot be had.
    """
    with opened(data) as source:
        return list(_check(source, {}))


def _records(source: Source) -> tuple[Record, ...]:
    found: dict[int, Record] = {}
    for problem in _check(source, found):
        raise Malformed(f"{source.name}: {problem}")
    return tuple(found.values())


def _check(source: Source, found: dict[int, Record]) -> Iterator[str]:
    """Find the records, by number, and yield what is wrong."""
    head = source.read(0, min(_HEADER.size, source.size))
    if not is_fatelf(head):
        yield f"it begins with {head[:4].hex(' ') or 'nothing'}, a FatELF file with {MAGIC.hex(' ')}"
        return
    if len(head) < _HEADER.size:
        yield f"it has {len(head)} bytes, the header {_HEADER.size}"
        return
    _, version, count, reserved = _HEADER.unpack(head)
    if version != _VERSION:
        yield f"version {version}, and only {_VERSION} is known"
        return
    if reserved:
        yield f"the reserved byte of the header is {reserved}, not 0"
    if not count:
        yield "the number of records is 0"
    start = _HEADER.size + _RECORD.size * count
    if start > source.size:
        yield f"{count} records end at byte {start}, the file at {source.size}"
        return
    table = source.read(_HEADER.size, start - _HEADER.size)
    for number, fields in enumerate(_RECORD.iter_unpack(table)):
        for problem in _check_record(source, start, number, fields, found):
            yield f"record {number}: {problem}"
    end, last = 0, 0
    for number, record in sorted(found.items(), key=lambda item: item[1].offset):
        if record.offset < end:
            yield f"records {min(last, number)} and {max(last, number)} overlap at byte {record.offset}"
        if record.offset + record.size > end:
            end, last = record.offset + record.size, number


def _check_record(
    source: Source, start: int, number: int, fields: tuple[int, ...], found: dict[int, Record]
) -> Iterator[str]:
    machine, osabi, osabi_version, word, order, reserved, offset, size = fields
    if reserved:
        yield f"its reserved bytes are {reserved:#06x}, not 0"
    if word not in _WORD_BITS:
        yield f"its word size is {word}, not 1 (32 bits) or 2 (64 bits)"
    if order not in _BYTE_ORDERS:
        yield f"its byte order is {order}, not 1 (little) or 2 (big)"
    if word not in _WORD_BITS or order not in _BYTE_ORDERS:
        return
    record = Record(Ident(machine, osabi, osabi_version, _WORD_BITS[word], _BYTE_ORDERS[order]), offset, size)
    if any(other.ident == record.ident for other in found.values()):
        yield f"a record before it is for {record.full_target} too"
    found[number] = record
    if offset % _ALIGNMENT:
        yield f"its offset {offset} is no multiple of {_ALIGNMENT}"
    if offset < start:
        yield f"its offset {offset} lies within the {start} bytes of header and records"
    if offset + size > source.size:
        yield f"its range, {size} bytes from {offset}, ends behind the file's {source.size} bytes"
        return
    inner = identify(source.read(offset, min(size, IDENT_BYTES)))
    if inner is None:
        yield f"there is no ELF file at byte {offset}"
    elif inner != record.ident:
        real = Record(inner, offset, size).full_target
        yield f"it says {record.full_target}, the ELF file at byte {offset} says {real}"


def select(found: Sequence[Record], target: str) -> Record:
    """Find the record for a target.

    Args:
        found: What `records` returned.
        target: A machine (``x86_64``, ``aarch64``, ``machine-183``), then, each after a colon and all
            optional, ``32`` or ``64``, ``le`` or ``be``, ``osabiN``, ``versionN``; or ``recordN``, counted
            from 0.

    Raises:
        ValueError: The target is no such text, or fits several records.
        LookupError: No record is for it.
    """
    there = ", ".join(record.full_target for record in found)
    number = target.removeprefix("record")
    if number != target and number.isascii() and number.isdigit():
        if int(number) < len(found):
            return found[int(number)]
        raise LookupError(f"there is no record {number}; records are 0 to {len(found) - 1}")
    named = [record for record in found if record.target == target]
    tests = dict(_wanted(target))
    fits = (
        named
        if len(named) == 1
        else [
            record
            for record in found
            if all(getattr(record.ident, field) == value for field, value in tests.items())
        ]
    )
    if not fits:
        raise LookupError(f"no record is for {target}; there are {there}")
    if len(fits) > 1:
        raise ValueError(f"{target} fits {len(fits)} records; there are {there}")
    return fits[0]


def _wanted(target: str) -> Iterator[tuple[str, int | str]]:
    machine, *words = target.split(":")
    yield "machine", machine_number(machine)
    for word in words:
        digits = word.lstrip("abcdefghijklmnopqrstuvwxyz")
        if word in ("32", "64"):
            yield "bits", int(word)
        elif word in ("le", "be"):
            yield "byte_order", {"le": "little", "be": "big"}[word]
        elif word == f"osabi{digits}" and digits.isascii() and digits.isdigit():
            yield "osabi", int(digits)
        elif word == f"version{digits}" and digits.isascii() and digits.isdigit():
            yield "osabi_version", int(digits)
        else:
            raise ValueError(
                f"{target!r} is no target: {word!r} is none of 32, 64, le, be, osabiN and versionN"
            )


def record_for_this_machine(data: Content) -> tuple[int, int]:
    """Find the ELF file that this process could load.

    It is the one for the same machine, word size and byte order as the running program, and for Linux: the
    one that names GNU before the one that names System V.

    Args:
        data: A path, a source or bytes.

    Returns:
        Its offset and length in bytes.

    Raises:
        LookupError: There is none; the message lists what there is.
        Malformed: It is no good FatELF file.
        OSError: It cannot be opened.
        PageError: Its bytes cannot be had.
    """
    with opened(data) as source:
        record = _for(source, native())
        return record.offset, record.size


def _for(source: Source, here: Ident) -> Record:
    found = _records(source)
    fits = [record for record in found if record.ident.runs_as(here)]
    if not fits:
        there = ", ".join(record.target for record in found)
        raise LookupError(f"{source.name}: no record is for {here.name}; there are {there}")
    return max(fits, key=lambda record: record.ident.osabi)


def record_to_execute(data: Content) -> Record:
    """Find the program that the kernel would run.

    What it runs itself comes before what it runs by a rule of ``binfmt_misc``, 64 bits before 32, what names
    GNU before what names System V. Others' programs do not count.

    Args:
        data: A path, a source or bytes.

    Raises:
        LookupError: There is none; the message lists what there is.
        Malformed: It is no good FatELF file.
        OSError: It cannot be opened.
        PageError: Its bytes cannot be had.
        Unsupported: The machine allows no executable memfd, with which the kernel is asked.
    """
    with opened(data) as source:
        found = records(source)
        fits = [
            ((how == "rule", -record.ident.bits, -record.ident.osabi), record)
            for record in found
            if record.ident.for_linux and (how := kernel_runs(record.ident)) is not None
        ]
        if not fits:
            there = ", ".join(record.target for record in found)
            raise LookupError(f"{source.name}: this kernel runs none of its programs, which are for {there}")
        return min(fits, key=lambda fit: fit[0])[1]


def member(data: Content, target: str | None = None) -> int:
    """Copy one ELF file to a new memfd that nobody can change any more.

    Args:
        data: A path, a source or bytes.
        target: As `select` takes it; None for what this process could load.

    Returns:
        A descriptor, which is the caller's, closed on exec. The dynamic linker and ``execve`` take it.

    Raises:
        LookupError: There is none for the target.
        ValueError: The target is no such text, or fits several.
        Malformed: It is no good FatELF file.
        OSError: It cannot be opened, or there is no memory.
        PageError: Its bytes cannot be had.
        Unsupported: The machine allows no executable memfd.
    """
    with opened(data) as source:
        record = _for(source, native()) if target is None else select(_records(source), target)
        return copy_to_memory(source, record.offset, record.size, name=os.path.basename(source.name))


def glue(
    inputs: Iterable[Content], output: str | os.PathLike[str], *, force: bool = False
) -> tuple[Record, ...]:
    """Write a FatELF file of ELF files. It is whole, or not there.

    Args:
        inputs: One to 255 ELF files, no two for the same target. The order stays.
        output: Gets the permission bits of the first input that is a file.
        force: Replace a file that is there.

    Returns:
        The records that were written.

    Raises:
        ValueError: There are too few or too many inputs, or two for the same target.
        Malformed: An input is no ELF file.
        FileExistsError: The output exists, and no ``force``.
        OSError: A file cannot be read or written.
        PageError: The bytes of an input cannot be had.
    """
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(opened(each)) for each in inputs]
        if not 1 <= len(sources) <= _RECORDS_MAX:
            raise ValueError(f"a FatELF file holds 1 to {_RECORDS_MAX} ELF files, not {len(sources)}")
        placed: list[Record] = []
        end = _HEADER.size + _RECORD.size * len(sources)
        for source in sources:
            ident = identify(source.read(0, min(IDENT_BYTES, source.size)))
            if ident is None:
                raise Malformed(f"{source.name}: it does not begin like an ELF file")
            twin = next((at for at, other in enumerate(placed) if other.ident == ident), None)
            if twin is not None:
                target = placed[twin].full_target
                raise ValueError(f"{sources[twin].name} and {source.name} are both for {target}")
            page = 65536 if machine_name(ident.machine) in _LARGE_PAGES else _ALIGNMENT
            placed.append(Record(ident, -(-end // page) * page, source.size))
            end = placed[-1].offset + source.size
        with whole_file(output, force=force, mode=_mode(sources)) as file:
            file.write(_HEADER.pack(MAGIC, _VERSION, len(placed), 0))
            for record in placed:
                file.write(_packed(record))
            for record, source in zip(placed, sources, strict=True):
                file.seek(record.offset)
                for piece in pieces(source, 0, source.size):
                    file.write(piece)
    return tuple(placed)


def _packed(record: Record) -> bytes:
    it = record.ident
    order = 1 if it.byte_order == "little" else 2
    return _RECORD.pack(
        it.machine, it.osabi, it.osabi_version, it.bits // 32, order, 0, record.offset, record.size
    )


def _mode(sources: Iterable[Source]) -> int | None:
    """Permission bits of the first source that is a file; None if there is none."""
    paths = (source.path for source in sources if isinstance(source, FileSource))
    return next((os.stat(path).st_mode & 0o777 for path in paths), None)


def extract(data: Content, target: str, output: str | os.PathLike[str], *, force: bool = False) -> Record:
    """Write one ELF file of a FatELF file, with its permission bits. It is whole, or not there.

    Args:
        data: A path, a source or bytes.
        target: As `select` takes it.
        output: A path.
        force: Replace a file that is there.

    Raises:
        LookupError: There is none for the target.
        ValueError: The target is no such text, or fits several.
        Malformed: It is no good FatELF file.
        FileExistsError: The output exists, and no ``force``.
        OSError: A file cannot be read or written.
        PageError: Its bytes cannot be had.
    """
    with opened(data) as source:
        record = select(_records(source), target)
        _write(source, record, output, force)
    return record


def split(data: Content, stem: str | os.PathLike[str], *, force: bool = False) -> list[tuple[str, Record]]:
    """Write every ELF file of a FatELF file, each whole or not there.

    Args:
        data: A path, a source or bytes.
        stem: What the names begin with; a hyphen and the target follow.
        force: Replace files that are there.

    Returns:
        The names of the files, in the order of the records.

    Raises:
        Malformed: It is no good FatELF file.
        FileExistsError: An output exists, and no ``force``; those written before it stay.
        OSError: A file cannot be read or written.
        PageError: Its bytes cannot be had.
    """
    with opened(data) as source:
        found = _records(source)
        targets = [record.target for record in found]
        written = []
        for record, target in zip(found, targets, strict=True):
            unique = target if targets.count(target) == 1 else record.full_target
            name = f"{os.fspath(stem)}-{unique}"
            _write(source, record, name, force)
            written.append((name, record))
    return written


def _write(source: Source, record: Record, output: str | os.PathLike[str], force: bool) -> None:
    with whole_file(output, force=force, mode=_mode([source])) as file:
        for piece in pieces(source, record.offset, record.size):
            file.write(piece)
