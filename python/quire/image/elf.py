"""ELF files: programs, shared objects, relocatable objects, core files."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from quire import _native
from quire.errors import Malformed
from quire.image import elf_plan, stubs
from quire.image.machines import machine_name
from quire.image.model import Eagerness, Image, Kind, Relocation, Section, Segment, Slot, Symbol, Version
from quire.image.naming import named
from quire.image.operations import Protection

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quire.image.operations import Operation
    from quire.sources import Source

__all__ = ["DynamicEntry", "ElfImage", "Note", "Tls"]

ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
PF_X, PF_W, PF_R = 1, 2, 4
SHN_UNDEF, SHN_LORESERVE = 0, 0xFF00
SHT_NOBITS = 8

DT_PLTGOT = 3
DT_PLTRELSZ, DT_SONAME, DT_RPATH, DT_TEXTREL, DT_BIND_NOW, DT_RUNPATH = 2, 14, 15, 22, 24, 29
DT_NEEDED, DT_FLAGS, DT_FLAGS_1 = 1, 30, 0x6FFFFFFB
DF_TEXTREL, DF_BIND_NOW = 4, 8
DF_1_NOW, DF_1_PIE = 1, 0x08000000

_KINDS: dict[int, Kind] = {
    ET_REL: "relocatable",
    ET_CORE: "core",
    ET_EXEC: "executable",
    ET_DYN: "shared object",
}
_VISIBILITIES = ("DEFAULT", "INTERNAL", "HIDDEN", "PROTECTED")
_SLOT_KINDS = {
    "JUMP_SLOT": "function",
    "JMP_SLOT": "function",
    "GLOB_DAT": "data",
    "IRELATIVE": "ifunc",
    "IRELATIV": "ifunc",
    "TLSDESC": "tls",
    "TLS_DESC": "tls",
    "DTPMOD64": "tls",
    "DTPMOD32": "tls",
    "DTPMOD": "tls",
    "TPOFF64": "tls",
    "TPOFF32": "tls",
    "TPOFF": "tls",
    "TPREL64": "tls",
    "TPREL": "tls",
}
NT_GNU_BUILD_ID = 3


class _Names(dict[int, str]):
    """Numbers of a kind to names without their prefix; those without a name as hexadecimal digits."""

    def __init__(self, kind: str, machine: int, *, keep_prefix: bool = False) -> None:
        self._kind, self._machine = kind, machine
        self._cut = 0 if keep_prefix else len(kind) + 1

    def __missing__(self, value: int) -> str:
        name = _native.elf_name(self._kind, self._machine, value)
        text = self[value] = f"{value:#x}" if name is None else name[self._cut :]
        return text


class DynamicEntry(NamedTuple):
    """An entry of the dynamic section."""

    tag: int
    kind: str
    """Its name: ``NEEDED``, ``INIT_ARRAY``, …"""
    value: int
    name: str | None
    """For the kinds whose value is a name."""


class Note(NamedTuple):
    """What a program says of itself beside its code."""

    owner: str
    kind: int
    description: bytes


@dataclass(frozen=True, slots=True)
class Tls:
    """What every thread gets a copy of. Sizes in bytes.

    Attributes:
        address: Of its initial content, before a bias is added.
        file_size: How much of it has a content; the rest is zeros.
        memory_size: How much each thread gets.
        align: A power of two, or 0 or 1 for none.
    """

    address: int
    file_size: int
    memory_size: int
    align: int


class ElfImage(Image):
    """An ELF file of any class, byte order and kind. What runs is read through the program headers alone.

    Attributes:
        type_number: ``e_type``.
        machine_number: ``e_machine``.
        flags: ``e_flags``.
        os_abi: ``EI_OSABI``.
        abi_version: ``EI_ABIVERSION``.
    """

    format = "elf"

    def __init__(self, source: Source, name: str, offset: int, size: int) -> None:
        """Read the file header and the program headers.

        Raises:
            Malformed: They are cut, or not those of an ELF file.
            PageError: The source failed.
        """
        self._source, self.name, self.offset, self.size = source, name, offset, size
        with named(name):
            self._native = _native.ElfFile(source._native, offset, size)
            header = self._native.header()
            segments = self._native.segments()
        is_64, is_little, self.os_abi, self.abi_version, self.type_number = header[:5]
        self.machine_number, self.flags, entry, self._header_bytes = header[5:9]
        self._segments_offset, self._sections_offset, self._section_count = header[9:]
        self.bits = 64 if is_64 else 32
        self.byte_order = "little" if is_little else "big"
        self.machine = machine_name(self.machine_number)
        self.entry = entry or None
        kinds = _Names("PT", self.machine_number)
        self._segments = tuple(
            Segment(kinds[kind], address, memory_size, offset, file_size, _protection(flags), align, flags)
            for kind, flags, offset, address, _, file_size, memory_size, align in segments
        )
        self.kind = _KINDS.get(self.type_number, "other")
        if self.is_position_independent_executable:
            self.kind = "executable"

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The program headers."""
        return self._segments

    def _segment(self, kind: str) -> Segment | None:
        return next((segment for segment in self._segments if segment.kind == kind), None)

    @functools.cached_property
    def sections(self) -> tuple[Section, ...]:
        """The section headers, the empty one at index 0 too.

        Raises:
            Malformed: They, or their names, are not in the file.
        """
        kinds = _Names("SHT", self.machine_number)
        with named(self.name):
            found = self._native.sections()
        return tuple(
            Section(
                name,
                kinds[kind],
                address,
                offset,
                size,
                0 if kind == SHT_NOBITS else size,
                align,
                flags,
                link,
                info,
                entry_size,
            )
            for name, kind, flags, address, offset, size, link, info, align, entry_size in found
        )

    @functools.cached_property
    def interpreter(self) -> str | None:
        """What ``PT_INTERP`` names: the dynamic linker.

        Raises:
            Malformed: It is not in the file.
        """
        with named(self.name):
            return self._native.interpreter()

    @functools.cached_property
    def dynamic(self) -> tuple[DynamicEntry, ...]:
        """The dynamic section up to ``DT_NULL``; empty if there is none.

        Raises:
            Malformed: It, or a name of it, is not in the file or in no loaded segment.
        """
        kinds = _Names("DT", self.machine_number)
        segment = self._segment("DYNAMIC")
        with named(self.name):
            found = self._native.dynamic()
            if found and segment is not None and not self._is_loaded(segment.address, segment.file_size):
                raise Malformed(f"PT_DYNAMIC: {segment.address:#x} is in no loaded segment")
        return tuple(DynamicEntry(tag, kinds[tag], value, name) for tag, value, name in found or ())

    def _is_loaded(self, address: int, size: int) -> bool:
        return any(
            segment.address <= address and address + size <= segment.address + segment.memory_size
            for segment in self._segments
            if segment.kind == "LOAD"
        )

    @functools.cached_property
    def _dynamic_values(self) -> dict[int, int]:
        return {entry.tag: entry.value for entry in self.dynamic}

    def _dynamic_name(self, tag: int) -> str | None:
        return next((entry.name for entry in reversed(self.dynamic) if entry.tag == tag), None)

    @property
    def needed(self) -> tuple[str, ...]:
        """What ``DT_NEEDED`` names, in the order of loading."""
        return tuple(entry.name or "" for entry in self.dynamic if entry.tag == DT_NEEDED)

    @property
    def soname(self) -> str | None:
        """The name under which others need it."""
        return self._dynamic_name(DT_SONAME)

    @property
    def rpath(self) -> str | None:
        """Where it and what it needs look for libraries, unless it has a runpath."""
        return self._dynamic_name(DT_RPATH)

    @property
    def runpath(self) -> str | None:
        """Where it looks for libraries."""
        return self._dynamic_name(DT_RUNPATH)

    @functools.cached_property
    def is_position_independent_executable(self) -> bool:
        """Whether it is a program that runs at any address.

        ``DF_1_PIE`` says so; before there was that flag, an interpreter and no name of its own did.
        """
        if self.type_number != ET_DYN:
            return False
        try:
            flags = self._dynamic_values.get(DT_FLAGS_1, 0)
            return bool(flags & DF_1_PIE) or (self._segment("INTERP") is not None and self.soname is None)
        except Malformed:
            # What is wrong with the dynamic section is told to who asks for it.
            return False

    @functools.cached_property
    def notes(self) -> tuple[Note, ...]:
        """The notes, in the order of the file.

        Raises:
            Malformed: One is cut.
        """
        with named(self.name):
            return tuple(Note(*note) for note in self._native.notes())

    @property
    def build_id(self) -> str | None:
        """What the linker has made to identify this build, as hexadecimal digits."""
        for note in self.notes:
            if note.owner == "GNU" and note.kind == NT_GNU_BUILD_ID:
                return note.description.hex()
        return None

    @property
    def relro(self) -> Segment | None:
        """What is made read-only after it was relocated."""
        return self._segment("GNU_RELRO")

    @property
    def tls(self) -> Tls | None:
        """What every thread gets a copy of."""
        found = self._segment("TLS")
        return None if found is None else Tls(found.address, found.file_size, found.memory_size, found.align)

    @property
    def stack_protection(self) -> Protection | None:
        """What ``PT_GNU_STACK`` says; None without one, which on x86-64 makes the linker allow execution."""
        found = self._segment("GNU_STACK")
        return None if found is None else found.protection

    @functools.cached_property
    def _dynamic_symbols(self) -> list[Symbol]:
        return self._symbols(dynamic=True)

    @functools.cached_property
    def _static_symbols(self) -> list[Symbol]:
        return self._symbols(dynamic=False)

    def _symbols(self, *, dynamic: bool) -> list[Symbol]:
        kinds, bindings = _Names("STT", self.machine_number), _Names("STB", self.machine_number)
        with named(self.name):
            found = self._native.symbols(dynamic)
        symbols = []
        for name, value, size, kind, binding, other, section, version, library, is_hidden in found:
            place = None if section == SHN_UNDEF else section
            if SHN_LORESERVE <= section <= 0xFFFF:
                place = section - 0x10000
            of = None if version is None else Version(version, library, is_hidden)
            symbols.append(
                Symbol(
                    name,
                    value,
                    size,
                    kinds[kind],
                    bindings[binding],
                    _VISIBILITIES[other & 3],
                    place,
                    of,
                    library,
                )
            )
        return symbols

    def dynamic_symbols(self) -> list[Symbol]:
        """List what the dynamic linker sees, with the empty symbol at index 0.

        Without section headers the count is that of the hash tables and of what relocations name.

        Raises:
            Malformed: The table is in no loaded segment or not in the file.
        """
        return list(self._dynamic_symbols)

    def symbols(self) -> list[Symbol]:
        """List what debuggers see, or what the dynamic linker sees if the file is stripped.

        The symbol at index 0 is empty, as in the file.

        Raises:
            Malformed: The table is not in the file.
        """
        return list(self._static_symbols or self._dynamic_symbols)

    def imports(self) -> list[Symbol]:
        """List the symbols that are to be found in others."""
        symbols = self._static_symbols if self.kind == "relocatable" else self._dynamic_symbols
        return [symbol for symbol in symbols[1:] if symbol.section is None and symbol.name]

    def exports(self) -> list[Symbol]:
        """List the symbols that others find here."""
        symbols = self._static_symbols if self.kind == "relocatable" else self._dynamic_symbols
        return [
            symbol
            for symbol in symbols[1:]
            if symbol.section is not None
            and symbol.binding != "LOCAL"
            and symbol.visibility in ("DEFAULT", "PROTECTED")
        ]

    @functools.cached_property
    def _relocations(self) -> list[Relocation]:
        kinds = _Names("R", self.machine_number, keep_prefix=True)
        with named(self.name):
            found = self._native.relocations()
        symbols = self._dynamic_symbols if self.dynamic else self._static_symbols
        is_lazy = not self.binds_now
        relative = self._relative_kind()
        out = []
        for index, (table, address, number, symbol, addend, section) in enumerate(found):
            if symbol >= len(symbols) and symbol:
                raise Malformed(
                    f"{self.name}: relocation {index}: its symbol {symbol} is none of {len(symbols)}"
                )
            kind = relative if table == "relr" else kinds[number]
            out.append(
                Relocation(
                    address,
                    kind,
                    symbols[symbol] if symbol else None,
                    addend,
                    is_lazy and table == "plt" and kind.endswith(("JUMP_SLOT", "JMP_SLOT")),
                    section,
                )
            )
        return out

    def _relative_kind(self) -> str:
        """Name what the words of DT_RELR are relocated by."""
        names = {"x86_64": "R_X86_64", "i386": "R_386", "aarch64": "R_AARCH64", "arm": "R_ARM"}
        return f"{names.get(self.machine, 'R')}_RELATIVE"

    def relocations(self) -> list[Relocation]:
        """List what the dynamic linker changes, in its order; for a relocatable object, what a linker does.

        Raises:
            Malformed: A table is in no loaded segment or not in the file, or names no symbol.
        """
        return list(self._relocations)

    def slots(self) -> list[Slot]:
        """List the words of the GOT that get the address of a symbol, the functions of the PLT among them.

        Reads the code of the PLT; in a file without sections all code.
        """
        found = []
        for relocation in self._relocations:
            kind = _SLOT_KINDS.get(relocation.kind.split("_", 2)[-1].removeprefix("64_"))
            if kind is not None and self.kind != "relocatable":
                found.append(Slot(relocation.address, relocation.symbol, kind, relocation.is_lazy))  # type: ignore[arg-type]
        got = self._dynamic_values.get(DT_PLTGOT)
        known = stubs.find(
            self.machine_number, self.bits, got, {slot.address for slot in found}, self._plt_code()
        )
        return [slot._replace(stub=known.get(slot.address)) for slot in found]

    def _plt_code(self) -> Iterator[tuple[int, bytes]]:
        """Give the addresses and bytes of what may have stubs."""
        try:
            sections = self.sections
        except Malformed:
            # Nothing that runs needs them.
            sections = ()
        parts: Sequence[Section | Segment] = [
            section for section in sections if section.name.startswith((".plt", ".iplt"))
        ]
        if not sections:
            parts = [segment for segment in self.segments if segment.kind == "LOAD" and segment.flags & PF_X]
        left = self.size  # They do not overlap, but for damaged ones.
        for part in parts:
            length = min(part.file_size, self.size - part.offset, left)
            if length > 0:
                left -= length
                yield part.address, self.read(part.offset, length)

    @functools.cached_property
    def binds_now(self) -> bool:
        """Whether it asks for all functions to be resolved when it is loaded."""
        values = self._dynamic_values
        return (
            DT_BIND_NOW in values
            or bool(values.get(DT_FLAGS, 0) & DF_BIND_NOW)
            or bool(values.get(DT_FLAGS_1, 0) & DF_1_NOW)
        )

    @property
    def has_text_relocations(self) -> bool:
        """Whether memory that is not writable has to be relocated."""
        values = self._dynamic_values
        return DT_TEXTREL in values or bool(values.get(DT_FLAGS, 0) & DF_TEXTREL)

    @property
    def eagerness(self) -> Eagerness:
        """What is done at loading, and what may wait for a first call.

        This is what the file asks for; ``LD_BIND_NOW`` and ``dlopen(RTLD_NOW)`` make everything eager.
        """
        lazy = sum(relocation.is_lazy for relocation in self._relocations)
        ifuncs = sum(relocation.kind.endswith(("IRELATIVE", "IRELATIV")) for relocation in self._relocations)
        return Eagerness(
            self.binds_now, lazy, len(self._relocations) - lazy, ifuncs, self.has_text_relocations
        )

    def load_plan(
        self,
        bias: int = 0,
        *,
        interpreter: Image | None = None,
        interpreter_bias: int = 0,
        page_size: int = 4096,
    ) -> list[Operation]:
        """List what makes an address space of it, in order: what the kernel does, or glibc's linker.

        A program is mapped by the kernel, and what is left to do by its interpreter; a shared object by the
        linker.

        Args:
            bias: What is added to the addresses in the file; a multiple of the page size. 0 for a program
                that is not position independent.
            interpreter: The image of its interpreter, whose mapping by the kernel is then listed too.
            interpreter_bias: The same for the interpreter.
            page_size: A power of two.

        Raises:
            ValueError: It cannot be loaded at that bias, or is a core file or a relocatable object.
            Malformed: Its segments are what no loader accepts: outside of the file, overlapping, not in
                order, of a size that overflows, or not aligned.
        """
        with named(self.name):
            operations = elf_plan.plan(self, bias, page_size)
        if interpreter is not None:
            if not isinstance(interpreter, ElfImage):
                raise ValueError(f"{interpreter.name} is no ELF file, so no interpreter of one")
            with named(interpreter.name):
                operations += elf_plan.interpreter_plan(interpreter, interpreter_bias, page_size)
        return operations

    def check(self) -> None:
        """Look at everything that a loader would trust.

        Raises:
            Malformed: A segment is outside of the file, overlaps another, is not aligned or has a size that
                overflows; the dynamic section, a table that it names or the target of a relocation is in no
                loaded segment; a name does not end; an executable begins where no code is.
        """
        if self.type_number in (ET_EXEC, ET_DYN):
            self.load_plan()
        self.interpreter, self.dynamic, self.notes  # noqa: B018 - reading them checks them
        self._dynamic_symbols, self._relocations  # noqa: B018
        if self.type_number not in (ET_EXEC, ET_DYN):
            return
        loads = [segment for segment in self._segments if segment.kind == "LOAD"]
        word = self.bits // 8
        spans = [(each.address, each.address + each.memory_size - word) for each in loads]
        last = (1, 0)
        for index, relocation in enumerate(self._relocations):
            address = relocation.address
            if last[0] <= address <= last[1] or relocation.kind.endswith("_NONE"):
                continue
            for span in spans:
                if span[0] <= address <= span[1]:
                    last = span
                    break
            else:
                raise Malformed(
                    f"{self.name}: relocation {index} ({relocation.kind}): "
                    f"its target {address:#x} is in no loaded segment"
                )
        if self.kind == "executable" and self.entry is not None:
            code = [each for each in loads if each.protection & Protection.EXEC]
            if not any(each.address <= self.entry < each.address + each.memory_size for each in code):
                raise Malformed(f"{self.name}: e_entry: {self.entry:#x} is in no executable segment")


def _protection(flags: int) -> Protection:
    return Protection.of(read=flags & PF_R, write=flags & PF_W, execute=flags & PF_X)
