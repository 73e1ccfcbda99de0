"""Shared objects of wheels, ready for the dynamic linker: in memory, after those that they need."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import posixpath
import threading
from typing import TYPE_CHECKING, NamedTuple

from quire import _native
from quire.errors import Malformed
from quire.wheels.archive import UNREADABLE, on_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.wheels.archive import Identity, Wheel

__all__ = ["prepared"]

# As the extension gives it: soname, needed, rpath, runpath.
_Linkage = tuple[str | None, list[str], str | None, str | None]

# What was loaded, by wheel and member: the path by which the dynamic linker knows it.
_objects: dict[tuple[Identity, str], str] = {}
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - the thread that may hold it does not exist in the child
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def _is_loaded(name: str) -> bool:
    """Ask the dynamic linker whether it would take an object that it has for this name."""
    try:
        ctypes.CDLL(name, os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


class _Needed(NamedTuple):
    """An object that is being loaded, and the one that needs it."""

    wheel: Wheel
    member: str
    rpath: str | None
    parent: _Needed | None

    def folders(self, runpath: str | None) -> Iterator[str]:
        """List the folders of the wheel in which to look for the libraries that this object needs."""
        if runpath is not None:
            yield from _folders(self.member, runpath)
            return
        # DT_RPATH, unlike DT_RUNPATH, holds for what is needed by what is needed.
        this: _Needed | None = self
        while this:
            yield from _folders(this.member, this.rpath or "")
            this = this.parent

    def includes(self, wheel: Wheel, member: str) -> bool:
        """Tell whether this object, or one that it is loaded for, is that member."""
        if (wheel, member) == (self.wheel, self.member):
            return True
        return self.parent is not None and self.parent.includes(wheel, member)


def _folders(member: str, search: str) -> Iterator[str]:
    """List the folders of a search path that are in the wheel."""
    for entry in search.split(":"):
        for origin in ("$ORIGIN", "${ORIGIN}"):
            if entry == origin or entry.startswith(f"{origin}/"):
                below = f".{entry.removeprefix(origin)}"
                folder = posixpath.normpath(posixpath.join(posixpath.dirname(member), below))
                if folder.partition("/")[0] != "..":
                    yield "" if folder == "." else folder


@contextlib.contextmanager
def prepared(wheel: Wheel, member: str, parent: _Needed | None = None) -> Iterator[str]:
    """Load what a member needs and give the path to load it from, for use in the block."""
    key = wheel.identity, member
    if key in _objects:
        yield _objects[key]
        return
    name = f"{wheel.archive}/{member}"
    try:
        fd = _unused_name(wheel.copy(member))
    except UNREADABLE as error:
        raise ImportError(f"{name}: cannot be read from the wheel: {error}", path=name) from error
    path = f"/proc/self/fd/{fd}"
    try:
        try:
            linkage = _native.elf_linkage(fd)
        except Malformed as error:
            raise ImportError(f"{name}: {error}", path=name) from error
        _load_needed(wheel, member, linkage, parent)
        yield path
    finally:
        # The descriptor of what was loaded stays: what prints backtraces opens objects by their name, which
        # must not come to mean another file.
        if _is_loaded(path):
            _objects[key] = path
        else:
            os.close(fd)


def _load_needed(wheel: Wheel, member: str, linkage: _Linkage, parent: _Needed | None) -> None:
    _, needed, rpath, runpath = linkage
    this = _Needed(wheel, member, rpath if runpath is None else None, parent)
    folders = [*this.folders(runpath)]
    for library in needed:
        if "/" in library:
            continue
        found = _found(wheel, [posixpath.join(folder, library) for folder in folders])
        if found is None or this.includes(*found):
            continue
        # Constructors of libraries run inside. The Python code of modules does not: it would wait for import
        # locks of threads that wait for this one.
        with _lock:
            # The dynamic linker, too, takes what is loaded before it looks into folders.
            if not _is_loaded(library):
                _load_library(*found, library, this)


def _found(wheel: Wheel, places: list[str]) -> tuple[Wheel, str] | None:
    """Find a library as if all wheels on the path were unpacked to one folder, this one last."""
    for place in places:
        if place in wheel.members:
            return wheel, place
    for other in on_path() if places else ():
        for place in places:
            if place in other.members:
                return other, place
    return None


def _load_library(wheel: Wheel, member: str, library: str, parent: _Needed) -> None:
    name = f"{wheel.archive}/{member}"
    with prepared(wheel, member, parent) as path:
        try:
            ctypes.CDLL(path, os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            needs = f"{parent.wheel.archive}/{parent.member}"
            text = str(error).replace(path, name)
            raise ImportError(f"{name}, which {needs} needs, cannot be loaded: {text}", path=name) from error
    if not _is_loaded(library):
        raise ImportError(
            f"{name} does not call itself {library} (DT_SONAME), as {parent.member} calls it; "
            "without a file on disk nothing else tells the dynamic linker that it is the same",
            path=name,
        )


def _unused_name(fd: int) -> int:
    """Move a new descriptor until its path is not the name of something that is loaded.

    The dynamic linker compares names first, and numbers come again that were closed behind our back, as
    daemons close all.
    """
    while _is_loaded(f"/proc/self/fd/{fd}"):
        try:
            moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, fd + 1)
        finally:
            os.close(fd)
        fd = moved
    return fd
