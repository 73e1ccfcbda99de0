"""Files that hold programs, or name one: fat files and scripts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from quire.image import script
from quire.image.model import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.image.model import Format
    from quire.sources import Source

__all__ = ["FatImage", "ScriptImage"]


class FatImage(Image):
    """A file that has the same program for several machines: FatELF, or a universal file of macOS.

    What it is for, and what is in it, its ``members`` say; it has no tables of its own.
    """

    kind = "archive"
    entry = None

    def __init__(
        self, file_format: Format, source: Source, name: str, size: int, members: Sequence[Image]
    ) -> None:
        """Take the members, which have been read."""
        self.format = file_format
        self._source, self.name, self.offset, self.size = source, name, 0, size
        self.members = tuple(members)
        self.machine = "+".join(dict.fromkeys(member.machine for member in members))
        self.bits = max(member.bits for member in members)
        self.byte_order = members[0].byte_order


class ScriptImage(Image):
    """A text that names the program to be started for it.

    Attributes:
        script: What the line says.
    """

    format = "script"
    kind = "executable"
    machine = ""
    bits = 0
    byte_order = "little"
    entry = None

    def __init__(self, source: Source, name: str, size: int) -> None:
        """Read the line.

        Raises:
            Malformed: The kernel would refuse it.
        """
        self._source, self.name, self.offset, self.size = source, name, 0, size
        self.script = script.parse(source.read(0, min(script.HEAD_BYTES, size)), name)

    @property
    def interpreter(self) -> str:
        """The path in the line."""
        return os.fsdecode(self.script.interpreter)
