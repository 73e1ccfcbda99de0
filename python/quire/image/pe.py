"""PE files: programs and libraries of Windows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire import _native
from quire.errors import Malformed
from quire.image import pe_plan
from quire.image.model import Image, Relocation, Section, Segment, Slot, Symbol
from quire.image.naming import named
from quire.image.operations import Protection

if TYPE_CHECKING:
    from quire.image.operations import Operation
    from quire.sources import Source

__all__ = ["PeImage", "PeTls"]

_MACHINES = {
    0x14C: "i386",
    0x1C0: "arm",
    0x1C4: "arm",
    0x200: "ia64",
    0x5064: "riscv",
    0x6264: "loongarch",
    0x8664: "x86_64",
    0xA641: "arm64ec",
    0xAA64: "aarch64",
}
_SUBSYSTEMS = {
    1: "native",
    2: "windows",
    3: "console",
    7: "posix",
    9: "windows ce",
    10: "efi application",
    11: "efi boot driver",
    12: "efi runtime driver",
    13: "efi rom",
    14: "xbox",
    16: "boot application",
}
_RELOCATIONS = {
    0: "ABSOLUTE",
    1: "HIGH",
    2: "LOW",
    3: "HIGHLOW",
    4: "HIGHADJ",
    5: "MACHINE_5",
    7: "THUMB_MOV32",
    9: "MACHINE_9",
    10: "DIR64",
}
_FILE_RELOCS_STRIPPED, _FILE_DLL = 0x0001, 0x2000
_DLL_DYNAMIC_BASE = 0x40


@dataclass(frozen=True, slots=True)
class PeTls:
    """What every thread gets a copy of, and what is called for it.

    Attributes:
        address: Of its initial content, before a bias is added.
        size: In bytes.
        zero_fill: How many zeros follow.
        index_address: Where the loader writes the number of this library's slot.
        callbacks: Addresses of the functions that are called when a thread begins and ends.
    """

    address: int
    size: int
    zero_fill: int
    index_address: int
    callbacks: tuple[int, ...]


class PeImage(Image):
    """A PE32 or PE32+ file. Addresses are those at its preferred base.

    Attributes:
        image_base: Where it wants to be.
        image_size: How much address space it takes, in bytes.
        headers_size: How much of the file's beginning is mapped at the base.
        section_align: Sections begin at multiples of it, in memory.
        file_align: And in the file.
        subsystem: ``"console"``, ``"windows"``, ``"efi application"``, …
        characteristics: The bits of the file header.
        dll_characteristics: The bits of the optional header.
        stack_reserve: Size of the first thread's stack, in bytes.
        stack_commit: How much of it is committed at first.
        directories: Address (relative to the base) and size of each data directory.
    """

    format = "pe"
    byte_order = "little"

    def __init__(self, source: Source, name: str, offset: int, size: int) -> None:
        """Read the headers.

        Raises:
            Malformed: They are cut, or not those of a PE file.
            PageError: The source failed.
        """
        self._source, self.name, self.offset, self.size = source, name, offset, size
        with named(name):
            self._native = _native.PeFile(source._native, offset, size)
            first, second, directories = self._native.header()
            sections = self._native.sections()
        is_64, machine, self.characteristics, entry, self.image_base, self.section_align, self.file_align = (
            first
        )
        self.image_size, self.headers_size, subsystem, self.dll_characteristics = second[:4]
        self.stack_reserve, self.stack_commit = second[4:]
        self.directories = tuple(directories)
        self.bits = 64 if is_64 else 32
        self.machine = _MACHINES.get(machine, f"machine-{machine}")
        self.subsystem = _SUBSYSTEMS.get(subsystem, f"{subsystem:#x}")
        self.kind = "shared object" if self.characteristics & _FILE_DLL else "executable"
        self.entry = self.image_base + entry if entry else None
        self._sections = tuple(
            Section(
                section_name.split("\0", 1)[0],
                "",
                self.image_base + address,
                file_offset,
                memory_size or file_size,
                file_size,
                self.section_align,
                flags,
            )
            for section_name, address, memory_size, file_offset, file_size, flags in sections
        )

    @property
    def sections(self) -> tuple[Section, ...]:
        """The section headers; sizes are those in memory, which are not rounded up."""
        return self._sections

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What is mapped: the headers, and every section."""
        headers = Segment(
            "headers", self.image_base, self.headers_size, 0, self.headers_size, Protection.READ, 0, 0
        )
        return (
            headers,
            *(
                Segment(
                    section.name,
                    section.address,
                    section.size,
                    section.offset,
                    min(section.file_size, section.size),
                    pe_plan.protection(section.flags),
                    section.align,
                    section.flags,
                )
                for section in self._sections
            ),
        )

    @property
    def can_be_rebased(self) -> bool:
        """Whether it can be loaded elsewhere than at its base."""
        return not self.characteristics & _FILE_RELOCS_STRIPPED

    @property
    def has_random_base(self) -> bool:
        """Whether it asks to be loaded at a random address (``DYNAMIC_BASE``)."""
        return bool(self.dll_characteristics & _DLL_DYNAMIC_BASE)

    @functools.cached_property
    def _imports(self) -> list[tuple[str, str | None, int, int, bool]]:
        with named(self.name):
            return self._native.imports()

    @property
    def needed(self) -> tuple[str, ...]:
        """The libraries of the import directory, in its order."""
        return tuple(
            dict.fromkeys(library for library, _, _, _, is_delayed in self._imports if not is_delayed)
        )

    @property
    def delayed(self) -> tuple[str, ...]:
        """The libraries that are loaded when a function of theirs is called for the first time."""
        return tuple(dict.fromkeys(library for library, _, _, _, is_delayed in self._imports if is_delayed))

    def imports(self) -> list[Symbol]:
        """List what it needs of other libraries, by name or by ordinal.

        Raises:
            Malformed: The import directory, or what it names, is in no section, or does not end.
        """
        return [slot.symbol for slot in self.slots() if slot.symbol is not None]

    def slots(self) -> list[Slot]:
        """List the words of the import address tables; those of delayed imports are lazy."""
        return [
            Slot(self.image_base + slot, _import(library, name, number), "function", is_delayed)
            for library, name, number, slot, is_delayed in self._imports
        ]

    @functools.cached_property
    def _exports(self) -> list[Symbol]:
        with named(self.name):
            found = self._native.exports()
        return [
            Symbol(
                name or "",
                0 if forward else self.image_base + address,
                0,
                "NOTYPE",
                "GLOBAL",
                "DEFAULT",
                self._section_of(self.image_base + address),
                None,
                None,
                ordinal,
                forward,
            )
            for name, ordinal, address, forward in found
        ]

    def _section_of(self, address: int) -> int:
        for index, section in enumerate(self._sections):
            if section.address <= address < section.address + section.size:
                return index
        return -1

    def exports(self) -> list[Symbol]:
        """List what others can use: those with names, in the order of names, then those with a number alone.

        Raises:
            Malformed: The export directory, or what it names, is in no section.
        """
        return list(self._exports)

    def symbols(self) -> list[Symbol]:
        """List exports and imports: there are no others in a PE file that is of use."""
        return self.exports() + self.imports()

    @functools.cached_property
    def _base_relocations(self) -> list[tuple[int, int]]:
        with named(self.name):
            found = self._native.relocations()
            for index, (address, _) in enumerate(found):
                if address >= self.image_size:
                    raise Malformed(f"base relocation {index}: {address:#x} is outside of the image")
        return found

    def relocations(self) -> list[Relocation]:
        """List the places to which the distance from the preferred base is added.

        Raises:
            Malformed: The directory is in no section or cut, or a place is outside of the image.
        """
        return [
            Relocation(self.image_base + address, _RELOCATIONS.get(kind, f"{kind:#x}"), None, None)
            for address, kind in self._base_relocations
        ]

    @functools.cached_property
    def tls(self) -> PeTls | None:
        """What every thread gets a copy of, and the callbacks.

        Raises:
            Malformed: The directory or the list of callbacks is in no section.
        """
        with named(self.name):
            found = self._native.tls()
        if found is None:
            return None
        start, end, index, zero_fill, callbacks = found
        if end < start:
            raise Malformed(f"{self.name}: EndAddressOfRawData: it is before the start")
        return PeTls(start, end - start, zero_fill, index, tuple(callbacks))

    def load_plan(self, bias: int = 0, *, page_size: int = 4096) -> list[Operation]:
        """List what makes an address space of it: as Wine does on Linux, with the result of Windows.

        Args:
            bias: The distance from its preferred base; a multiple of 64 KiB. Not 0, the pages that base
                relocations change are listed.
            page_size: A power of two.

        Raises:
            ValueError: It cannot be loaded at that bias.
            Malformed: A section is outside of the image or of the file, overlaps another or is not aligned.
        """
        with named(self.name):
            return pe_plan.plan(self, bias, page_size, [address for address, _ in self._base_relocations])

    def check(self) -> None:
        """Look at everything that a loader would trust.

        Raises:
            Malformed: A section, a directory or what it names is where it cannot be.
        """
        self.load_plan()
        self._imports, self._exports, self._base_relocations, self.tls  # noqa: B018 - reading them checks them


def _import(library: str, name: str | None, number: int) -> Symbol:
    ordinal = number if name is None else None
    return Symbol(name or "", 0, 0, "NOTYPE", "GLOBAL", "DEFAULT", None, None, library, ordinal)
