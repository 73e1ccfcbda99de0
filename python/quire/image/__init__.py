"""Program files: what is in them, how each becomes an address space, and what runs them.

``read`` describes a file; its ``load_plan()`` lists what a loader does with it. See ``docs/images.md``.
"""

from quire.image.loading import Library, load
from quire.image.model import Eagerness, Image, Relocation, Section, Segment, Slot, Symbol, Version
from quire.image.operations import MapFlags, Operation, Protection
from quire.image.reading import read
from quire.image.running import exec, spawn  # noqa: A004
from quire.image.verdict import Verdict, why
from quire.linking import LibraryStats

__all__ = [
    "Eagerness",
    "Image",
    "Library",
    "LibraryStats",
    "MapFlags",
    "Operation",
    "Protection",
    "Relocation",
    "Section",
    "Segment",
    "Slot",
    "Symbol",
    "Verdict",
    "Version",
    "exec",
    "load",
    "read",
    "spawn",
    "why",
]
