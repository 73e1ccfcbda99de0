"""Loading shared objects from archives, compressed files, FatELF files and memory, their code on demand."""

from __future__ import annotations

import ctypes
import itertools
import os
from typing import TYPE_CHECKING, Self

from quire import _native
from quire.errors import PageError
from quire.image import fatelf
from quire.image.content import as_source
from quire.linking import LibraryStats, Linked, link
from quire.sources import FileSource, file_identity, open_archive, split_archive, zip_member

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from typing_extensions import Buffer

    from quire.linking import Archive
    from quire.region import Region
    from quire.snapshot import Snapshot
    from quire.sources import Source

__all__ = ["Library", "load"]

_numbers = itertools.count()


class Library(ctypes.CDLL):
    """A loaded shared object: a `ctypes.CDLL`, with what quire knows of it.

    Made by `load`. It holds a reference to the object, as long as it is not closed: like any `ctypes.CDLL`,
    it is not closed when it is collected.
    """

    _linked: Linked | None
    _whole: str
    _size: int

    @classmethod
    def _make(cls, name: str, handle: int, mode: int, linked: Linked | None, whole: str, size: int) -> Self:
        self = cls(name, mode=mode, handle=handle)
        self._linked, self._whole, self._size = linked, whole, size
        return self

    @property
    def stats(self) -> LibraryStats:
        """Figures of now."""
        if self._linked is None:
            return LibraryStats(self._whole, self._size, 0, 0, 0, 0, 0)
        return self._linked.stats

    def fill(self) -> None:
        """Fill all that is missing. Blocks. Raises PageError if it cannot be had."""
        if self._linked is not None:
            self._linked.native.fill()

    def discard(self) -> int:
        """Take back the memory of code and constants, which are filled again when they are touched.

        Returns:
            How many bytes were taken. Forked processes share them, and fill them again too.
        """
        return 0 if self._linked is None else self._linked.native.discard()

    def close(self) -> bool:
        """Give the reference back; functions of the library must not be called any more. Idempotent.

        Destructors run inside if it was the last reference.

        Returns:
            Whether the object was unloaded. Others may hold references (whoever loaded it too, objects that
            need it), and some objects are never unloaded (``-z nodelete``, unique symbols).

        Raises:
            OSError: The dynamic linker refuses.
        """
        linked, self._linked = self._linked, None
        if linked is None:
            return False
        self._whole = "it is closed"
        return linked.release()


class _Zip:
    """A zip archive as `quire.linking` wants one."""

    def __init__(self, path: str) -> None:
        self.archive = path
        with open(path, "rb") as file, open_archive(file, path) as self._directory:
            self.identity: Hashable = file_identity(file.fileno())

    def find(self, places: Sequence[str]) -> tuple[Archive, str] | None:
        return next(((self, place) for place in places if place in self._directory.NameToInfo), None)

    def source(self, member: str) -> tuple[_native.Source, int | None]:
        with open(self.archive, "rb") as file:
            if file_identity(file.fileno()) != self.identity:
                raise PageError(f"{self.archive} has changed since its directory was read")
            below = _native.Source.file(file.fileno())
            native = zip_member(self._directory, file, below, member, f"{self.archive}!/{member}")
        return native, self._directory.getinfo(member).CRC


class _One:
    """A source with one object in it, from the offset on."""

    def __init__(self, source: Source, offset: int, size: int) -> None:
        self.archive = source.name
        # Nothing tells whether another source has the same bytes.
        self.identity: Hashable = ("one", next(_numbers))
        native = source._native
        self._native = native if (offset, size) == (0, source.size) else native.part(offset, size)

    def find(self, places: Sequence[str]) -> tuple[Archive, str] | None:  # noqa: ARG002 - there is one
        return None

    def source(self, member: str) -> tuple[_native.Source, int | None]:  # noqa: ARG002 - there is one
        return self._native, None


def load(
    target: str | os.PathLike[str] | Source | Snapshot | Region | Buffer,
    mode: int = ctypes.DEFAULT_MODE,
    *,
    lazy: bool = True,
) -> Library:
    """Load a shared object, and run its constructors.

    A plain file is left to the dynamic linker and the kernel, which page it as always. Everything else is
    laid out in a memory file: what the dynamic linker reads and writes is filled now, code and constants when
    they are touched, by threads that need no GIL; under memory pressure they are taken back. Objects for
    which that is impossible or not worth it are loaded whole, and ``stats.whole`` says why.

    What the object needs is looked for in its archive first, through ``DT_RUNPATH`` and ``DT_RPATH`` with
    ``$ORIGIN``, and then where the dynamic linker always looks. The same member of the same archive is one
    object, however often it is loaded; content without a path is another object each time.

    Args:
        target: A path; a member of an archive (``x.whl!/x.libs/liby.so``); a compressed file; a FatELF file,
            of which the object for this machine is taken; a source, snapshot, or bytes-like object, which
            must not change; or a region, whose source is used. What is passed as an object may be closed,
            unless it is a source that reads through Python.
        mode: Flags of ``dlopen``, as `ctypes.CDLL` takes them; names are bound now (``RTLD_NOW``) unless
            ``os.RTLD_LAZY`` is among them.
        lazy: False to load it whole.

    Returns:
        The library.

    Raises:
        Malformed: It is no shared object, or the dynamic linker would read or write outside of it; the
            message names file and field. A plain file is checked by nobody but the dynamic linker.
        OSError: It cannot be opened; or the dynamic linker refuses it, for example because a library that it
            needs is missing.
        LookupError: A FatELF file has no object for this machine.
        PageError: Its bytes cannot be had.
        Unsupported: Its compression is not known.
        zipfile.BadZipFile: The archive is damaged.
    """
    flags = mode if mode & os.RTLD_LAZY else mode | os.RTLD_NOW
    whole = None if lazy else "that was asked for"
    if isinstance(target, str | os.PathLike):
        archive, member = split_archive(target)
        if member is not None:
            return _linked(link(_Zip(archive), member, flags, whole=whole), f"{archive}!/{member}", mode)
    source, is_owned = as_source(target)
    try:
        head = source.read(0, min(4, source.size))
        if isinstance(source, FileSource) and is_owned and head == b"\x7fELF":
            return _plain(source, mode, flags)
        offset, size = 0, source.size
        if fatelf.is_fatelf(head):
            offset, size = fatelf.record_for_this_machine(source)
        return _linked(link(_One(source, offset, size), "", flags, whole=whole), source.name, mode)
    finally:
        if is_owned:
            source.close()


def _linked(linked: Linked, name: str, mode: int) -> Library:
    return Library._make(name, linked.native.open(os.RTLD_NOW), mode, linked, "", 0)


def _plain(source: FileSource, mode: int, flags: int) -> Library:
    path = os.path.abspath(source.path)
    handle = ctypes.CDLL(path, mode=flags)._handle
    return Library._make(path, handle, mode, None, "the kernel pages it from its file", source.size)
