"""What memory holds after a load plan: the plan's operations, carried out on ranges instead of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from quire.image.elf import ElfImage
from quire.image.operations import Protection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quire.image.model import Image
    from quire.image.operations import Operation

__all__ = ["Piece", "layout", "layout_of"]


class Piece(NamedTuple):
    """A range of memory of one origin and one protection. Addresses and offsets are in bytes."""

    start: int
    end: int
    """Exclusive."""
    protection: Protection
    offset: int | None
    """Where in the file its first byte comes from; None if it is zeros."""
    is_relro: bool = False
    """Whether it was writable until it was relocated (``PT_GNU_RELRO``)."""
    is_relocated: bool = False
    """Whether relocation writes to it, as far as the plan says."""

    @property
    def kind(self) -> Literal["code", "constants", "relro", "data", "zeros", "reserved"]:
        """What it is for, by its origin and protection."""
        if self.protection == Protection.NONE:
            return "reserved"
        if self.offset is None:
            return "zeros"
        if self.protection & Protection.EXEC:
            return "code"
        if self.protection & Protection.WRITE:
            return "data"
        return "relro" if self.is_relro else "constants"

    def cut(self, start: int, end: int) -> Piece:
        """Return the part that is within a range."""
        low, high = max(self.start, start), min(self.end, end)
        offset = None if self.offset is None else self.offset + low - self.start
        return self._replace(start=low, end=high, offset=offset)


def layout_of(image: Image, bias: int = 0) -> list[Piece]:
    """Carry out the load plan of an image.

    Args:
        image: Stays the caller's.
        bias: See `Image.load_plan`.

    Returns:
        See `layout`.

    Raises:
        ValueError: It cannot be loaded at that bias, or is no file that is loaded at all.
        Malformed: No loader would accept it.
    """
    relro = image.relro if isinstance(image, ElfImage) else None
    start = bias + relro.address if relro else 0
    end = start + relro.memory_size if relro else 0
    return layout(image.load_plan(bias), file_size=image.offset + image.size, relro=(start, end))


def layout(
    operations: Iterable[Operation],
    *,
    file_size: int,
    relro: tuple[int, int] = (0, 0),
    page_size: int = 4096,
) -> list[Piece]:
    """Carry out a load plan.

    What the plan does with the interpreter's file, the stack and the heap is left out.

    Args:
        operations: What `Image.load_plan` returned.
        file_size: Of the whole file, in bytes. What is mapped behind its end reads as zeros up to the end of
            the page.
        relro: Addresses that are made read-only after relocation; the end is exclusive.
        page_size: A power of two.

    Returns:
        Sorted by address, without overlap. What is between them is not mapped.
    """
    pieces: list[Piece] = []
    for each in operations:
        if each.file == "interpreter" or each.call in ("stack", "brk"):
            continue
        start, end = each.address, each.address + each.length
        if each.call in ("mmap", "munmap", "mprotect"):
            end = -(-end // page_size) * page_size
        inside = [piece.cut(start, end) for piece in pieces if piece.start < end and start < piece.end]
        if each.call == "mmap":
            offset = each.offset if each.file == "image" else None
            inside = _split(Piece(start, end, each.protection, offset), file_size)
        elif each.call == "munmap":
            inside = []
        elif each.call == "mprotect":
            inside = [_protected(piece, each.protection, relro) for piece in inside]
        elif each.call == "zero":
            inside = [piece._replace(offset=None) for piece in inside]
        elif each.call == "copy":
            inside = [piece._replace(offset=each.offset + piece.start - start) for piece in inside]
        elif each.call == "relocate":
            inside = [piece._replace(is_relocated=True) for piece in inside]
        outside = [
            part
            for piece in pieces
            for part in (piece.cut(piece.start, start), piece.cut(end, piece.end))
            if part.start < part.end
        ]
        pieces = _merged([*inside, *outside])
    return pieces


def _split(piece: Piece, file_size: int) -> list[Piece]:
    if piece.offset is None:
        return [piece]
    end = min(piece.end, piece.start + max(0, file_size - piece.offset))
    parts = [piece.cut(piece.start, end), piece.cut(end, piece.end)._replace(offset=None)]
    return [part for part in parts if part.start < part.end]


def _protected(piece: Piece, protection: Protection, relro: tuple[int, int]) -> Piece:
    lost = bool(piece.protection & Protection.WRITE and not protection & Protection.WRITE)
    is_relro = piece.is_relro or (lost and relro[0] < piece.end and piece.start < relro[1])
    return piece._replace(protection=protection, is_relro=is_relro)


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Join neighbours that differ in nothing."""
    found: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        last = found[-1] if found else None
        if last is not None and last.end == piece.start and _continues(last, piece):
            found[-1] = last._replace(end=piece.end)
        else:
            found.append(piece)
    return found


def _continues(low: Piece, high: Piece) -> bool:
    offset = None if low.offset is None else low.offset + low.end - low.start
    return (offset, *low[2:3], *low[4:]) == (high.offset, *high[2:3], *high[4:])
