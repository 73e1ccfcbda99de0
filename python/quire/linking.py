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

    _Key = tuple[Hashable, str]

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
        self._together = [self]
        self._group: _native.Group | None = None

    @property
    def stats(self) -> LibraryStats:
        """Figures of now."""
        return LibraryStats(*self.native.share())

    def _retain(self) -> Linked:
        self._users += 1
        return self

    def release(self) -> bool:
        """Give back what ``link`` gave; at the last time the object is closed, and what it alone needed.

        Objects that were linked together are closed together.

        Returns:
            Whether the object was unloaded: references that others took, and flags of its own, keep it.

        Raises:
            OSError: The dynamic linker refuses.
        """
        with _lock:
            self._users -= 1
            if any(linked._users > 0 for linked in self._together):
                return False
            for key in [key for key, linked in _objects.items() if linked in self._together]:
                del _objects[key]
            unloaded = (self._group or self.native).close()
            # Not kept until garbage is collected: they hold descriptors.
            together, self._together = self._together, []
            for linked in together:
                linked._together = []
                for need in linked._needs:
                    need.release()
            return unloaded


_objects: dict[_Key, Linked] = {}
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
        loading = _Loading(whole)
        try:
            loaded = loading.load(archive, member, mode, None)
        finally:
            loading.abandon()
    # Nothing that was asked for by nobody else waits.
    assert isinstance(loaded, Linked)
    return loaded


def all_linked() -> list[Linked]:
    """List what is loaded, in the order in which loading it was finished. Waits while others are loaded."""
    with _lock:
        return list(dict.fromkeys(_objects.values()))


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


class _Object:
    """An object that is being loaded."""

    def __init__(self, archive: Archive, member: str, whole: str | None, asker: _Object | None) -> None:
        self.archive, self.member, self.asker = archive, member, asker
        """Where it is, and the object for which it is loaded."""
        self.key: _Key = (archive.identity, member)
        self.name = f"{archive.archive}/{member}" if member else archive.archive
        self.needs: list[_Object | Linked | str] = []
        """What it needs, in its order: what is being loaded, what is loaded, and what others have to find."""
        self.held: list[Linked] = []
        """What of that was loaded for it."""
        self.is_waiting = False
        """It was not linked, and is to be linked together with one that needs it."""
        self.refusal = ""
        """What the dynamic linker said when it was to be linked without those that need it."""
        self.linked: Linked | None = None
        self._hidden = False
        try:
            self.source, self._crc = archive.source(member)
            self.native = _native.Library(self.source, self.name, WINDOW_BYTES, whole, self._crc)
        except (Malformed, PageError) as error:
            raise type(error)(f"{self.name}: {error}") from None
        self.soname, self.needed, rpath, self._runpath = self.native.linkage()
        self._rpath = rpath if self._runpath is None else None

    def folders(self) -> Iterator[str]:
        """List the folders of the archive in which to look for the libraries that this object needs."""
        if self._runpath is not None:
            yield from _folders(self.member, self._runpath)
            return
        # DT_RPATH, unlike DT_RUNPATH, holds for what is needed by what is needed.
        this: _Object | None = self
        while this:
            yield from _folders(this.member, this._rpath or "")
            this = this.asker

    def together(self) -> list[_Object] | None:
        """List what is to be linked together with this object, which comes first: what waits for it.

        The order is that in which the dynamic linker loads: breadth first.

        Returns:
            None if some of that needs an object whose other needs are not known yet.
        """
        found = {self: None}
        queue = [self]
        for this in queue:
            for need in this.needs:
                if not isinstance(need, _Object) or need.linked or need in found:
                    continue
                if not need.is_waiting:
                    return None
                found[need] = None
                queue.append(need)
        return queue

    def prepare_for_group(self, whole: str | None) -> None:
        """Have its constructors hidden from the dynamic linker, and all of it there if there is a reason."""
        reason = self.native.share()[0]
        if self._hidden or not (reason or whole):
            return
        self.native.close()
        try:
            self.native = _native.Library(
                self.source, self.name, WINDOW_BYTES, reason or whole, self._crc, hide=True
            )
        except (Malformed, PageError) as error:
            raise type(error)(f"{self.name}: {error}") from None
        self._hidden = True

    def finish(self, group: list[_Object]) -> Linked:
        """Note that it is loaded, together with others; these do not hold each other."""
        for need in self.needs:
            # It waited, and was linked for another that needs it, too.
            if isinstance(need, _Object) and need.linked and need not in group:
                self.held.append(need.linked._retain())
        self.linked = _objects[self.key] = Linked(self.name, self.native, self.source, self.held)
        return self.linked

    def abandon(self) -> None:
        """Give back what was done for it, if it is not loaded."""
        self.needs.clear()
        if self.linked is None:
            self.native.close()
            for linked in self.held:
                linked.release()

    def wanted(self) -> str:
        """Say in a message for what it was loaded."""
        return f", which {self.asker.name} needs," if self.asker else ":"


def _folders(member: str, search: str) -> Iterator[str]:
    """List the folders of a search path that are in the archive."""
    for entry in search.split(":"):
        for origin in ("$ORIGIN", "${ORIGIN}"):
            if entry == origin or entry.startswith(f"{origin}/"):
                below = f".{entry.removeprefix(origin)}"
                folder = posixpath.normpath(posixpath.join(posixpath.dirname(member), below))
                if folder.partition("/")[0] != "..":
                    yield "" if folder == "." else folder


class _Loading:
    """What is loaded by one call of ``link``.

    Each object is linked when what it needs is, and alone, so that the next one finds it. One that needs what
    it is loaded for waits for that. So does one that the dynamic linker refuses: it may count on what is
    loaded for those that need it. What waits is linked together with the first object that needs it and
    does not have to wait itself.
    """

    def __init__(self, whole: str | None) -> None:
        self._whole = whole
        self._objects: dict[_Key, _Object] = {}

    def abandon(self) -> None:
        """Give back what was done for objects that are not loaded."""
        for this in self._objects.values():
            this.abandon()

    def load(self, archive: Archive, member: str, mode: int, asker: _Object | None) -> Linked | _Object:
        """Load an object. Returns it, with a reference for the caller, or as being loaded, if it waits."""
        key = archive.identity, member
        linked = _objects.get(key)
        if linked is not None:
            linked.native.open(mode)
            return linked._retain()
        this = self._objects.get(key)
        if this is None:
            this = self._objects[key] = _Object(archive, member, self._whole, asker)
            try:
                self._load_needed(this)
            except OSError as error:
                if isinstance(error, LinkError):
                    raise
                raise _refusal([this], str(error)) from error
            self._link(this, mode)
        return this.linked._retain() if this.linked else this

    def _load_needed(self, this: _Object) -> None:
        folders = [*this.folders()]
        for library in this.needed:
            need = None if "/" in library else self._load_library(this, library, folders)
            this.needs.append(library if need is None else need)
            if isinstance(need, Linked):
                this.held.append(need)

    def _load_library(self, this: _Object, library: str, folders: list[str]) -> Linked | _Object | None:
        """Load one that an object needs. Returns None if the dynamic linker is to find it."""
        found = this.archive.find([posixpath.join(folder, library) for folder in folders])
        if found is None:
            return None
        where, place = found
        key = where.identity, place
        # The dynamic linker, too, takes what is loaded before it looks into folders.
        if key == this.key or (key not in _objects and _native.is_loaded(library)):
            return None
        name = f"{where.archive}/{place}"
        try:
            need = self.load(where, place, os.RTLD_NOW | os.RTLD_LOCAL, this)
        except QuireError as error:
            raise LinkError(name, f", which {this.name} needs, cannot be loaded: {error}") from error
        if _native.is_loaded(library) if isinstance(need, Linked) else need.soname == library:
            return need
        if isinstance(need, Linked):
            need.release()
        raise LinkError(
            name,
            f" does not call itself {library} (DT_SONAME), as {this.member} calls it; "
            "without a file on disk nothing else tells the dynamic linker that it is the same",
        )

    def _link(self, this: _Object, mode: int) -> None:
        """Have an object linked, with those that wait for it; or let it wait."""
        group = this.together()
        if group is not None:
            try:
                _open(group, mode)
            except OSError as error:
                # Failures of the kernel have a number.
                if this.asker is None or error.errno is not None:
                    raise _refusal(group, str(error)) from error
                this.refusal = str(error)
            else:
                return
        this.is_waiting = True


def _open(group: list[_Object], mode: int) -> None:
    """Have objects linked in one step, the first as the mode says. They are loaded then, or OSError."""
    if len(group) == 1:
        group[0].native.open(mode)
        group[0].finish(group)
        return
    resolving = next((this.name for this in group if this.native.has_resolvers), None)
    for this in group:
        this.prepare_for_group(
            # Their code may be called while the group is linked, before anything could be filled.
            resolving and f"it is linked together with {resolving}, which has indirect functions (IFUNC)"
        )
    natives = [this.native for this in group]
    native = _native.Group(natives, _names(group), _constructor_order(group), mode)
    try:
        if group[0].asker is None:
            natives[0].open(mode)
    except BaseException:
        native.close()
        raise
    together: list[Linked] = []
    for this in group:
        linked = this.finish(group)
        linked._group, linked._together = native, together
        together.append(linked)


def _names(group: list[_Object]) -> list[str]:
    """Name what is in a group, and what its members need besides, in the order of looking symbols up."""
    names: dict[str, None] = {group[0].native.path: None}
    for this in group:
        for need in this.needs:
            if isinstance(need, str):
                # What is not loaded yet comes behind, as what is needed by what is needed.
                if _native.is_loaded(need):
                    names[need] = None
            else:
                path = need.path if isinstance(need, Linked) else need.native.path
                names[path] = None
    return [*names]


def _constructor_order(group: list[_Object]) -> list[int]:
    """Order a group as glibc's dynamic linker, since version 2.35, orders constructors: places in the group.

    Depth first, from the last object on. What the program asked for comes last in any case.
    """
    order: dict[_Object, None] = {}
    first = [] if group[0].asker else [group[0]]
    seen: set[_Object] = {*first}
    for this in reversed(group):
        _visit(this, seen, order)
    return [group.index(this) for this in [*order, *first]]


def _visit(this: _Object, seen: set[_Object], order: dict[_Object, None]) -> None:
    if this in seen:
        return
    seen.add(this)
    for need in this.needs:
        if isinstance(need, _Object) and need.linked is None:
            _visit(need, seen, order)
    order[this] = None


def _refusal(group: list[_Object], text: str) -> LinkError:
    """Say why a group cannot be loaded: of the member that the text names, or that was refused so before."""
    culprit = next((this for this in reversed(group) if this.refusal == text), group[0])
    for this in group:
        for end in ":)":
            path = f"{this.native.path}{end}"
            if path in text:
                culprit = this
                text = text.replace(path, f"{this.name}{end}")
    return LinkError(culprit.name, f"{culprit.wanted()} cannot be loaded: {text}")
