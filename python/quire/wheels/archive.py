"""Wheels as archives: what is in one, and a copy of a member in memory."""

from __future__ import annotations

import os
import posixpath
import stat
import sys
import zipfile
import zlib
from importlib.machinery import EXTENSION_SUFFIXES
from typing import IO, TYPE_CHECKING

from quire import _native, memfd
from quire.errors import Unsupported
from quire.sources import data_start, file_identity, open_archive, zip_member

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["UNREADABLE", "Wheel", "forget", "on_path", "open_wheel", "opened"]

_CHUNK_BYTES = 1 << 20
# What extension modules are called on some system.
_FOREIGN_SUFFIXES = (".so", ".pyd", ".dylib")
_INSTALLED_BESIDE = (".data/purelib/", ".data/platlib/")
# What reading a damaged or unsupported archive, or a member of it, raises.
UNREADABLE = (zipfile.BadZipFile, Unsupported, zlib.error, OSError)


class Wheel:
    """The directory of a wheel. No file stays open: its position would be shared with forked children."""

    def __init__(self, archive: str) -> None:
        self.archive = archive
        with open(archive, "rb") as file, open_archive(file, archive) as self._directory:
            self.identity = file_identity(file.fileno())
        self.members: dict[str, zipfile.ZipInfo] = {}
        """Regular files, by name."""
        self.folders: set[str] = set()
        """All that regular files are in; few wheels have entries for them."""
        self.ignored: set[str] = set()
        """Names that lead elsewhere: symbolic links, absolute ones, ones with ``..``."""
        self.foreign: dict[str, str] = {}
        """Extension modules that this interpreter does not take: path without suffix, and name."""
        self.roots: list[str] = []
        """``*.data/purelib/``, ``*.data/platlib/``: installers put what is in them beside the packages."""
        self.info = ""
        """Name of the member that makes a zip file a wheel; empty if there is none."""
        for member in self._directory.infolist():
            name = member.filename
            if name.startswith("/") or ".." in name.split("/") or stat.S_ISLNK(member.external_attr >> 16):
                self.ignored.add(name)
            elif not member.is_dir():
                self._add(name, member)

    def _add(self, name: str, member: zipfile.ZipInfo) -> None:
        self.members[name] = member
        folder, _, base = name.rpartition("/")
        above = folder
        while above and above not in self.folders:
            self.folders.add(above)
            above = above.rpartition("/")[0]
        data, _, below = name.partition("/")
        root = f"{data}/{below.partition('/')[0]}/"
        if data.endswith(".data") and root.endswith(_INSTALLED_BESIDE) and root not in self.roots:
            self.roots.append(root)
        if base == "WHEEL" and folder.endswith(".dist-info") and "/" not in folder:
            self.info = name
        elif base.endswith(_FOREIGN_SUFFIXES):
            stem = base.partition(".")[0]
            if base.removeprefix(stem) not in EXTENSION_SUFFIXES:
                self.foreign[posixpath.join(folder, stem)] = name

    def describe(self) -> str:
        """Say what the wheel was built for, and what this interpreter is."""
        try:
            lines = self.read(self.info).decode("utf-8", "replace").splitlines()
        except UNREADABLE as error:
            return f"what the wheel is for cannot be read: {error}"
        tags = ", ".join(line.partition(":")[2].strip() for line in lines if line.lower().startswith("tag:"))
        here = f"{sys.implementation.cache_tag} on {sys.platform} {os.uname().machine}"
        return f"the wheel is for {tags or 'no platform that it names'}, this is {here}"

    def read(self, member: str) -> bytes:
        """Give a member's bytes; raises one of UNREADABLE."""
        return b"".join(self.chunks(member))

    def chunks(self, member: str) -> Iterator[bytes]:
        """Decompress a member; raises one of UNREADABLE, at the end if length or CRC-32 are wrong."""
        info = self.members[member]
        length = crc = 0
        with open(self.archive, "rb") as file:
            if file_identity(file.fileno()) != self.identity:
                raise zipfile.BadZipFile("the file has changed since its directory was read")
            file.seek(data_start(self._directory, file, info, member))
            for chunk in _decompressed(file, info):
                length += len(chunk)
                crc = zlib.crc32(chunk, crc)
                if length > info.file_size:
                    break
                yield chunk
        if (length, crc) != (info.file_size, info.CRC):
            raise zipfile.BadZipFile(f"{member}: length or CRC-32 is not what the archive's directory says")

    def find(self, places: Sequence[str]) -> tuple[Wheel, str] | None:
        """Find the first member that there is of these, here or in another wheel on ``sys.path``.

        An installer would have put all wheels' files into one folder.
        """
        for wheel in (self, *on_path()) if places else ():
            for place in places:
                if place in wheel.members:
                    return wheel, place
        return None

    def source(self, member: str) -> tuple[_native.Source, int | None]:
        """Open a member to be read in parts, with its CRC-32; raises one of UNREADABLE."""
        with open(self.archive, "rb") as file:
            if file_identity(file.fileno()) != self.identity:
                raise zipfile.BadZipFile("the file has changed since its directory was read")
            below = _native.Source.file(file.fileno())
            native = zip_member(self._directory, file, below, member, f"{self.archive}/{member}")
        return native, self.members[member].CRC

    def copy(self, member: str) -> int:
        """Copy a member to a new sealed memfd, which is the caller's; raises one of UNREADABLE."""
        return memfd.sealed(f"quire:{member}", self.chunks(member), executable=False)


def _decompressed(file: IO[bytes], info: zipfile.ZipInfo) -> Iterator[bytes]:
    """Read a member's data from the file's position on, in pieces of bounded size."""
    left = info.compress_size

    def piece() -> bytes:
        nonlocal left
        data = file.read(min(_CHUNK_BYTES, left))
        left -= len(data)
        return data

    if info.compress_type == zipfile.ZIP_STORED:
        while data := piece():
            yield data
    elif info.compress_type == zipfile.ZIP_DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        while not inflate.eof:
            data = inflate.unconsumed_tail or piece()
            out = inflate.decompress(data, _CHUNK_BYTES)
            if not data and not out:
                raise zipfile.BadZipFile(f"{info.filename}: its compressed data ends too early")
            yield out
    else:
        raise Unsupported(
            f"{info.filename} is compressed by method {info.compress_type}; wheels are deflated or stored"
        )


_wheels: dict[str, Wheel] = {}


def open_wheel(archive: str) -> Wheel:
    """Read a wheel's directory, unless it was read and is the same file. Raises ImportError if it is none."""
    try:
        wheel = _wheels.get(archive)
        if wheel is not None and wheel.identity == file_identity(archive):
            return wheel
        wheel = Wheel(archive)
    except UNREADABLE as error:
        raise ImportError(f"{archive}: {error}", path=archive) from error
    if not wheel.info:
        raise ImportError(f"{archive} is no wheel: it has no *.dist-info/WHEEL", path=archive)
    _wheels[archive] = wheel
    return wheel


def opened() -> list[Wheel]:
    """List the wheels whose directories were read."""
    return list(_wheels.values())


def on_path() -> Iterator[Wheel]:
    """List the wheels on ``sys.path``, in its order."""
    for entry in sys.path:
        if entry in _wheels or os.path.isfile(entry):
            try:
                yield open_wheel(entry)
            except ImportError:
                # A plain zip archive, or gone since.
                continue


def forget() -> None:
    """Forget the directories that were read."""
    _wheels.clear()
