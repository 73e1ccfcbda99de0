"""Mach-O files: programs and libraries of macOS."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

from quire import _native
from quire.errors import Malformed
from quire.image.model import Image, Kind, Relocation, Section, Segment, Slot, Symbol
from quire.image.naming import named
from quire.image.operations import MapFlags, Operation, Protection

if TYPE_CHECKING:
    from quire.sources import Source

__all__ = ["MachOImage", "machine"]

_ABI64, _ABI64_32 = 0x01000000, 0x02000000
_MACHINES = {
    6: "m68k",
    7: "i386",
    12: "arm",
    14: "sparc",
    18: "ppc",
    7 | _ABI64: "x86_64",
    12 | _ABI64: "aarch64",
    12 | _ABI64_32: "arm64_32",
    18 | _ABI64: "ppc64",
}
_KINDS: dict[int, Kind] = {
    1: "relocatable",
    2: "executable",
    4: "core",
    6: "shared object",
    7: "shared object",
    8: "shared object",
}
_MH_PIE = 0x200000
# Parts of a symbol's type: debugging entries; private external; the kind; external.
_N_STAB, _N_PEXT, _N_TYPE, _N_EXT = 0xE0, 0x10, 0x0E, 0x01
_N_UNDF, _N_ABS = 0x0, 0x2
_WEAK_REFERENCE, _WEAK_DEFINITION = 0x40, 0x80
_ZERO_FILL = {0x1, 0xC, 0x12}
_SPECIAL_LIBRARIES = {
    0: "this image",
    -1: "the main executable",
    -2: "any library",
    -3: "any library, weakly",
}
_EXPORT_KINDS = {0: "NOTYPE", 1: "TLS", 2: "ABS"}
_EXPORT_WEAK = 0x04
_FIXED = MapFlags.PRIVATE | MapFlags.FIXED
# Programs for Apple's own processors have pages of 16 KiB.
_PAGE_SIZES = {"aarch64": 16384, "arm64_32": 16384}


def machine(cpu_type: int) -> str:
    """Name a machine by its number in a header."""
    return _MACHINES.get(cpu_type, f"machine-{cpu_type}")


class MachOImage(Image):
    """A Mach-O file, or one of those in a universal file.

    Attributes:
        cpu_subtype: Which kind of the machine.
        flags: The bits of the header.
        install_name: The name under which others need it; None for a program.
        run_paths: Where it looks for libraries whose names begin with ``@rpath``.
        libraries: Every library that it names, and how: ``plain``, ``weak``, ``reexported``, ``upward`` or
            ``lazy``.
        build_id: Its UUID, as hexadecimal digits.
    """

    format = "mach-o"

    def __init__(self, source: Source, name: str, offset: int, size: int) -> None:
        """Read the header and the load commands.

        Raises:
            Malformed: They are cut, or not those of a Mach-O file.
            PageError: The source failed.
        """
        self._source, self.name, self.offset, self.size = source, name, offset, size
        with named(name):
            self._native = _native.MachOFile(source._native, offset, size)
            (is_64, is_little, cpu, self.cpu_subtype, kind, self.flags), names, entry, uuid = (
                self._native.header()
            )
            found = self._native.segments()
        self.bits = 64 if is_64 else 32
        self.byte_order = "little" if is_little else "big"
        self.machine = machine(cpu)
        self.kind = _KINDS.get(kind, "other")
        self.install_name, self.libraries, self.run_paths, self._linker = names
        self.build_id = uuid.hex() if uuid is not None else None
        self._segments = tuple(
            Segment(name, address, memory_size, at, file_size, _protection(bits), 0, flags)
            for name, address, memory_size, at, file_size, bits, flags, _ in found
        )
        self._sections = tuple(
            Section(
                f"{segment},{name}",
                f"{flags & 0xFF:#x}",
                address,
                at,
                section_size,
                0 if flags & 0xFF in _ZERO_FILL else section_size,
                1 << align if align < 64 else 0,
                flags,
            )
            for *_, sections in found
            for name, segment, address, section_size, at, align, flags in sections
        )
        text = self._text
        self.entry = None if entry is None or text is None else text.address + entry

    @property
    def _text(self) -> Segment | None:
        return next((segment for segment in self._segments if segment.kind == "__TEXT"), None)

    @property
    def interpreter(self) -> str | None:
        """The dynamic linker that a program names."""
        return self._linker

    @property
    def needed(self) -> tuple[str, ...]:
        """The libraries that it names, in its order."""
        return tuple(name for name, _ in self.libraries)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """In the order of the load commands."""
        return self._segments

    @property
    def sections(self) -> tuple[Section, ...]:
        """Of all segments; the name has the segment's before a comma."""
        return self._sections

    @property
    def is_position_independent_executable(self) -> bool:
        """Whether it is a program that runs at any address."""
        return self.kind == "executable" and bool(self.flags & _MH_PIE)

    def _library(self, number: int) -> str | None:
        if 1 <= number <= len(self.libraries):
            return self.libraries[number - 1][0]
        return _SPECIAL_LIBRARIES.get(number)

    @functools.cached_property
    def _symbols(self) -> list[Symbol]:
        with named(self.name):
            found = self._native.symbols()
        symbols = []
        for name, kind, section, description, value in found:
            if kind & _N_STAB:
                continue
            place: int | None = section - 1
            library = None
            if kind & _N_TYPE == _N_UNDF:
                place = None
                # The library's number is in the upper half; those of special meaning are negative.
                number = description >> 8
                library = self._library(number - 256 if number >= 254 else number)
            elif kind & _N_TYPE == _N_ABS:
                place = -1
            weak = _WEAK_REFERENCE if place is None else _WEAK_DEFINITION
            binding = "LOCAL" if not kind & _N_EXT else "WEAK" if description & weak else "GLOBAL"
            visibility = "HIDDEN" if kind & _N_PEXT else "DEFAULT"
            symbols.append(Symbol(name, value, 0, "NOTYPE", binding, visibility, place, None, library))
        return symbols

    def symbols(self) -> list[Symbol]:
        """List the symbols, those for debuggers left out.

        Raises:
            Malformed: The table or its names are not in the file.
        """
        return list(self._symbols)

    def imports(self) -> list[Symbol]:
        """List the symbols that are to be found in others, with the library that has each."""
        return [symbol for symbol in self._symbols if symbol.section is None]

    def exports(self) -> list[Symbol]:
        """List the symbols that others find here: those of the exports trie.

        Raises:
            Malformed: The trie is not in the file, is cut or comes back to where it was.
        """
        with named(self.name):
            found = self._native.exports()
        text = self._text
        base = text.address if text is not None else 0
        symbols = []
        for name, flags, address, forward in found:
            kind = _EXPORT_KINDS.get(flags & 3, "NOTYPE")
            binding = "WEAK" if flags & _EXPORT_WEAK else "GLOBAL"
            value = address if kind == "ABS" else base + address
            library = other = None
            if forward is not None:
                library, other, value = self._library(forward[0]), forward[1] or name, 0
            place = -1 if kind == "ABS" or forward is not None else self._section_of(value)
            symbols.append(
                Symbol(name, value, 0, kind, binding, "DEFAULT", place, None, library, None, other)
            )
        return symbols

    def _section_of(self, address: int) -> int:
        for index, section in enumerate(self._sections):
            if section.address <= address < section.address + section.size:
                return index
        return -1

    @functools.cached_property
    def _fixups(self) -> list[Relocation]:
        with named(self.name):
            found = self._native.fixups()
        relocations = []
        for kind, address, name, library, addend in found:
            symbol = None
            if name is not None:
                binding = "WEAK" if kind == "weak" else "GLOBAL"
                of = self._library(library)
                symbol = Symbol(name, 0, 0, "NOTYPE", binding, "DEFAULT", None, None, of)
            relocations.append(
                Relocation(address, kind, symbol, addend if symbol is not None else None, kind == "lazy")
            )
        return relocations

    def relocations(self) -> list[Relocation]:
        """List the words that dyld changes: ``rebase``, ``bind``, ``weak``, and ``lazy`` at the first call.

        Raises:
            Malformed: What tells of them is not in the file, or names places that are in no segment.
        """
        return list(self._fixups)

    def slots(self) -> list[Slot]:
        """List the words that get the address of a symbol."""
        return [
            Slot(each.address, each.symbol, "function" if each.is_lazy else "data", each.is_lazy)
            for each in self._fixups
            if each.symbol is not None
        ]

    def load_plan(self, bias: int = 0, *, page_size: int | None = None) -> list[Operation]:
        """List what makes an address space of it: every segment at its place, zeros behind its bytes.

        Args:
            bias: What is added to the addresses (dyld's "slide"); a multiple of the page size.
            page_size: A power of two; None for that of the machine that it is for.

        Raises:
            ValueError: It cannot be loaded at that bias, or is a relocatable object or a core file.
            Malformed: A segment is outside of the file, overlaps another, is not aligned or overflows.
        """
        page = page_size or _PAGE_SIZES.get(self.machine, 4096)
        if self.kind not in ("executable", "shared object"):
            raise ValueError(f"{self.name}: a {self.kind} file is not loaded")
        if bias % page:
            raise ValueError(f"a bias of {bias:#x} is not a multiple of the page size, {page}")
        if bias and self.kind == "executable" and not self.is_position_independent_executable:
            raise ValueError(
                f"{self.name} is not position independent; its bias can only be 0, not {bias:#x}"
            )
        with named(self.name):
            return self._plan(bias, page)

    def _plan(self, bias: int, page: int) -> list[Operation]:
        found = []
        spans: list[tuple[int, int, str]] = []
        for segment in self._segments:
            name = segment.kind
            if segment.file_size > segment.memory_size:
                raise Malformed(f"filesize of {name}: {segment.file_size:#x} is more than vmsize")
            # The range of addresses that must stay empty does not move.
            start = segment.address + (bias if segment.protection or segment.file_size else 0)
            end = start + segment.memory_size
            if end > 1 << self.bits:
                raise Malformed(f"vmsize of {name}: it ends behind the last address of {self.bits} bits")
            if segment.offset + segment.file_size > self.size:
                raise Malformed(f"fileoff, filesize of {name}: it ends past the end of the file")
            if segment.address % page or (segment.file_size and segment.offset % page):
                raise Malformed(f"vmaddr, fileoff of {name}: not multiples of the page size, {page}")
            for other_start, other_end, other in spans:
                if start < other_end and other_start < end:
                    raise Malformed(f"vmaddr of {name}: it overlaps {other}")
            if segment.memory_size:
                spans.append((start, end, name))
            found += self._map(segment, start, page)
        return found

    def _map(self, segment: Segment, start: int, page: int) -> list[Operation]:
        found = []
        name = segment.kind
        by: Literal["kernel", "linker"] = "kernel" if self.kind == "executable" else "linker"
        length = -(-segment.file_size // page) * page
        if length:
            at = self.offset + segment.offset
            found.append(Operation("mmap", start, length, segment.protection, _FIXED, "image", at, by, name))
            if length > segment.file_size and segment.memory_size > segment.file_size:
                tail = min(length, segment.memory_size) - segment.file_size
                why = f"{name}: behind its bytes in the file"
                found.append(Operation("zero", start + segment.file_size, tail, by=by, why=why))
        rest = -(-segment.memory_size // page) * page - length
        if rest > 0:
            why = f"{name}: zeros" if segment.protection else f"{name}: nothing may be here"
            flags = _FIXED | MapFlags.ANONYMOUS
            found.append(Operation("mmap", start + length, rest, segment.protection, flags, by=by, why=why))
        return found

    def check(self) -> None:
        """Look at everything that a loader would trust.

        Raises:
            Malformed: A segment, or a table that a load command names, is where it cannot be.
        """
        if self.kind in ("executable", "shared object"):
            self.load_plan()
        self._symbols, self._fixups  # noqa: B018 - reading them checks them
        self.exports()


def _protection(bits: int) -> Protection:
    return Protection(bits & 7)
