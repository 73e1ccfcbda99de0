"""One VMA of a real process: all that ``/proc`` tells of it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from quire.process.kinds import Kind

__all__ = ["VMA"]

_DELETED = b" (deleted)"


class VMA(NamedTuple):
    """One mapped range of a process with one protection, as it was when it was read.

    Attributes:
        start: The first address.
        end: The address after the last one.
        protection: Four characters: ``r``, ``w``, ``x`` or ``-`` each, then ``p`` private or ``s`` shared.
        offset: Where in the file ``start`` lies, in bytes.
        major: Of the number of the file's device.
        minor: Of the number of the file's device.
        inode: The file's number; 0 if there is none.
        name: What the kernel calls it, byte for byte: a path, ``[heap]``, ``[anon:…]``, nothing. It ends in
            `` (deleted)`` if the file has lost its name.
        keys: Names of the figures of ``smaps``, in the kernel's order; empty where only ``maps`` was read.
        figures: The figures, sizes in bytes, packed as native-endian numbers of 64 bits; `counters` and
            `counter` give them as integers.
        texts: Lines of ``smaps`` that are no figures, as pairs of name and text: ``VmFlags``, and what later
            kernels may add.
        kind: What it is for.
    """

    start: int
    end: int
    protection: str
    offset: int
    major: int
    minor: int
    inode: int
    name: bytes
    keys: tuple[str, ...]
    figures: bytes
    texts: tuple[tuple[str, bytes], ...]
    kind: Kind

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def device(self) -> int:
        """The file's device as ``os.stat`` has it in ``st_dev``."""
        return os.makedev(self.major, self.minor)

    @property
    def is_private(self) -> bool:
        """Whether stores stay in this process."""
        return self.protection[3] == "p"

    @property
    def is_deleted(self) -> bool:
        """Whether the file has lost its name. One that is really called ``… (deleted)`` looks the same."""
        return bool(self.inode) and self.name.endswith(_DELETED)

    @property
    def path(self) -> str | None:
        """The file's path as Python's functions take it, without `` (deleted)``; None if this is no file.

        In the process's own view of files: another root folder or mount makes it mean another file here.
        """
        if not self.name.startswith(b"/"):
            return None
        return os.fsdecode(self.name.removesuffix(_DELETED) if self.is_deleted else self.name)

    @property
    def label(self) -> str:
        """The name for people: printable, with what is not shown as escapes; empty if there is none."""
        text = self.name.decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    @property
    def counters(self) -> dict[str, int]:
        """All figures of ``smaps`` by the kernel's names (``Rss``, ``Pss``…), sizes in bytes."""
        return dict(zip(self.keys, memoryview(self.figures).cast("Q"), strict=True))

    @property
    def flags(self) -> tuple[str, ...]:
        """``VmFlags``: two letters each, as in proc_pid_smaps(5); empty where ``smaps`` was not read."""
        return tuple(dict(self.texts).get("VmFlags", b"").decode("ascii", "backslashreplace").split())

    def counter(self, key: str) -> int | None:
        """Return one figure of ``smaps`` by the kernel's name; None if it was not told."""
        try:
            at = 8 * self.keys.index(key)
        except ValueError:
            return None
        return int.from_bytes(self.figures[at : at + 8], sys.byteorder)

    @property
    def resident(self) -> int | None:
        """Bytes in memory; None where ``smaps`` was not read, as for all figures below."""
        return self.counter("Rss")

    @property
    def proportional(self) -> int | None:
        """Bytes in memory, each page divided by how often it is mapped."""
        return self.counter("Pss")

    @property
    def unique(self) -> int | None:
        """Bytes in pages that nothing else maps: what would be free if the process ended."""
        clean, dirty = self.counter("Private_Clean"), self.counter("Private_Dirty")
        return None if clean is None or dirty is None else clean + dirty

    @property
    def dirty(self) -> int | None:
        """Bytes in pages that were written since they were read from or saved to the file."""
        shared, private = self.counter("Shared_Dirty"), self.counter("Private_Dirty")
        return None if shared is None or private is None else shared + private

    @property
    def referenced(self) -> int | None:
        """Bytes in pages marked as used."""
        return self.counter("Referenced")

    @property
    def anonymous(self) -> int | None:
        """Bytes in pages that belong to no file; of a private mapping of a file, those that were written."""
        return self.counter("Anonymous")

    @property
    def lazyfree(self) -> int | None:
        """Bytes that the kernel may take (``MADV_FREE``)."""
        return self.counter("LazyFree")

    @property
    def swapped(self) -> int | None:
        """Bytes in swap space."""
        return self.counter("Swap")

    @property
    def proportional_swapped(self) -> int | None:
        """Bytes in swap space, each page divided by how often it is mapped."""
        return self.counter("SwapPss")

    @property
    def huge(self) -> int | None:
        """Bytes in huge pages of any sort."""
        names = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Shared_Hugetlb", "Private_Hugetlb")
        sizes = [size for name in names if (size := self.counter(name)) is not None]
        return sum(sizes) if sizes else None

    @property
    def locked(self) -> int | None:
        """Bytes locked in memory."""
        return self.counter("Locked")

    @property
    def is_accessible(self) -> bool:
        """Whether the program may touch it in any way."""
        return self.protection[:3] != "---"

    @property
    def committed(self) -> int:
        """Bytes that the program may touch: all of it, or nothing under ``PROT_NONE``."""
        return self.size if self.is_accessible else 0

    @property
    def charged(self) -> int | None:
        """Bytes that count against the system's commit limit; None where ``VmFlags`` were not read."""
        flags = self.flags
        return (self.size if "ac" in flags else 0) if flags else None

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain numbers, strings, lists and dicts, for JSON."""
        return {
            "start": self.start,
            "end": self.end,
            "protection": self.protection,
            "offset": self.offset,
            "device": [self.major, self.minor],
            "inode": self.inode,
            "name": os.fsdecode(self.name).encode("utf-8", "backslashreplace").decode(),
            "kind": str(self.kind),
            "flags": list(self.flags),
            "counters": self.counters,
        }

    def __str__(self) -> str:
        """Show it as a line of ``maps``."""
        where = f"{self.start:08x}-{self.end:08x} {self.protection} {self.offset:08x}"
        head = f"{where} {self.major:02x}:{self.minor:02x} {self.inode}"
        return f"{head:<72} {self.label}".rstrip()
