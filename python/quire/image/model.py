"""What every program file is described by, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from quire.closing import Closing
from quire.image.operations import Protection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.image.operations import Operation
    from quire.sources import Source

__all__ = ["Eagerness", "Image", "Relocation", "Section", "Segment", "Slot", "Symbol", "Version"]

Format = Literal["elf", "pe", "mach-o", "universal", "fatelf", "script"]
Kind = Literal["executable", "shared object", "relocatable", "core", "archive", "other"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of the file that becomes, or describes, a range of memory. Sizes are in bytes.

    Attributes:
        kind: The format's own name of what it is: ``LOAD``, ``DYNAMIC``; for other formats its name.
        address: Where its first byte is to be, before a bias is added.
        memory_size: How much memory it takes; what the file does not give reads as zeros.
        offset: Where in the file, from the beginning of this image.
        file_size: How much of it the file gives.
        protection: What may be done with the memory.
        align: A power of two, or 0 or 1 for none.
        flags: The format's own bits.
    """

    kind: str
    address: int
    memory_size: int
    offset: int
    file_size: int
    protection: Protection
    align: int
    flags: int


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the file that linkers and debuggers have a name for. Loading an ELF file does not need them.

    Attributes:
        name: Not unique.
        kind: The format's own name of what it is.
        address: Before a bias is added; 0 if it is not loaded.
        offset: Where in the file, from the beginning of this image.
        size: In memory, in bytes.
        file_size: In the file, in bytes; 0 for what is zeros.
        align: A power of two, or 0 or 1 for none.
        flags: The format's own bits.
        link: ELF: the index of a section that belongs to it.
        info: ELF: what it means depends on the kind.
        entry_size: ELF: bytes of each entry, of a section that is a table.
    """

    name: str
    kind: str
    address: int
    offset: int
    size: int
    file_size: int
    align: int
    flags: int
    link: int = 0
    info: int = 0
    entry_size: int = 0


class Version(NamedTuple):
    """The version of an ELF symbol."""

    name: str
    library: str | None
    """Which library is to define it, of a symbol that is needed."""
    is_hidden: bool
    """Not what the name without a version means."""


class Symbol(NamedTuple):
    """A name and what it stands for."""

    name: str
    value: int
    """An address before a bias is added; in a relocatable object an offset in its section."""
    size: int
    kind: str
    """``FUNC``, ``OBJECT``, ``TLS``, ``GNU_IFUNC``, …; ``NOTYPE`` where the format does not say."""
    binding: str
    """``LOCAL``, ``GLOBAL`` or ``WEAK``."""
    visibility: str
    """``DEFAULT``, ``PROTECTED``, ``HIDDEN`` or ``INTERNAL``."""
    section: int | None
    """Index of its section; None if it is defined elsewhere; negative for what is in no section."""
    version: Version | None = None
    library: str | None = None
    """Which library is to define it, where the format says so."""
    ordinal: int | None = None
    """PE: by which number it is exported or imported."""
    forward: str | None = None
    """Which symbol of another library an export stands for."""

    @property
    def is_defined(self) -> bool:
        """Whether it is defined here."""
        return self.section is not None


class Relocation(NamedTuple):
    """A place that is changed when the object is loaded, or linked."""

    address: int
    """Before a bias is added; in a relocatable object an offset in its section."""
    kind: str
    """The specification's name, such as ``R_X86_64_RELATIVE``, or a number as hexadecimal digits."""
    symbol: Symbol | None
    addend: int | None
    """None if it is what stands at the place."""
    is_lazy: bool = False
    """Whether it may wait for the first call of the function."""
    section: int | None = None
    """In a relocatable object, the index of the section that it changes."""


class Slot(NamedTuple):
    """A word that the loader fills with the address of something: of the GOT, or of an import table."""

    address: int
    """Before a bias is added."""
    symbol: Symbol | None
    """What it resolves to; None if a function of this object decides (``IRELATIVE``)."""
    kind: Literal["function", "data", "ifunc", "tls"]
    is_lazy: bool
    """Whether it is filled at the first call."""
    stub: int | None = None
    """Address of the code that jumps to where it points (PLT), before a bias is added; None if there is none
    in a known shape."""


@dataclass(frozen=True, slots=True)
class Eagerness:
    """What has to be written before a program runs, and what may wait.

    Attributes:
        bind_now: All functions are resolved when the object is loaded.
        lazy: How many function slots are resolved at their first call.
        eager: How many relocations are done at loading.
        ifuncs: How many of those call a function of the object to learn the address.
        text_relocations: Memory that is not writable has to be made so, to relocate it.
    """

    bind_now: bool
    lazy: int
    eager: int
    ifuncs: int
    text_relocations: bool


class Image(Closing):
    """A program file. Its tables are read when they are asked for; closing gives up the file.

    Attributes:
        name: Of the file, for messages.
        format: Which format it is written in.
        machine: The machine's name: ``x86_64``, ``aarch64``, …; ``""`` if that cannot be said of it.
        bits: 32 or 64; of a fat file the most of its members, of a script 0.
        byte_order: ``"little"`` or ``"big"``.
        kind: What it can be used for.
        entry: The address of its first instruction before a bias is added; None if it has none.
        members: The images that a fat file consists of, in its order.
        offset: Where in the file it begins, in bytes; not 0 for the member of a fat file.
        size: How many bytes of the file it takes.
    """

    name: str
    format: Format
    machine: str
    bits: int
    byte_order: Literal["little", "big"]
    kind: Kind
    entry: int | None
    members: Sequence[Image] = ()
    offset: int
    size: int

    _source: Source
    _owned: Source | None = None

    @property
    def interpreter(self) -> str | None:
        """The path of the program that is to be started for it."""
        return None

    @property
    def needed(self) -> tuple[str, ...]:
        """The libraries that it names, in its order."""
        return ()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """In the order of the file."""
        return ()

    @property
    def sections(self) -> tuple[Section, ...]:
        """In the order of the file; empty for a file that has none."""
        return ()

    def symbols(self) -> list[Symbol]:
        """List all symbols."""
        return []

    def imports(self) -> list[Symbol]:
        """List the symbols that it needs from others."""
        return []

    def exports(self) -> list[Symbol]:
        """List the symbols that others can use."""
        return []

    def relocations(self) -> list[Relocation]:
        """List the places that are changed, in the order in which that happens."""
        return []

    def slots(self) -> list[Slot]:
        """List the words that loading fills with addresses of symbols."""
        return []

    def load_plan(self, bias: int = 0) -> list[Operation]:  # noqa: ARG002 - for formats that are loaded
        """List the operations that make an address space of it.

        Args:
            bias: What is added to the addresses in the file. A multiple of the page size.

        Raises:
            ValueError: It cannot be loaded at that bias, or is no file that is loaded at all.
            Malformed: No loader would accept it.
        """
        raise ValueError(f"{self.name}: a file of format {self.format} is not loaded itself")

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes of this image's part of the file.

        Raises:
            ValueError: They are not within it.
            PageError: The file cannot be read.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(
                f"bytes {offset} to {offset}+{length} are outside {self.name} ({self.size} bytes)"
            )
        return self._source.read(self.offset + offset, length)

    def close(self) -> None:
        """Give up the file, if `read` opened it. What was asked for before stays. Idempotent."""
        if self._owned is not None:
            self._owned.close()

    def __repr__(self) -> str:
        """Show name, format and machine."""
        return f"<{self.format} {self.kind} {self.name}: {self.machine}, {self.bits} bits>"
