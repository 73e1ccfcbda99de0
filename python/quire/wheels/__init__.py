"""Wheels on ``sys.path``, extension modules included, with nothing unpacked to disk.

::

    import sys
    import quire.wheels

    quire.wheels.enable()
    sys.path.insert(0, "numpy-2.4.6-cp311-cp311-manylinux_2_28_x86_64.whl")
    import numpy

What is pure Python is left to the standard `zipimport`. A shared object is copied whole to a sealed memfd,
after those that it needs and that the wheel has, and loaded from there. ``docs/wheels.md`` tells what works
and what does not.
"""

# What enable() needs takes longer to import than all of quire; importing this module should not.
# ruff: noqa: PLC0415

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from os import PathLike

__all__ = ["Entry", "as_file", "disable", "enable"]


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
