"""Paths that lead into wheels, answered by the functions with which Python code opens and looks for files.

A package that opens a file beside its modules, ``open(os.path.join(os.path.dirname(__file__), "x"))``,
names a path that goes on behind an archive. The kernel refuses it with ENOTDIR, whatever is asked. So the
functions in `_REPLACED` are replaced by ones that first do as ever and then, if that failed and the path
leads into a wheel, answer from the wheel: what is opened is extracted to memory, one file alone, and
freed when it is closed. Writing is refused as before.

Code in C that opens a path by itself gets the kernel's error, which has the path; `as_file` is for that.
"""

from __future__ import annotations

import _io
import builtins
import contextlib
import ctypes
import errno
import fcntl
import functools
import io
import os
import posixpath
import stat
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from quire.wheels.archive import UNREADABLE, opened
from quire.wheels.objects import load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quire.wheels.archive import Wheel

__all__ = ["as_file", "install", "uninstall"]

_FILE_MODE = stat.S_IFREG | 0o444
_FOLDER_MODE = stat.S_IFDIR | 0o555
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_os_stat = os.stat
_os_open = os.open


class _Place(NamedTuple):
    """A path in a wheel; the member need not exist."""

    wheel: Wheel
    member: str
    path: Any

    def is_file(self) -> bool:
        return self.member in self.wheel.members

    def is_folder(self) -> bool:
        return not self.member or self.member in self.wheel.folders

    def refuse(self, code: int) -> NoReturn:
        raise OSError(code, os.strerror(code), self.path)

    def open(self) -> int:
        """Extract the file to memory and give a descriptor for reading, which is the caller's."""
        if not self.is_file():
            self.refuse(errno.EISDIR if self.is_folder() else errno.ENOENT)
        fd = os.memfd_create(
            os.fsdecode(os.fsencode(self.member)[-200:]), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        )
        try:
            with _open.original(fd, "wb", closefd=False) as file:
                for chunk in self.wheel.chunks(self.member):
                    file.write(chunk)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            # The other one is open for writing, which its seals refuse.
            return _os_open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except UNREADABLE as error:
            text = f"cannot be read from the wheel: {error}"
            raise OSError(errno.EIO, text, self.path) from error
        finally:
            os.close(fd)

    def stat(self) -> os.stat_result:
        """Say what an unpacked wheel would have, readable by all."""
        device, inode, _, mtime_ns = self.wheel.identity
        if self.is_file():
            info = self.wheel.members[self.member]
            # Times in archives have no zone, and may be none at all.
            moment = (*info.date_time, 0, 0, -1)
            try:
                seconds = int(time.mktime(moment))
            except (OverflowError, ValueError):
                seconds = mtime_ns // 10**9
            mode, size = _FILE_MODE, info.file_size
        elif self.is_folder():
            mode, size, seconds = _FOLDER_MODE, 0, mtime_ns // 10**9
        else:
            self.refuse(errno.ENOENT)
        # Files are the same if these two are: os.path.samefile.
        number = inode << 32 ^ hash(self.member) & 0xFFFFFFFF
        more: dict[str, Any] = {f"st_{which}time_ns": seconds * 10**9 for which in "amc"}
        more |= {f"st_{which}time": float(seconds) for which in "amc"}
        numbers = (mode, number, device, 1, os.geteuid(), os.getegid(), size, seconds, seconds, seconds)
        return os.stat_result(numbers, more | {"st_blksize": 4096, "st_blocks": -(-size // 512)})

    def names(self) -> list[str]:
        """List what is in a folder."""
        if not self.is_folder():
            self.refuse(errno.ENOTDIR if self.is_file() else errno.ENOENT)
        prefix = self.member and f"{self.member}/"
        below = (*self.wheel.members, *self.wheel.folders)
        return sorted(
            {name.removeprefix(prefix).partition("/")[0] for name in below if name.startswith(prefix)}
        )


def _located(path: Any) -> _Place | None:
    """Find the wheel that a path leads into, by any of the archive's names; None if there is none."""
    try:
        text = posixpath.normpath(os.path.join(os.getcwd(), os.fsdecode(path)))
    except (TypeError, ValueError, OSError):
        # A descriptor, or something that is no path: what failed has said so.
        return None
    archive, member = text, ""
    while len(archive) > 1:
        try:
            status = _os_stat(archive)
        except OSError:
            archive, _, base = archive.rpartition("/")
            member = f"{base}/{member}" if member else base
            continue
        known = {wheel.identity[:2]: wheel for wheel in opened()}
        wheel = known.get((status.st_dev, status.st_ino))
        return _Place(wheel, member, path) if wheel is not None and member else None
    return None


class _Redirected:
    """A function of the standard library that knows wheels.

    No function, so that it stays what it is as an attribute of a class, as the built-in one does.
    """

    def __init__(self, home: Any, name: str, answer: Callable[..., Any]) -> None:
        self.original = getattr(home, name)
        self._name = home.__name__, name
        self._answer = answer
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **more: Any) -> Any:
        try:
            return self.original(*args, **more)
        except NotADirectoryError:
            path = args[0] if args else more.get("path", more.get("file"))
            place = _located(path) if "dir_fd" not in more else None
            if place is None:
                raise
            try:
                return self._answer(place, *args[1:], **more)
            except _NotAnswered:
                pass
            raise

    def __reduce__(self) -> tuple[Callable[[str, str], Any], tuple[str, str]]:
        return _named, self._name

    def __repr__(self) -> str:
        return repr(self.original)


class _NotAnswered(Exception):  # noqa: N818 - never leaves this module
    """The original's error stands."""


def _named(home: str, name: str) -> Any:
    return getattr(import_module(home), name)


def _open_answer(place: _Place, mode: str = "r", *args: Any, **more: Any) -> Any:
    more.pop("file", None)
    if set(mode) & set("wax+") or more.get("opener") is not None or len(args) > 5:
        raise _NotAnswered
    return _open.original(place.path, mode, *args, **(more | {"opener": lambda _path, _flags: place.open()}))


def _open_code_answer(place: _Place, **_: Any) -> Any:
    return _open_answer(place, "rb")


def _os_open_answer(place: _Place, flags: int, mode: int = 0o777, **_: Any) -> int:
    del mode
    if flags & (os.O_ACCMODE | os.O_CREAT | os.O_TRUNC):
        raise _NotAnswered
    if flags & os.O_DIRECTORY or place.is_folder():
        raise _NotAnswered
    return place.open()


def _stat_answer(place: _Place, **_: Any) -> os.stat_result:
    return place.stat()


def _listdir_answer(place: _Place, **_: Any) -> list[Any]:
    names = place.names()
    return [os.fsencode(name) for name in names] if isinstance(place.path, bytes) else names


class _Listed:
    """What `os.scandir` gives for a file or folder."""

    def __init__(self, place: _Place, name: Any, path: Any) -> None:
        self.name = name
        self.path = path
        self._place = place

    def __fspath__(self) -> Any:
        return self.path

    def inode(self) -> int:
        return self._place.stat().st_ino

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        del follow_symlinks
        return self._place.stat()

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        del follow_symlinks
        return self._place.is_folder()

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        del follow_symlinks
        return self._place.is_file()

    def is_symlink(self) -> bool:
        return False

    def is_junction(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"


class _Scan:
    """What `os.scandir` gives for a folder."""

    def __init__(self, place: _Place) -> None:
        self._entries = (self._entry(place, name) for name in place.names())

    @staticmethod
    def _entry(place: _Place, name: str) -> _Listed:
        member = posixpath.join(place.member, name)
        base: Any = os.fsencode(name) if isinstance(place.path, bytes) else name
        path = os.path.join(os.fspath(place.path), base)
        return _Listed(_Place(place.wheel, member, path), base, path)

    def __iter__(self) -> _Scan:
        return self

    def __next__(self) -> _Listed:
        return next(self._entries)

    def __enter__(self) -> _Scan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._entries.close()


def _scandir_answer(place: _Place, **_: Any) -> _Scan:
    return _Scan(place)


def _listxattr_answer(place: _Place, **_: Any) -> list[str]:
    place.stat()
    return []


_open = _Redirected(io, "open", _open_answer)
_open_code = _Redirected(io, "open_code", _open_code_answer)
_REPLACED: list[tuple[Any, str, Any]] = [
    (builtins, "open", _open),
    (io, "open", _open),
    (io, "open_code", _open_code),
    # Where the standard loaders look for it.
    (_io, "open_code", _open_code),
    (os, "open", _Redirected(os, "open", _os_open_answer)),
    (os, "stat", _Redirected(os, "stat", _stat_answer)),
    (os, "lstat", _Redirected(os, "lstat", _stat_answer)),
    (os, "listdir", _Redirected(os, "listdir", _listdir_answer)),
    (os, "scandir", _Redirected(os, "scandir", _scandir_answer)),
    (os, "listxattr", _Redirected(os, "listxattr", _listxattr_answer)),
]
"""Where, under which name, and by what."""

_access = os.access
_load = ctypes.CDLL.__init__


@functools.wraps(_access)
def _access_too(path: Any, mode: int, **more: Any) -> bool:
    if _access(path, mode, **more):
        return True
    place = None if more.get("dir_fd") is not None else _located(path)
    return place is not None and (place.is_file() or place.is_folder()) and not mode & os.W_OK


@functools.wraps(_load)
def _load_too(self: ctypes.CDLL, name: Any, *args: Any, **more: Any) -> None:
    try:
        _load(self, name, *args, **more)
    except OSError:
        place = None if name is None else _located(name)
        if place is None or not place.is_file():
            raise
        try:
            _load(self, load(place.wheel, place.member, None, os.RTLD_NOW), *args, **more)
        except ImportError as error:
            # What is needed is missing, or damaged; ctypes has one exception for it.
            raise OSError(str(error)) from error
        self._name = name


_REPLACED += [(os, "access", _access_too), (ctypes.CDLL, "__init__", _load_too)]
_ORIGINALS = [(home, name, getattr(home, name)) for home, name, _ in _REPLACED]


def install() -> None:
    """Let paths lead into wheels. Idempotent."""
    for home, name, replacement in _REPLACED:
        setattr(home, name, replacement)
    # What these say they support is looked up by the function itself.
    for known in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        known.update(mine for _, _, mine in _REPLACED if mine.__wrapped__ in known)
    _swap_in_tokenize(_open.original, _open)


def _swap_in_tokenize(old: Any, new: Any) -> None:
    """Replace the ``open`` that tokenize took by name, if it was imported: linecache reads source with it."""
    tokenize: Any = sys.modules.get("tokenize")
    if tokenize is not None and getattr(tokenize, "_builtin_open", None) is old:
        tokenize._builtin_open = new


def uninstall() -> None:
    """Undo ``install``; what somebody else replaced since stays. Idempotent."""
    _swap_in_tokenize(_open, _open.original)
    for (home, name, replacement), (_, _, original) in zip(_REPLACED, _ORIGINALS, strict=True):
        if getattr(home, name) is replacement:
            setattr(home, name, original)


@contextlib.contextmanager
def as_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """See `quire.wheels.as_file`."""
    place = _located(path)
    if place is None:
        yield os.fspath(path)
        return
    fd = place.open()
    try:
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        os.close(fd)
