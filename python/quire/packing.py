"""Packing files and archives anew, so that regions can be filled from any place in them; and unpacking them.

A file becomes frames of zstandard with a seek table behind them, the members of a zip archive become the same
inside of the archive. The layouts are in ``docs/packing.md``.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire import _native
from quire.errors import PageError, QuireError, Unsupported
from quire.output import whole_file
from quire.sources import (
    ZIP_DEFLATED,
    ZIP_METHODS,
    ZIP_STORED,
    ZIP_ZSTANDARD,
    FileSource,
    Source,
    data_start,
    open_archive,
    open_source,
)
from quire.zipwriter import ALIGNMENT, ZipWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import BinaryIO

__all__ = ["FAILURES", "FRAME_BYTES", "LEVEL", "Packed", "check_frame_bytes", "is_archive", "pack", "unpack"]

Path = str | os.PathLike[str]

FRAME_BYTES = 256 << 10
"""Content of a frame, unless told otherwise; ``docs/packing.md`` has the figures that chose it."""
LEVEL = 3
"""Of compression, unless told otherwise."""
FAILURES = (QuireError, OSError, ValueError, zipfile.BadZipFile)
"""What packing raises when its input, its output or its arguments are at fault."""

_FRAME_MIN, _FRAME_MAX = 4096, 4 << 20
_ARCHIVE_SUFFIXES = {".zip", ".whl", ".pyz", ".jar", ".egg", ".npz"}
_COPY_BYTES = 1 << 20
_DEFLATE_LEVEL = 6
# A member that loses less than one part in so many is stored: then it is mapped instead of decoded.
_WORTH = 32
# At most so many frames are encoded at the same time, and as many wait to be written.
_THREADS_MAX = 8
_SEEK_TABLE, _SEEKABLE = 0x184D2A5E, 0x8F92EAB1
_FRAMES_MAX = 0x0800_0000
_ENTRY = struct.Struct("<II")


@dataclass(frozen=True)
class Packed:
    """What came of packing or unpacking."""

    archive: bool
    """Whether it was a whole archive."""
    members: int
    """Members of the archive, directories too; 1 for a file."""
    stored: int
    """Members that are stored as they are and are not empty."""
    content_bytes: int
    """Length of everything, decompressed."""
    input_bytes: int | None
    """Length of the input file as it was; None if the input was no whole local file."""
    output_bytes: int
    """Length of the file that was written."""

    def summary(self, output: Path) -> str:
        """Write what was done as a line or two of text."""
        before = "" if self.input_bytes is None else f", was {self.input_bytes:,}"
        part = f" ({self.output_bytes / self.content_bytes:.1%})" if self.content_bytes else ""
        text = f"{self.output_bytes:,} bytes for {self.content_bytes:,} of content{part}{before}\n"
        if self.archive:
            text += f"{self.members} members, {self.stored} of them stored\n"
        return f"{os.fspath(output)}: {text}"


def check_frame_bytes(frame_bytes: int) -> int:
    """Check the length of frames.

    Raises:
        ValueError: It is no multiple of 4096, or longer than the 4 MiB that `ZstdSource` decodes as a whole.
    """
    if not _FRAME_MIN <= frame_bytes <= _FRAME_MAX or frame_bytes % _FRAME_MIN:
        raise ValueError(f"frames of {frame_bytes} bytes; multiples of 4096 up to 4 MiB are possible")
    return frame_bytes


def is_archive(target: Path) -> bool:
    """Tell whether a path names a whole zip archive.

    That is a file that starts as one, or whose directory is found and whose name ends as that of one.
    """
    path = os.fspath(target)
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(4)
    if head in (b"PK\3\4", b"PK\5\6"):
        return True
    return os.path.splitext(path)[1].lower() in _ARCHIVE_SUFFIXES and zipfile.is_zipfile(path)


def pack(
    target: Path, out: Path, *, frame_bytes: int = FRAME_BYTES, level: int = LEVEL, force: bool = False
) -> Packed:
    """Pack a file, or a whole zip archive, so that any part of it is decoded on its own.

    Memory does not grow with the input, but for 8 bytes for each frame and what the directory of an archive
    takes. The output appears when it is complete and synced to disk, with the permission bits of the input.
    Blocks, and uses several threads.

    Args:
        target: A zip archive becomes an archive. What else `open_source` opens (a plain file, a ``.gz``, a
            ``.zst``, ``a.zip!/member``) becomes a zstandard file. What it is shows in its first bytes.
        out: May be the input itself, with ``force``.
        frame_bytes: Content of a frame, in bytes; a multiple of 4096 up to 4 MiB.
        level: Of zstandard, 1 (fast) to 22 (small).
        force: Replace a file that is there.

    Raises:
        ValueError: ``frame_bytes`` or ``level`` is out of range, or ``out`` is no regular file.
        FileExistsError: ``out`` exists, and no ``force``.
        OSError: Something cannot be read or written; what was at ``out`` is as it was.
        PageError: A compressed input is damaged.
        zipfile.BadZipFile: An archive is damaged, or its directory lies.
        Unsupported: A member is encrypted, or compressed by a method that quire cannot read.
    """
    check_frame_bytes(frame_bytes)
    with _Frames(frame_bytes, level) as frames:
        if is_archive(target):
            return _rewrite(target, out, force, frames.member, frame_bytes, ZIP_ZSTANDARD)
        with _output(target, out, force) as file, open_source(target) as source:
            frames.write(_parts(source, frame_bytes), file)
            return _packed_file(target, source, file)


def unpack(target: Path, out: Path, *, stored: bool = False, force: bool = False) -> Packed:
    """Undo `pack`: make a plain file of a compressed one, or an archive that any tool reads of a packed one.

    Args:
        target: A zip archive becomes an archive of deflated members. A compressed file, or ``a.zip!/member``,
            becomes its content.
        out: May be the input itself, with ``force``.
        stored: Do not compress the members of an archive at all.
        force: Replace a file that is there.

    Raises:
        ValueError: The input is not compressed, ``out`` is no regular file, or a file shall be stored.
        FileExistsError: ``out`` exists, and no ``force``.
        OSError: Something cannot be read or written; what was at ``out`` is as it was.
        PageError: A compressed input is damaged.
        zipfile.BadZipFile: An archive is damaged, or its directory lies.
        Unsupported: A member is encrypted, or compressed by a method that quire cannot read.
    """
    if is_archive(target):
        return _rewrite(target, out, force, None if stored else _deflated, _COPY_BYTES, ZIP_DEFLATED)
    if stored:
        raise ValueError(f"{os.fspath(target)} is no archive, so nothing of it can be stored")
    with _output(target, out, force) as file, open_source(target) as source:
        if isinstance(source, FileSource):
            raise ValueError(f"{source.name} is not compressed")
        file.writelines(_parts(source, _COPY_BYTES))
        return _packed_file(target, source, file)


def _packed_file(target: Path, source: Source, file: BinaryIO) -> Packed:
    path = os.fspath(target)
    before = os.path.getsize(path) if os.path.isfile(path) else None
    return Packed(False, 1, 0, source.size, before, file.tell())


@contextmanager
def _output(target: Path, out: Path, force: bool) -> Iterator[BinaryIO]:
    path = os.fspath(target)
    mode = os.stat(path).st_mode & 0o777 if os.path.isfile(path) else None
    with whole_file(out, force=force, mode=mode) as file:
        yield file


def _parts(source: Source | _native.Source, length: int) -> Iterator[bytes]:
    for at in range(0, source.size, length):
        yield source.read(at, min(length, source.size - at))


class _Frames:
    """Encodes frames in several threads, in order."""

    def __init__(self, frame_bytes: int, level: int) -> None:
        self._encoder = _native.FrameEncoder(level)
        self._frame_bytes = frame_bytes
        self._threads = min(len(os.sched_getaffinity(0)), _THREADS_MAX)
        self._pool = ThreadPoolExecutor(self._threads, "quire-pack")

    def __enter__(self) -> _Frames:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _encoded(self, parts: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        """The length of each part, and its frame. Without parts there is one empty frame."""
        waiting: deque[tuple[int, Future[bytes]]] = deque()
        some = False
        for part in parts:
            some = True
            waiting.append((len(part), self._pool.submit(self._encoder.frame, part)))
            if len(waiting) >= 2 * self._threads:
                length, future = waiting.popleft()
                yield length, future.result()
        if not some:
            yield 0, self._encoder.frame(b"")
        for length, future in waiting:
            yield length, future.result()

    def write(self, parts: Iterable[bytes], file: BinaryIO) -> None:
        """Write the frames and the seek table."""
        file.write(_seek_table(self._write(parts, file)))

    def member(self, parts: Iterable[bytes], file: BinaryIO) -> None:
        """Write the data of an archive's member: a single frame needs no table, and every tool reads one."""
        table = self._write(parts, file)
        if len(table) > _ENTRY.size:
            file.write(_seek_table(table))

    def _write(self, parts: Iterable[bytes], file: BinaryIO) -> bytearray:
        table = bytearray()
        for length, frame in self._encoded(parts):
            file.write(frame)
            table += _ENTRY.pack(len(frame), length)
        return table


def _seek_table(entries: bytearray) -> bytes:
    count = len(entries) // _ENTRY.size
    if count > _FRAMES_MAX:
        raise ValueError(f"{count} frames; a seek table has at most {_FRAMES_MAX}: use longer frames")
    # Without checksums of its own: the frames have theirs, and those are the same.
    content = bytes(entries) + struct.pack("<IBI", count, 0, _SEEKABLE)
    return struct.pack("<II", _SEEK_TABLE, len(content)) + content


def _deflated(parts: Iterable[bytes], file: BinaryIO) -> None:
    encoder = zlib.compressobj(_DEFLATE_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    file.writelines(encoder.compress(part) for part in parts)
    file.write(encoder.flush())


def _rewrite(
    target: Path,
    out: Path,
    force: bool,
    encode: Callable[[Iterable[bytes], BinaryIO], None] | None,
    part_bytes: int,
    method: int,
) -> Packed:
    """Write an archive again, with the data of its members encoded by this method, or stored."""
    with (
        _output(target, out, force) as file,
        open(target, "rb") as raw,
        open_archive(raw, os.fspath(target)) as archive,
    ):
        infos = archive.infolist()
        _copy_head(raw, file, min((info.header_offset for info in infos), default=archive.start_dir))
        writer = ZipWriter(file)
        stored = 0
        for info in infos:
            member = _Member(archive, raw, info, f"{os.fspath(target)}!/{info.filename}")
            if encode is not None and info.file_size:
                writer.begin(info, member.local_extra, method)
                encode(member.parts(part_bytes), file)
                if writer.data_bytes < info.file_size - info.file_size // _WORTH:
                    writer.end(info.CRC)
                    continue
                writer.abandon()
            aligned = method == ZIP_ZSTANDARD and info.file_size >= ALIGNMENT
            writer.begin(info, member.local_extra, ZIP_STORED, aligned=aligned)
            file.writelines(member.parts(part_bytes))
            writer.end(info.CRC)
            stored += info.file_size > 0
        writer.finish(archive.comment)
        content = sum(info.file_size for info in infos)
        return Packed(True, len(infos), stored, content, os.fstat(raw.fileno()).st_size, file.tell())


def _copy_head(raw: BinaryIO, file: BinaryIO, length: int) -> None:
    """Copy what stands before the archive: the first line of a program, or the program."""
    raw.seek(0)
    while length:
        part = raw.read(min(length, _COPY_BYTES))
        if not part:
            raise zipfile.BadZipFile("the file ends before the first member")
        file.write(part)
        length -= len(part)


class _Member:
    """A member of an archive that is read from front to back."""

    def __init__(self, archive: zipfile.ZipFile, raw: BinaryIO, info: zipfile.ZipInfo, name: str) -> None:
        if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED, ZIP_ZSTANDARD):
            method = ZIP_METHODS.get(info.compress_type, "a method without a name")
            raise Unsupported(
                f"{name} is compressed by method {info.compress_type} ({method}); only stored, deflated and "
                "zstandard members are read: write the archive again with another tool"
            )
        self._archive, self._raw, self._info, self._name = archive, raw, info, name
        self._start = data_start(archive, raw, info, name)
        if info.compress_type == ZIP_STORED and info.compress_size != info.file_size:
            raise zipfile.BadZipFile(
                f"{name}: stored, with {info.file_size} bytes that take {info.compress_size}"
            )
        raw.seek(info.header_offset + 28)
        length = int.from_bytes(raw.read(2), "little")
        raw.seek(self._start - length)
        self.local_extra = raw.read(length)

    def parts(self, length: int) -> Iterator[bytes]:
        """Read all of it; the last part comes only if length and CRC-32 are those of the directory.

        Args:
            length: Of each part but the last, in bytes.

        Raises:
            zipfile.BadZipFile: They are not, or the data is damaged.
            PageError: A zstandard member is damaged.
        """
        total = crc = 0
        last = b""
        for part in self._decoded(length):
            if last:
                yield last
            total += len(part)
            crc = zlib.crc32(part, crc)
            last = part
        if total != self._info.file_size:
            raise zipfile.BadZipFile(
                f"{self._name}: {total} bytes, of {self._info.file_size} that the directory says"
            )
        if crc != self._info.CRC:
            raise zipfile.BadZipFile(f"{self._name}: CRC mismatch")
        if last:
            yield last

    def _decoded(self, length: int) -> Iterator[bytes]:
        if self._info.compress_type == ZIP_ZSTANDARD:
            try:
                native = _native.Source.file(self._raw.fileno(), self._start, self._info.compress_size).zstd()
                yield from _parts(native, length)
            except PageError as error:
                raise PageError(f"{self._name}: {error}") from None
            return
        try:
            with self._archive.open(self._info) as content:
                while part := content.read(length):
                    yield part
        except (EOFError, zlib.error) as error:
            raise zipfile.BadZipFile(f"{self._name}: its data is damaged: {error}") from error
