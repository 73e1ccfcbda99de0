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

__all__ = ["disable", "enable"]


def enable() -> None:
    """Let ``sys.path`` have wheels: zip files with a ``*.dist-info/WHEEL``, whatever they are called.

    Idempotent. The finders of all entries of ``sys.path`` are forgotten, and made again when they are needed.
    Processes that are spawned call it for themselves; forked ones inherit it.
    """
    from quire.wheels.importer import WheelImporter

    if WheelImporter not in sys.path_hooks:
        # Before the hook of zipimport, which takes any zip file.
        sys.path_hooks.insert(0, WheelImporter)
        sys.path_importer_cache.clear()


def disable() -> None:
    """Undo ``enable``: what has been imported stays; extension modules of wheels are not found any more.

    Idempotent.
    """
    from quire.wheels import archive, importer

    if importer.WheelImporter in sys.path_hooks:
        sys.path_hooks.remove(importer.WheelImporter)
        sys.path_importer_cache.clear()
        archive.forget()
