"""Shared objects in memory, loaded after those that they need.

What an object needs and its archive has is found as the dynamic linker finds it, through ``DT_RUNPATH`` and
``DT_RPATH`` with ``$ORIGIN``, and loaded first: the dynamic linker then takes it by its ``DT_SONAME``, and
looks for no file. ``docs/images.md`` tells how an object is laid out.
"""

from __future__ import annotations

import atexit
import os
import posixpath
import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol

from quire import _native
from quire.errors import Malformed, PageError, QuireError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

__all__ = [
    "WHOLE_OVERRIDE",
    "WINDOW_BYTES",
    "Archive",
    "LibraryStats",
    "LinkError",
    "Linked",
    "all_linked",
    "link",
    "source_of",
]

WHOLE_OVERRIDE = "QUIRE_LIBRARIES"
"""Set to ``whole``, this environment variable has objects loaded whole: for debuggers that read the file."""

WINDOW_BYTES = 8192
"""How much of an object is filled at a touch."""


class Archive(Protocol):
    """Something that has shared objects, by names with ``/`` between their parts."""

    @property
    def identity(self) -> Hashable:
        """What is the same as long as its content is the same."""

    @property
    def archive(self) -> str:
        """What messages call it."""

    def find(self, places: Sequence[str]) -> tuple[Archive, str] | None:
        """Find the first member that there is of these, here or in an archive beside this one."""

    def source(self, member: str) -> tuple[_native.Source, int | None]:
        """Open a member; with its CRC-32, if it is known.

        Raises OSError, PageError, Unsupported, zipfile.BadZipFile.
        """


class LinkError(OSError):
    """A shared object was not loaded. ``path`` is its own, which may be that of one that was needed."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}{text}")
        self.path = name


# A tuple, for dataclasses take longer to import than all that importing from wheels needs.
class LibraryStats(NamedTuple):
    """How much of a library is in memory, and what was done for it in this process."""

    whole: str
    """Why all of it was loaded at once; empty if its code is filled in when it is touched."""
    size_bytes: int
    """Length of the file."""
    lazy_bytes: int
    """What of the file is filled when it is touched: code and constants, less what linking needs."""
    filled_bytes: int
    """How much of that is in memory."""
    faults: int
    """Touches of missing pages that were served."""
    refills: int
    """Windows that were filled again after they had been taken."""
    evictions: int
    """Windows that were taken because memory was short."""


class Linked:
    """An object that is loaded, and those that were loaded for it. Made by ``link`` only."""

    def __init__(
        self, name: str, native: _native.Library, source: _native.Source, needs: list[Linked]
    ) -> None:
        self.name = name
        """Path of the archive with the member's name behind it."""
        self.native = native
        self.source = source
        """All of its file, also what was not touched yet."""
        self.path = native.path
        """The name by which the dynamic linker knows it; to open it again counts a reference there."""
        self._needs = needs
        self._users = 0

    @property
    def stats(self) -> LibraryStats:
        """Figures of now."""
        return LibraryStats(*self.native.share())

    def _retain(self) -> Linked:
        self._users += 1
        return self

    def release(self) -> bool:
        """Give back what ``link`` gave; at the last time the object is closed, and what it alone needed.

        Returns:
            Whether the object was unloaded: references that others took, and flags of its own, keep it.

        Raises:
            OSError: The dynamic linker refuses.
        """
        with _lock:
            self._users -= 1
            if self._users > 0:
                return False
            for key in [key for key, linked in _objects.items() if linked is self]:
                del _objects[key]
            unloaded = self.native.close()
            for need in self._needs:
                need.release()
            return unloaded


_objects: dict[tuple[Hashable, str], Linked] = {}
# Constructors of libraries run inside. The Python code of modules does not: it would wait for import locks of
# threads that wait for this one.
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - the thread that may hold it does not exist in the child
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
# Later processes fill it at once, in one pass. Processes that live longer do it when they come to rest, too.
atexit.register(_native.remember_touched)


def link(archive: Archive, member: str, mode: int = os.RTLD_NOW, *, whole: str | None = None) -> Linked:
    """Load an object, after those that it needs and the archive has; what is loaded is taken as it is.

    Blocks while others are loaded. Constructors run inside.

    Args:
        archive: Where the object is.
        member: Its name there.
        mode: Flags of ``dlopen``.
        whole: Why to load all of it now, instead of what is touched when it is touched.

    Returns:
        The object. Its ``release`` gives it back.

    Raises:
        LinkError: It, or one that it needs, is damaged, not for this machine, or refused by the dynamic
            linker.
        OSError, PageError, Unsupported, zipfile.BadZipFile: It cannot be read.
    """
    if whole is None and os.environ.get(WHOLE_OVERRIDE) == "whole":
        whole = f"{WHOLE_OVERRIDE}=whole is set"
    with _lock:
        return _link(archive, member, mode, whole, None)


def all_linked() -> list[Linked]:
    """List what is loaded, in the order in which loading it was finished. Waits while others are loaded."""
    with _lock:
        return list(dict.fromkeys(_objects.values()))


def _link(archive: Archive, member: str, mode: int, whole: str | None, parent: _Needed | None) -> Linked:
    key = archive.identity, member
    linked = _objects.get(key)
    if linked is not None:
        linked.native.open(mode)
        return linked._retain()
    name = f"{archive.archive}/{member}" if member else archive.archive
    try:
        source, crc = archive.source(member)
        native = _native.Library(source, name, WINDOW_BYTES, whole, crc)
    except (Malformed, PageError) as error:
        raise type(error)(f"{name}: {error}") from None
    needs: list[Linked] = []
    try:
        _link_needed(archive, member, native.linkage(), whole, parent, needs)
        native.open(mode)
    except BaseException as error:
        native.close()
        for need in needs:
            need.release()
        if isinstance(error, OSError) and not isinstance(error, LinkError):
            text = str(error).replace(native.path, name)
            raise LinkError(name, f"{_wanted(parent)} cannot be loaded: {text}") from error
        raise
    linked = _objects[key] = Linked(name, native, source, needs)
    return linked._retain()


def source_of(device: int, inode: int) -> _native.Source | None:
    """Find what a loaded object's file has, by the numbers under which its memory is mapped.

    Waits while others are loaded.

    Returns:
        Its source, which reads without filling anything in; None if no object that is loaded has that file.
    """
    with _lock:
        for linked in _objects.values():
            status = os.stat(linked.path)
            if (status.st_dev, status.st_ino) == (device, inode):
                return linked.source
    return None


def _wanted(parent: _Needed | None) -> str:
    return f", which {parent.archive.archive}/{parent.member} needs," if parent else ":"


class _Needed(NamedTuple):
    """An object that is being loaded, and the one that needs it."""

    archive: Archive
    member: str
    rpath: str | None
    parent: _Needed | None

    def folders(self, runpath: str | None) -> Iterator[str]:
        """List the folders of the archive in which to look for the libraries that this object needs."""
        if runpath is not None:
            yield from _folders(self.member, runpath)
            return
        # DT_RPATH, unlike DT_RUNPATH, holds for what is needed by what is needed.
        this: _Needed | None = self
        while this:
            yield from _folders(this.member, this.rpath or "")
            this = this.parent

    def includes(self, archive: Archive, member: str) -> bool:
        """Tell whether this object, or one that it is loaded for, is that member."""
        if (archive.identity, member) == (self.archive.identity, self.member):
            return True
        return self.parent is not None and self.parent.includes(archive, member)


def _folders(member: str, search: str) -> Iterator[str]:
    """List the folders of a search path that are in the archive."""
    for entry in search.split(":"):
        for origin in ("$ORIGIN", "${ORIGIN}"):
            if entry == origin or entry.startswith(f"{origin}/"):
                below = f".{entry.removeprefix(origin)}"
                folder = posixpath.normpath(posixpath.join(posixpath.dirname(member), below))
                if folder.partition("/")[0] != "..":
                    yield "" if folder == "." else folder


def _link_needed(
    archive: Archive,
    member: str,
    linkage: tuple[str | None, list[str], str | None, str | None],
    whole: str | None,
    parent: _Needed | None,
    loaded: list[Linked],
) -> None:
    """Load what an object needs; ``loaded`` gets what was, also when something fails."""
    _, needed, rpath, runpath = linkage
    this = _Needed(archive, member, rpath if runpath is None else None, parent)
    folders = [*this.folders(runpath)]
    for library in needed:
        if "/" in library:
            continue
        found = archive.find([posixpath.join(folder, library) for folder in folders])
        if found is None or this.includes(*found):
            continue
        where, place = found
        # The dynamic linker, too, takes what is loaded before it looks into folders.
        if (where.identity, place) not in _objects and _native.is_loaded(library):
            continue
        loaded.append(_link_library(where, place, library, whole, this))


def _link_library(archive: Archive, member: str, library: str, whole: str | None, parent: _Needed) -> Linked:
    name = f"{archive.archive}/{member}"
    try:
        linked = _link(archive, member, os.RTLD_NOW | os.RTLD_LOCAL, whole, parent)
    except QuireError as error:
        raise LinkError(name, f"{_wanted(parent)} cannot be loaded: {error}") from error
    if not _native.is_loaded(library):
        linked.release()
        raise LinkError(
            name,
            f" does not call itself {library} (DT_SONAME), as {parent.member} calls it; "
            "without a file on disk nothing else tells the dynamic linker that it is the same",
        )
    return linked
