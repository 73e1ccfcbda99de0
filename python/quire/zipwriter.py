"""Writing zip archives member by member, with what another archive says of each kept.

The standard `zipfile` reads directories well, and everywhere here; it cannot write members of method 93, keep
what only local headers hold, nor place data at a multiple of the page size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Collection
    from typing import BinaryIO

__all__ = ["ALIGNMENT", "ZipWriter", "kept_extra", "name_bytes"]

ALIGNMENT = 4096
"""Stored data starts at a multiple of this, in bytes, where that is asked for."""

_LIMIT_32 = 0xFFFF_FFFF
_LIMIT_16 = 0xFFFF
_UTF8 = 0x800
_EXTRA_ZIP64 = 0x0001
_EXTRA_ALIGNMENT = 0xD935
"""As Android's tools write it: the alignment in 16 bits, then zeros."""

_ZIP64_MOST = 28
"""The longest zip64 field, in bytes."""

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s4B4H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")

# What a reader must be able to do, in tenths of a version of the specification.
_NEEDS = {0: 20, 8: 20, 93: 63}
_NEEDS_ZIP64 = 45


def name_bytes(info: zipfile.ZipInfo) -> bytes:
    """Give the name as the archive has it."""
    return info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")


def kept_extra(extra: bytes, without: Collection[int] = (_EXTRA_ZIP64, _EXTRA_ALIGNMENT)) -> bytes:
    """Take the extra fields that describe the old layout out; bytes that are no field stay."""
    kept = bytearray()
    at = 0
    while at + 4 <= len(extra):
        number, length = struct.unpack_from("<HH", extra, at)
        if at + 4 + length > len(extra):
            break
        if number not in without:
            kept += extra[at : at + 4 + length]
        at += 4 + length
    return bytes(kept + extra[at:])


@dataclass
class _Entry:
    """A member that is written, or is being written."""

    info: zipfile.ZipInfo
    header_at: int
    extra: bytes
    """Of the local header, without zip64."""
    method: int
    zip64: bool
    crc: int = 0
    packed_bytes: int = 0


class ZipWriter:
    """Writes an archive to a file that can seek: `begin`, the data, `end` for each member; at last `finish`.

    Bytes that the file has already stay in front of the archive.

    Args:
        file: Stays the caller's. Positions in the archive are positions in it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._entries: list[_Entry] = []
        self._open: _Entry | None = None
        self._data_at = 0

    def begin(self, info: zipfile.ZipInfo, local_extra: bytes, method: int, *, aligned: bool = False) -> None:
        """Start a member; its data is to be written to the file next.

        Args:
            info: As read from an archive. Name, comment, dates, attributes, extra fields and size count.
            local_extra: The extra fields of its local header there.
            method: How the data is going to be compressed.
            aligned: Let the data start at a multiple of `ALIGNMENT`. It does not if the local extra fields
                leave no room for the padding.

        Raises:
            ValueError: The extra fields leave no room for one that zip64 may need.
        """
        at = self._file.tell()
        zip64 = info.file_size >= _LIMIT_32
        extra = kept_extra(local_extra)
        if aligned:
            start = at + _LOCAL.size + len(name_bytes(info)) + len(extra) + (20 if zip64 else 0)
            padding = -(start + 6) % ALIGNMENT
            if len(extra) + 6 + padding + _ZIP64_MOST <= _LIMIT_16:
                extra = struct.pack("<3H", _EXTRA_ALIGNMENT, 2 + padding, ALIGNMENT) + bytes(padding) + extra
        if max(len(extra), len(kept_extra(info.extra))) + _ZIP64_MOST > _LIMIT_16:
            raise ValueError(f"{info.filename}: its extra fields leave no room for one more")
        self._open = _Entry(info, at, extra, method, zip64)
        self._file.write(self._local(self._open))
        self._data_at = self._file.tell()

    @property
    def data_bytes(self) -> int:
        """How much was written since `begin`."""
        return self._file.tell() - self._data_at

    def end(self, crc: int) -> None:
        """Complete the member with the data that was written since `begin`.

        Args:
            crc: CRC-32 of the content.
        """
        entry = self._open
        assert entry is not None, "no member was begun"
        after = self._file.tell()
        entry.crc = crc
        entry.packed_bytes = after - self._data_at
        self._file.seek(entry.header_at)
        self._file.write(self._local(entry))
        self._file.seek(after)
        self._entries.append(entry)
        self._open = None

    def abandon(self) -> None:
        """Take back what was written since `begin`."""
        assert self._open is not None, "no member was begun"
        self._file.seek(self._open.header_at)
        self._file.truncate()
        self._open = None

    def finish(self, comment: bytes) -> None:
        """Write the directory. The file is not closed."""
        assert self._open is None, "a member is not complete"
        start = self._file.tell()
        for entry in self._entries:
            self._file.write(self._central(entry))
        length = self._file.tell() - start
        count = len(self._entries)
        if count >= _LIMIT_16 or start >= _LIMIT_32 or length >= _LIMIT_32:
            end_64 = _END_64.pack(
                b"PK\6\6", _END_64.size - 12, _NEEDS_ZIP64, _NEEDS_ZIP64, 0, 0, count, count, length, start
            )
            self._file.write(end_64 + _LOCATOR_64.pack(b"PK\6\7", 0, start + length, 1))
        shown = min(count, _LIMIT_16)
        self._file.write(
            _END.pack(
                b"PK\5\6", 0, 0, shown, shown, min(length, _LIMIT_32), min(start, _LIMIT_32), len(comment)
            )
            + comment
        )

    def _local(self, entry: _Entry) -> bytes:
        size, packed = entry.info.file_size, entry.packed_bytes
        extra = entry.extra
        if entry.zip64:
            extra = struct.pack("<HHQQ", _EXTRA_ZIP64, 16, size, packed) + extra
            size = packed = _LIMIT_32
        name = name_bytes(entry.info)
        date, time = _dos_time(entry.info)
        header = _LOCAL.pack(
            b"PK\3\4", _needs(entry), _flags(entry), entry.method, time, date, entry.crc, packed, size,
            len(name), len(extra),
        )  # fmt: skip
        return header + name + extra

    @staticmethod
    def _central(entry: _Entry) -> bytes:
        info = entry.info
        size, packed, offset = info.file_size, entry.packed_bytes, entry.header_at
        large = b""
        if entry.zip64:
            large += struct.pack("<QQ", size, packed)
            size = packed = _LIMIT_32
        if offset >= _LIMIT_32:
            large += struct.pack("<Q", offset)
            offset = _LIMIT_32
        extra = kept_extra(info.extra)
        needs = _needs(entry)
        if large:
            extra = struct.pack("<HH", _EXTRA_ZIP64, len(large)) + large + extra
            needs = max(needs, _NEEDS_ZIP64)
        name = name_bytes(info)
        date, time = _dos_time(info)
        header = _CENTRAL.pack(
            b"PK\1\2", info.create_version, info.create_system, needs, info.reserved, _flags(entry),
            entry.method, time, date, entry.crc, packed, size, len(name), len(extra), len(info.comment), 0,
            info.internal_attr, info.external_attr, offset,
        )  # fmt: skip
        return header + name + extra + info.comment


def _needs(entry: _Entry) -> int:
    return max(_NEEDS[entry.method], _NEEDS_ZIP64 if entry.zip64 else 0)


def _flags(entry: _Entry) -> int:
    # How the name is encoded; the others tell of the old data, or that sizes stand behind it.
    return entry.info.flag_bits & _UTF8


def _dos_time(info: zipfile.ZipInfo) -> tuple[int, int]:
    year, month, day, hour, minute, second = info.date_time
    return (year - 1980) << 9 | month << 5 | day, hour << 11 | minute << 5 | second // 2
