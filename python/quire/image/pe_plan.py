"""How a PE file is mapped: as Wine's ``map_image_into_view`` does it on Linux, with the result of Windows.

A file whose sections begin at multiples of a page in it is mapped; one with smaller steps, as most have,
cannot be mapped by Linux and is copied. Base relocation happens while everything may be written; then every
section gets the protection that it asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.errors import Malformed
from quire.image.operations import MapFlags, Operation, Protection

if TYPE_CHECKING:
    from quire.image.pe import PeImage

__all__ = ["plan", "protection"]

_READ_WRITE = Protection.READ | Protection.WRITE
_GRANULARITY = 0x10000
# The loader of Windows reads from multiples of a sector, whatever the header says.
_SECTOR = 512
_SCN_EXECUTE, _SCN_READ, _SCN_WRITE = 0x20000000, 0x40000000, 0x80000000


def plan(image: PeImage, bias: int, page_size: int, relocated: list[int]) -> list[Operation]:
    """List the operations; ``relocated`` are the places of base relocations, relative to the base."""
    if bias % _GRANULARITY:
        raise ValueError(f"a bias of {bias:#x} is not a multiple of 64 KiB")
    if bias and not image.can_be_rebased:
        raise ValueError(f"{image.name} has no base relocations, so its bias can only be 0, not {bias:#x}")
    base = image.image_base + bias
    _check(image, base, page_size)
    span = _up(image.image_size, page_size)
    reserved = MapFlags.PRIVATE | MapFlags.ANONYMOUS | MapFlags.FIXED_NOREPLACE
    found = [
        Operation("mmap", base, span, Protection.NONE, reserved, by="linker", why="SizeOfImage"),
    ]
    headers = min(image.headers_size, image.size)
    found += _content(base, headers, headers, image.offset, page_size, "the headers")
    for section in image.sections:
        start = section.address + bias
        offset = section.offset - section.offset % _SECTOR
        from_file = min(section.file_size, _up(section.size, page_size)) if section.offset else 0
        found += _content(
            start, _up(section.size, page_size), from_file, image.offset + offset, page_size, section.name
        )
    if bias:
        found += _relocations(base, relocated, page_size)
    found.append(
        Operation("mprotect", base, _up(headers, page_size), Protection.READ, by="linker", why="the headers")
    )
    for section in image.sections:
        start, size = section.address + bias, _up(section.size, page_size)
        if size:
            found.append(
                Operation("mprotect", start, size, protection(section.flags), by="linker", why=section.name)
            )
    return found


def _check(image: PeImage, base: int, page_size: int) -> None:
    if base < 0 or base + image.image_size > 1 << image.bits:
        raise Malformed(f"SizeOfImage: at {base:#x} it ends behind the last address of {image.bits} bits")
    if image.headers_size > image.image_size:
        raise Malformed("SizeOfHeaders: more than SizeOfImage")
    end = image.image_base + image.headers_size
    before = "the headers"
    for index, section in enumerate(image.sections):
        name = f"section {index}, {section.name}"
        if section.address % page_size:
            raise Malformed(f"VirtualAddress of {name}: it does not begin at a page")
        if section.address < end:
            raise Malformed(f"VirtualAddress of {name}: it begins before the end of {before}")
        end, before = section.address + section.size, name
        if end > image.image_base + image.image_size:
            raise Malformed(f"VirtualSize of {name}: it ends behind SizeOfImage")
        if section.offset and section.offset + min(section.file_size, section.size) > image.size:
            raise Malformed(f"PointerToRawData, SizeOfRawData of {name}: it ends past the end of the file")


def _content(start: int, size: int, from_file: int, offset: int, page_size: int, why: str) -> list[Operation]:
    """Give memory its content: mapped or copied from the file, zeros behind that."""
    found: list[Operation] = []
    if not size:
        return found
    fixed = MapFlags.PRIVATE | MapFlags.FIXED
    if from_file and offset % page_size == 0:
        length = _up(from_file, page_size)
        found.append(Operation("mmap", start, length, _READ_WRITE, fixed, "image", offset, "linker", why))
        if length > from_file:
            tail = length - from_file
            found.append(
                Operation("zero", start + from_file, tail, by="linker", why=f"{why}: behind its bytes")
            )
        start, size = start + length, size - length
        from_file = 0
    if size > 0:
        length = _up(size, page_size)
        flags = fixed | MapFlags.ANONYMOUS
        found.append(Operation("mmap", start, length, _READ_WRITE, flags, by="linker", why=f"{why}: zeros"))
        if from_file:
            found.append(
                Operation("copy", start, from_file, file="image", offset=offset, by="linker", why=why)
            )
    return found


def _relocations(base: int, relocated: list[int], page_size: int) -> list[Operation]:
    """List the pages that relocation writes to, neighbours as one range."""
    # A word may reach into the next page.
    pages = sorted({at // page_size for place in relocated for at in (place, place + 3)})
    found: list[Operation] = []
    start = 0
    for index, page in enumerate(pages):
        if index + 1 == len(pages) or pages[index + 1] != page + 1:
            length = (page - pages[start] + 1) * page_size
            address = base + pages[start] * page_size
            found.append(Operation("relocate", address, length, by="linker", why="base relocations"))
            start = index + 1
    return found


def protection(flags: int) -> Protection:
    """What a section's flags allow."""
    return Protection.of(read=flags & _SCN_READ, write=flags & _SCN_WRITE, execute=flags & _SCN_EXECUTE)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
