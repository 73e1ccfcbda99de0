"""Where the bytes of a region come from: files, memory, snapshots, compressed files, members of archives.

A source has a length and gives the bytes of any range. What each costs, and what it verifies when, is told in
``docs/sources.md``. `open_source` finds the right one for a path.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import stat
import urllib.parse
import zipfile
from typing import TYPE_CHECKING, Any, NoReturn

from quire import _native
from quire.closing import Closing
from quire.errors import PageError, Unsupported
from quire.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

__all__ = [
    "BytesSource",
    "FileSource",
    "GzipSource",
    "SnapshotSource",
    "Source",
    "ZipSource",
    "ZstdSource",
    "cache_directory",
    "data_start",
    "file_identity",
    "kind_of",
    "open_archive",
    "open_source",
    "split_archive",
    "zip_member",
]

Path = str | os.PathLike[str]

# Which module has ``open_remote(url, **options) -> Source`` for the urls of a scheme; imported on first use.
REMOTE = dict.fromkeys(("http", "https", "s3", "gs", "az"), "quire.remote")

ZIP_STORED, ZIP_DEFLATED, ZIP_ZSTANDARD = 0, 8, 93
ZIP_METHODS = {
    1: "shrunk",
    6: "imploded",
    9: "deflate64",
    12: "bzip2",
    14: "lzma",
    95: "xz",
    96: "jpeg",
    97: "wavpack",
    98: "ppmd",
    99: "AES encryption",
}
_FLAG_ENCRYPTED = 0x1
_FLAG_PATCH = 0x20
_FLAG_STRONG = 0x40
_LOCAL_HEADER_BYTES = 30

_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]*)://"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def cache_directory() -> str | None:
    """Name the directory for what first passes over compressed files have found; all processes share it.

    Returns:
        ``$XDG_CACHE_HOME/quire``, else ``~/.cache/quire``; None if there is no home. It need not exist. It is
        used only if it belongs to this user and nobody else may enter it.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        # As the XDG specification has it, a relative path is to be ignored.
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        base = os.path.join(home, ".cache")
    return os.path.join(base, "quire")


class Source(Closing):
    """Bytes of a fixed length that can be had in any order. What every source is.

    Pickling one notes what opens it again (a path and the state of the file, the bytes themselves), so it
    works on the machine, and in the directory layout, where it was made.
    """

    name: str
    """For messages: a path, or what else the bytes are."""

    def __init__(self, native: _native.Source, name: str) -> None:
        """Wrap what reads the bytes.

        Args:
            native: What reads the bytes.
            name: For messages.
        """
        self._held: _native.Source | None = native
        self.name = name

    @property
    def _native(self) -> _native.Source:
        """What regions read from; it stays good when the source is closed."""
        if self._held is None:
            raise ValueError("the source is closed")
        return self._held

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._native.size

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Produce bytes directly, with no region. Blocks, without holding the GIL.

        Args:
            offset: Of the first byte.
            length: How many; None for all up to the end.

        Raises:
            ValueError: The range is not within the source, or the source is closed.
            PageError: The bytes could not be had, or do not verify.
        """
        native = self._native
        if length is None:
            length = native.size - offset
        if offset < 0 or length < 0:
            raise ValueError(f"bytes {offset} to {offset}+{length} are outside {self.name}")
        try:
            return native.read(offset, length)
        except PageError as error:
            raise PageError(f"{self.name}: {error}") from None

    def close(self) -> None:
        """Give up what the source holds, as soon as no region uses it any more. Idempotent."""
        self._held = None

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._held is None

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Refuse, unless a subclass knows how to be opened again."""
        raise TypeError(f"a {type(self).__name__} cannot be pickled")

    def __repr__(self) -> str:
        """Show name and size."""
        state = "closed" if self._held is None else f"{self._held.size} bytes"
        return f"<quire.{type(self).__name__} {self.name}: {state}>"


Identity = tuple[int, int, int, int]


def file_identity(file: str | int) -> Identity:
    """Tell, of a path or descriptor, which file it is and which state of it: device, inode, size, change."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _OnFile(Source):
    """A source whose bytes come from a file that has a path, by which it is opened again when unpickled."""

    def __init__(self, path: Path, wrap: Callable[[int], _native.Source], name: str | None = None) -> None:
        self.path = os.path.abspath(os.fspath(path))
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever. Regular files do not know it.
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError(f"{self.path} is no regular file")
            self._identity = file_identity(fd)
            name = name or self.path
            try:
                native = wrap(fd)
            except PageError as error:
                raise PageError(f"{name}: {error}") from None
            super().__init__(native, name)
        finally:
            os.close(fd)

    def _arguments(self) -> tuple[Any, ...]:
        return (self.path,)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle path and state; a file that is another one when it is opened again raises PageError."""
        return _reopen, (type(self), self._arguments(), self._identity)


def _reopen(kind: type[_OnFile], arguments: tuple[Any, ...], identity: Identity) -> Source:
    source = kind(*arguments)
    if source._identity != identity:
        source.close()
        raise PageError(f"{source.path} has changed since the source was pickled")
    return source


class FileSource(_OnFile):
    """The bytes of a file, as they are. A change of size or mtime is noticed by the next read and fails it.

    Args:
        path: A regular file, which must not change while the source is used.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no regular file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, _native.Source.file)


class GzipSource(_OnFile):
    """A gzip file, decompressed; any number of members.

    Opening one reads all of it once, because nothing else tells its length, unless the cache knows the file.
    Every member's CRC-32 and length are verified by that.

    Args:
        path: A regular file, which must not change while the source is used.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no regular file.
        PageError: It is damaged or no gzip file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, lambda fd: _native.Source.file(fd).gzip(cache_directory()))


class ZstdSource(_OnFile):
    """A zstandard file, decompressed: with a seek table, or of several frames, or one.

    Frames of at most 4 MiB are decoded on their own. A longer one is decoded forwards; going back in it
    starts it again. Opening reads all of it if a frame does not say its length and the cache does not know
    it.

    Args:
        path: A regular file, which must not change while the source is used.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no regular file.
        PageError: It is damaged or no zstandard file, or needs a dictionary.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, lambda fd: _native.Source.file(fd).zstd(cache_directory()))


class BytesSource(Source):
    """The bytes of an object that exports a buffer, which stays exported while the source is used.

    What others write to the buffer may or may not be seen; copy what is to stay as it is. Pickling copies.

    Args:
        obj: A C-contiguous buffer of any item type.

    Raises:
        TypeError: It exports no buffer, or one that is not contiguous.
    """

    def __init__(self, obj: Buffer) -> None:
        view = memoryview(obj)
        # A buffer with a dimension of length zero cannot be cast.
        plain = view.cast("B") if view.nbytes else memoryview(b"")
        super().__init__(_native.Source.buffer(plain), f"<{view.nbytes} bytes>")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the bytes."""
        return BytesSource, (self.read(),)


class SnapshotSource(Source):
    """The bytes of a snapshot, read from its layers.

    Args:
        snapshot: It may be closed while the source is used.

    Raises:
        TypeError: It is no Snapshot.
        ValueError: It is closed.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"a SnapshotSource shows a Snapshot, not {type(snapshot).__name__}")
        self._snapshot = snapshot
        super().__init__(_native.Source.snapshot(snapshot._lend()), f"<a snapshot of {snapshot.size} bytes>")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the snapshot, for multiprocessing; its descriptors travel."""
        return SnapshotSource, (self._snapshot,)


class ZipSource(_OnFile):
    """A member of a zip archive: stored, deflated, or compressed with zstandard.

    The directory is read with the standard `zipfile`, so that zip64, bytes before and after the archive and
    repeated names (the last counts) are treated as there. Nothing is written anywhere, so names with ``..``
    are names like any other. What is verified of a member, and when, is told in ``docs/sources.md``; a stored
    member's CRC-32 is not.

    Args:
        archive: Path of the archive, which must not change while the source is used.
        member: Name of the member, with ``/`` between its parts.

    Raises:
        OSError: The archive cannot be opened; FileNotFoundError also if there is no such member.
        IsADirectoryError: The member is a directory.
        zipfile.BadZipFile: The archive is damaged, or what its directory says of the member cannot be true.
        Unsupported: The member is encrypted, or compressed by a method that quire has no codec for.
    """

    def __init__(self, archive: Path, member: str) -> None:
        self.member = member
        name = f"{os.fspath(archive)}!/{member}"
        super().__init__(archive, lambda fd: _member(_native.Source.file(fd), member, name), name)

    def _arguments(self) -> tuple[Any, ...]:
        return self.path, self.member


class _Decoded(Source):
    """What a codec makes of another source's bytes: those of a store that has no paths."""

    def __init__(self, below: Source, member: str | None) -> None:
        self._below = below
        self._member = member
        name = below.name if member is None else f"{below.name}!/{member}"
        try:
            if member is not None:
                native = _member(below._native, member, name)
            elif kind_of(below) is GzipSource:
                native = below._native.gzip(cache_directory())
            else:
                native = below._native.zstd(cache_directory())
        except PageError as error:
            raise PageError(f"{name}: {error}") from None
        super().__init__(native, name)

    def close(self) -> None:
        """Give up this source and the one below."""
        super().close()
        self._below.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what is below."""
        return _Decoded, (self._below, self._member)


class _Reader(io.RawIOBase):
    """Raw bytes as a file, for `zipfile`."""

    def __init__(self, native: _native.Source) -> None:
        self._native = native
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._native.size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "seek before the start")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        view = memoryview(into).cast("B")
        length = max(0, min(view.nbytes, self._native.size - self._at))
        view[:length] = self._native.read(min(self._at, self._native.size), length)
        self._at += length
        return length


def _member(below: _native.Source, member: str, name: str) -> _native.Source:
    """Open a member of the archive in raw bytes."""
    with io.BufferedReader(_Reader(below)) as file, open_archive(file, name) as archive:
        return zip_member(archive, file, below, member, name)


def zip_member(
    archive: zipfile.ZipFile, file: Any, below: _native.Source, member: str, name: str
) -> _native.Source:
    """Open a member of a zip archive whose directory has been read.

    Args:
        archive: The directory.
        file: The archive's bytes; its position changes.
        below: The same bytes, for the member to be read from.
        member: Name of the member.
        name: For messages.

    Raises:
        FileNotFoundError, IsADirectoryError: There is no such member, or it is a directory.
        zipfile.BadZipFile: What the directory says of the member cannot be true.
        Unsupported: The member is encrypted, or compressed by a method that quire has no codec for.
        PageError: It is compressed with zstandard, and damaged.
    """
    try:
        info = archive.getinfo(member)
    except KeyError:
        _no_member(archive, member, name)
    # A name may be empty, which `is_dir` does not expect.
    if info.filename.endswith("/"):
        raise IsADirectoryError(f"{name} is a directory")
    start = data_start(archive, file, info, name)
    packed, size = info.compress_size, info.file_size
    raw = below.slice(start, packed)
    if info.compress_type == ZIP_STORED:
        if packed != size:
            raise zipfile.BadZipFile(f"{name}: stored, with {size} bytes that take {packed}")
        return raw
    if info.compress_type == ZIP_DEFLATED:
        return raw.deflate(size, info.CRC, cache_directory())
    if info.compress_type == ZIP_ZSTANDARD:
        native = raw.zstd(cache_directory())
        if native.size != size:
            raise PageError(f"its frames hold {native.size} bytes, the archive's directory says {size}")
        return native
    method = ZIP_METHODS.get(info.compress_type, "a method without a name")
    raise Unsupported(
        f"{name} is compressed by method {info.compress_type} ({method}); quire pages members that are "
        "stored, deflated or zstandard: pack the archive again"
    )


def _no_member(archive: zipfile.ZipFile, member: str, name: str) -> NoReturn:
    names = [info.filename for info in archive.infolist()]
    if f"{member}/" in names:
        raise IsADirectoryError(f"{name} is a directory")
    import difflib  # noqa: PLC0415 - for a message only

    near = difflib.get_close_matches(member, names, 3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise FileNotFoundError(f"{name}: the archive has no such member{hint}") from None


def open_archive(file: Any, name: str) -> zipfile.ZipFile:
    """Read the directory of a zip archive.

    Args:
        file: Stays the caller's.
        name: For messages.

    Raises:
        zipfile.BadZipFile: It is damaged, or no archive.
        Unsupported: A member needs more than any version of the format that is known.
    """
    try:
        archive = zipfile.ZipFile(file)
    except NotImplementedError as error:
        raise Unsupported(f"{name}: {error}") from None
    except (ValueError, OverflowError) as error:
        # A name that is not UTF-8, or a place before the start.
        raise zipfile.BadZipFile(f"{name}: {error}") from error
    if any(info.header_offset < 0 for info in archive.infolist()):
        raise zipfile.BadZipFile(f"{name}: a member before the start of the file")
    return archive


def data_start(archive: zipfile.ZipFile, file: Any, info: zipfile.ZipInfo, name: str) -> int:
    """Find where a member's data starts, and check its local header; it ends before the directory.

    Args:
        archive: Knows where the directory is.
        file: The archive's bytes; its position changes.
        info: From the archive's directory.
        name: For messages.

    Raises:
        Unsupported: The member is encrypted, or a patch.
        zipfile.BadZipFile: The local header is missing or contradicts the directory, or data overlaps it.
    """
    if info.flag_bits & (_FLAG_ENCRYPTED | _FLAG_STRONG):
        raise Unsupported(f"{name} is encrypted; quire has no decryption")
    if info.flag_bits & _FLAG_PATCH:
        raise Unsupported(f"{name} is compressed patched data")
    # What zipfile itself found, with bytes before the archive counted.
    directory = archive.start_dir
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"{name}: no local header at byte {info.header_offset}")
    flags, method = (int.from_bytes(header[at : at + 2], "little") for at in (6, 8))
    name_length, extra_length = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    written = file.read(name_length)
    if written.decode("utf-8" if flags & 0x800 else "cp437", "replace") != info.orig_filename:
        raise zipfile.BadZipFile(f"{name}: the local header names {written!r}")
    if method != info.compress_type or flags & _FLAG_ENCRYPTED:
        raise zipfile.BadZipFile(f"{name}: the local header contradicts the directory")
    start: int = info.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length
    if start + info.compress_size > directory:
        raise zipfile.BadZipFile(f"{name}: its data overlaps the directory, or lies outside the file")
    return start


def open_source(target: Path, **options: Any) -> Source:
    """Open what a path or url names.

    ``archive.zip!/member`` names a member of a zip archive of any name (a wheel is one). Other files are told
    apart by their first bytes, not by their names: gzip and zstandard files are decompressed, all others
    taken as they are. ``file://`` urls name files. Urls of other schemes are treated in the same way, with
    ``!/`` too; a remote gzip file is read as a whole to learn its length.

    Args:
        target: A path, or a url.
        **options: For the opener of a remote url.

    Raises:
        ValueError: A url of a scheme that is not known.
        Unsupported: What opens urls of this scheme is not installed.
        OSError: The file cannot be opened.
        PageError: A compressed file is damaged.
    """
    path = os.fspath(target)
    url = re.match(_SCHEME, path) if isinstance(target, str) else None
    if url:
        scheme = url[1].lower()
        if scheme != "file":
            return _open_remote(scheme, path, options)
        parts = urllib.parse.urlsplit(path)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{path} names a file of another machine")
        path = urllib.parse.unquote(parts.path)
    if options:
        raise TypeError(f"a local file takes no options: {', '.join(options)}")
    archive, member = split_archive(path)
    if member is not None:
        return ZipSource(archive, member)
    plain = FileSource(path)
    kind = kind_of(plain)
    if kind is None:
        return plain
    plain.close()
    return kind(path)


def split_archive(target: Path) -> tuple[str, str | None]:
    """Take a path of the form ``archive.zip!/member`` apart.

    Returns:
        The archive's path and the member's name. The path itself and None if it names no member, is a url,
        or is the name of a file that has the mark in it.
    """
    path = os.fspath(target)
    archive, mark, member = path.partition("!/")
    if not mark or re.match(_SCHEME, path) or os.path.exists(path):
        return path, None
    return archive, member


def kind_of(raw: Source) -> type[GzipSource | ZstdSource] | None:
    """Tell by the first bytes how a source is compressed; None if it is not, as far as they tell."""
    head = raw.read(0, min(4, raw.size))
    if head[:2] == b"\x1f\x8b":
        return GzipSource
    # The last is a skippable frame, with which files may begin.
    if head == _ZSTD_MAGIC or (head[1:] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return ZstdSource
    return None


def _open_remote(scheme: str, url: str, options: dict[str, Any]) -> Source:
    try:
        module = REMOTE[scheme]
    except KeyError:
        known = ", ".join(["file", *REMOTE])
        raise ValueError(f"{url}: nothing opens urls of scheme {scheme!r}; known are {known}") from None
    try:
        opener = importlib.import_module(module).open_remote
    except ModuleNotFoundError as error:
        raise Unsupported(f"{url}: {error}; install quire[remote]") from error
    store, mark, member = url.partition("!/")
    below: Source = opener(store, **options)
    try:
        if mark:
            return _Decoded(below, member)
        return below if kind_of(below) is None else _Decoded(below, None)
    except BaseException:
        below.close()
        raise
