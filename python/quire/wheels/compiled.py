"""Compiled Python code of wheels, kept in the user's cache folder.

Wheels have sources only, and compiling them takes most of the time of an import. What was compiled is kept
in ``$XDG_CACHE_HOME/quire/code`` (``~/.cache/quire/code``): a folder for each wheel's path and interpreter, a
file for each module. ``QUIRE_CODE_CACHE`` names another folder, or is ``off``. ``docs/wheels.md`` has the
format.
"""

from __future__ import annotations

import _imp
import contextlib
import marshal
import os
import stat
import struct
import sys
import zlib
from importlib.util import MAGIC_NUMBER
from typing import TYPE_CHECKING

from quire import _native
from quire.sources import cache_directory

if TYPE_CHECKING:
    from types import CodeType

    from quire.wheels.archive import Wheel

__all__ = ["VARIABLE", "code_of"]

VARIABLE = "QUIRE_CODE_CACHE"
"""Environment variable: a folder for compiled code, or ``off``."""

_MAGIC = b"quire\0\1\0"
# Magic, the interpreter's magic number, size and mtime of the wheel, CRC-32 and size of the source, CRC-32 of
# the code, which follows.
_HEADER = struct.Struct("<8s4sQQIII")


class _Cache:
    """The folder, made and checked when it is first needed."""

    def __init__(self) -> None:
        self._root: str | None = None
        self._known = False
        self._folders: dict[str, str] = {}

    def root(self) -> str | None:
        """Give the folder of this user's compiled code; None if there is none to trust or to write to."""
        if not self._known:
            self._known = True
            self._root = self._made()
        return self._root

    def give_up(self) -> None:
        """Use the cache no more in this process."""
        self._known = True
        self._root = None

    @staticmethod
    def _made() -> str | None:
        root = os.environ.get(VARIABLE, "")
        if root == "off":
            return None
        if not root:
            base = cache_directory()
            if base is None:
                return None
            root = os.path.join(base, "code")
        if not os.path.isabs(root):
            return None
        try:
            # The folder above, too: checkpoints are kept there if nobody else may enter it. The mode given is
            # for the last folder only.
            os.makedirs(os.path.dirname(root), mode=0o700, exist_ok=True)
            os.makedirs(root, mode=0o700, exist_ok=True)
            status = os.lstat(root)
        except OSError:
            return None
        # Whoever can write here can have code run by this user.
        private = status.st_uid == os.geteuid() and not status.st_mode & 0o077
        return root if stat.S_ISDIR(status.st_mode) and private else None

    def place(self, wheel: Wheel, member: str) -> str | None:
        """Give the file of a member's code; None without a cache."""
        root = self.root()
        if root is None:
            return None
        folder = self._folders.get(wheel.archive)
        if folder is None:
            key = f"{sys.implementation.cache_tag}\0{sys.flags.optimize}\0{wheel.archive}"
            name = _native.digest(os.fsencode(key)).hex()
            folder = self._folders[wheel.archive] = os.path.join(root, name)
        return os.path.join(folder, f"{member.replace('/', '.')}c")


_cache = _Cache()


def code_of(wheel: Wheel, member: str) -> CodeType:
    """Give the code of a module's source.

    Args:
        wheel: The wheel.
        member: Name of a source file in it. The path in the code is the wheel's with this behind it.

    Raises:
        SyntaxError: The source is none.
        Exception: One of `archive.UNREADABLE`: the member cannot be read.
    """
    path = f"{wheel.archive}/{member}"
    info = wheel.members[member]
    place = _cache.place(wheel, member)
    _, _, size, mtime_ns = wheel.identity
    key = (_MAGIC, MAGIC_NUMBER, size, mtime_ns & (1 << 64) - 1, info.CRC, info.file_size)
    if place is not None:
        code = _kept(place, key)
        if code is not None:
            if code.co_filename != path:
                # As the standard loaders do it, for compiled code that was moved.
                _imp._fix_co_filename(code, path)  # type: ignore[attr-defined]
            return code
    code = compile(wheel.read(member), path, "exec", dont_inherit=True)
    if place is not None and not sys.dont_write_bytecode:
        _keep(place, key, marshal.dumps(code))
    return code


def _kept(place: str, key: tuple[bytes, bytes, int, int, int, int]) -> CodeType | None:
    """Read code that was kept; None if there is none, of another source or interpreter, or damaged."""
    try:
        with open(place, "rb", buffering=0) as file:
            data = file.read()
    except OSError:
        return None
    if len(data) < _HEADER.size:
        return None
    *found, crc = _HEADER.unpack_from(data)
    body = memoryview(data)[_HEADER.size :]
    if tuple(found) != key or zlib.crc32(body) != crc:
        return None
    # The folder is this user's, and nobody else can write to it.
    code: CodeType = marshal.loads(body)  # noqa: S302
    return code


def _keep(place: str, key: tuple[bytes, bytes, int, int, int, int], body: bytes) -> None:
    """Write code to its file, whole or not at all. A folder that cannot be written ends the cache's use."""
    draft = f"{place}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(_HEADER.pack(*key, zlib.crc32(body)) + body)
            os.rename(draft, place)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
    except FileExistsError:
        # Another thread's, or left by a process of this number that was killed: the next has another number.
        return
    except OSError:
        _cache.give_up()
