"""Wheels on ``sys.path``, extension modules included, with nothing unpacked to disk.

::

    import sys
    import quire.wheels

    quire.wheels.enable()
    sys.path.insert(0, "numpy-2.4.6-cp311-cp311-manylinux_2_28_x86_64.whl")
    import numpy

A shared object is laid out in a memory file, after those that it needs and that the wheel has, and linked
from there; its code is decompressed when it is first touched. ``docs/wheels.md`` tells what works and what
does not.
"""

# What enable() needs takes longer to import than all of quire; importing this module should not.
# ruff: noqa: PLC0415

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.linking import LibraryStats

__all__ = ["Entry", "as_file", "disable", "enable", "stats"]


def enable(*, paths: bool = True) -> None:
    """Let ``sys.path`` have wheels: zip files with a ``*.dist-info/WHEEL``, whatever they are called.

    Idempotent. The finders of all entries of ``sys.path`` are forgotten, and made again when they are needed.

    Args:
        paths: Let paths lead into wheels, too, for code that opens files beside its modules: ``open`` and
            functions of `os` and `ctypes` are replaced. ``docs/wheels.md`` has the list.

    Processes that are spawned call it for themselves, unless the path has an `Entry`; forked ones inherit it.
    """
    from quire.wheels.importer import WheelImporter

    if WheelImporter not in sys.path_hooks:
        # Before the hook of zipimport, which takes any zip file.
        sys.path_hooks.insert(0, WheelImporter)
        sys.path_importer_cache.clear()
    if paths:
        from quire.wheels.paths import install

        install()


def disable() -> None:
    """Undo ``enable``: what has been imported stays; extension modules of wheels are not found any more.

    Idempotent.
    """
    from quire.wheels import archive, importer, paths

    paths.uninstall()
    if importer.WheelImporter in sys.path_hooks:
        sys.path_hooks.remove(importer.WheelImporter)
        sys.path_importer_cache.clear()
        archive.forget()


class Entry(str):
    """A path for ``sys.path`` that takes ``enable`` along to processes that are spawned.

    multiprocessing sends ``sys.path`` to the processes that it starts, and so do the engines built on it.
    There these entries call ``enable`` when they arrive, before the main module is imported. quire must be
    installed where the new process finds it.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[str], "Entry"], tuple[str]]:
        return _arrived, (str(self),)


def _arrived(path: str) -> Entry:
    enable()
    return Entry(path)


def as_file(path: str | PathLike[str]) -> AbstractContextManager[str]:
    """Give a real path for a file of a wheel, for code that is not in Python, for use in a ``with`` block.

    The file is extracted to sealed memory. The path is under ``/proc``, has no suffix, and is good for this
    process and for others of this user, as long as this one lives and the block lasts. A path that leads into
    no wheel is given as it is.

    Args:
        path: As it follows from a module's ``__file__``.

    Raises:
        OSError: On entry: there is no such file, or it cannot be read.
    """
    from quire.wheels import paths

    return paths.as_file(path)


def stats() -> "dict[str, LibraryStats]":
    """Tell how much of each shared object that this process loaded from archives is in memory.

    Those of `quire.image.load`, too. Waits while one is loaded.

    Returns:
        By the path of the archive with the member's name behind it, in the order of loading. If two archives
        were at that path one after the other, the later one's.
    """
    from quire.linking import all_linked

    return {each.name: each.stats for each in all_linked()}
