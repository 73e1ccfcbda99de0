"""How an ELF file is mapped: what ``fs/binfmt_elf.c`` of Linux and ``elf/dl-map-segments.h`` of glibc do.

Both reserve the whole span first, by mapping the first segment as long as all of them, so that nothing else
can come between; both lay the others over it, zero the rest of the page in which the file's bytes end, and
map zeros behind that. They differ in what becomes of the holes between segments: the kernel unmaps them, the
linker makes them inaccessible.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal, NamedTuple

from quire.errors import Malformed
from quire.image.operations import MapFlags, Operation, Protection

if TYPE_CHECKING:
    from quire.image.elf import ElfImage

__all__ = ["interpreter_plan", "plan"]

ET_EXEC, ET_DYN = 2, 3
_READ_WRITE = Protection.READ | Protection.WRITE
_ANONYMOUS = MapFlags.PRIVATE | MapFlags.ANONYMOUS | MapFlags.FIXED


class _Load(NamedTuple):
    """A loaded segment, at its biased address."""

    name: str
    address: int
    file_end: int
    memory_end: int
    map_start: int
    map_end: int
    map_offset: int
    protection: Protection
    align: int


def plan(image: ElfImage, bias: int, page_size: int) -> list[Operation]:
    """List the operations of the loader that the file is for."""
    if image.type_number not in (ET_EXEC, ET_DYN):
        raise ValueError(f"{image.name}: a {image.kind} file is not loaded")
    if bias % page_size:
        raise ValueError(f"a bias of {bias:#x} is not a multiple of the page size, {page_size}")
    if image.type_number == ET_EXEC and bias:
        raise ValueError(f"{image.name} is not position independent; its bias can only be 0, not {bias:#x}")
    loads = _loads(image, bias, page_size)
    if image.kind == "executable":
        return _by_kernel(image, loads, bias, page_size)
    return _by_linker(image, loads, bias, page_size)


def interpreter_plan(image: ElfImage, bias: int, page_size: int) -> list[Operation]:
    """List what the kernel does with the interpreter of a program, and what that does with itself."""
    if image.type_number not in (ET_EXEC, ET_DYN):
        raise ValueError(f"{image.name}: a {image.kind} file is no interpreter")
    loads = _loads(image, bias, page_size)
    found = _kernel_maps(loads, page_size, reserve=True, first=MapFlags(0), file="interpreter")
    return found + _relro(image, bias, page_size, "linker")


def _loads(image: ElfImage, bias: int, page_size: int) -> list[_Load]:
    limit = 1 << image.bits
    found: list[_Load] = []
    for index, segment in enumerate(image.segments):
        if segment.kind != "LOAD":
            continue
        name = f"segment {index}"
        if segment.file_size > segment.memory_size:
            raise Malformed(f"p_filesz of {name}: {segment.file_size:#x} is more than p_memsz")
        if segment.address + segment.memory_size + bias > limit:
            raise Malformed(f"p_memsz of {name}: it ends behind the last address of {image.bits} bits")
        if segment.offset + segment.file_size > image.size:
            raise Malformed(f"p_offset, p_filesz of {name}: it ends past the end of the file")
        if (segment.address - segment.offset) % page_size and segment.file_size:
            raise Malformed(f"p_offset of {name}: address and offset differ by no whole number of pages")
        if segment.align & (segment.align - 1):
            raise Malformed(f"p_align of {name}: {segment.align:#x} is no power of two")
        address = segment.address + bias
        if found and address < found[-1].memory_end:
            raise Malformed(f"p_vaddr of {name}: it begins before the end of {found[-1].name}")
        inside = address % page_size
        map_end = _up(address + segment.file_size, page_size)
        start = address - inside
        found.append(
            _Load(
                name,
                address,
                address + segment.file_size,
                address + segment.memory_size,
                start,
                map_end if segment.file_size else start,
                image.offset + segment.offset - inside,
                segment.protection,
                segment.align,
            )
        )
    if not found:
        raise Malformed("e_phnum: there is no segment to load")
    return found


def _by_kernel(image: ElfImage, loads: list[_Load], bias: int, page_size: int) -> list[Operation]:
    found = []
    stack = image.stack_protection
    if stack is not None:
        found.append(Operation("stack", 0, 0, stack | _READ_WRITE, why="PT_GNU_STACK"))
    found += _kernel_maps(
        loads,
        page_size,
        reserve=image.type_number == ET_DYN,
        first=MapFlags.FIXED_NOREPLACE,
        file="image",
    )
    end = max(load.memory_end for load in loads)
    found.append(Operation("brk", _up(end, page_size), 0, why="the heap begins behind the last segment"))
    # A program without an interpreter has the linker's start-up code in itself.
    by: Literal["linker", "program"] = "program" if image.interpreter is None else "linker"
    return found + _relocated(image, loads, bias, page_size, by)


def _kernel_maps(
    loads: list[_Load],
    page_size: int,
    *,
    reserve: bool,
    first: MapFlags,
    file: Literal["image", "interpreter"],
) -> list[Operation]:
    found: list[Operation] = []
    for index, load in enumerate(loads):
        flags = MapFlags.PRIVATE | (MapFlags.FIXED if index else first)
        length = load.map_end - load.map_start
        if length:
            whole = _up(loads[-1].memory_end, page_size) - load.map_start
            mapped = whole if reserve and not index else length
            found.append(
                Operation(
                    "mmap",
                    load.map_start,
                    mapped,
                    load.protection,
                    flags,
                    file,
                    load.map_offset,
                    why=load.name,
                )
            )
            if mapped > length:
                why = "the span of all segments was mapped to find room for it"
                found.append(Operation("munmap", load.map_end, mapped - length, why=why))
        if load.memory_end > load.file_end:
            zeros = load.map_start
            if length:
                # The kernel writes zeros only where the segment may be written.
                if load.protection & Protection.WRITE and load.file_end % page_size:
                    tail = _up(load.file_end, page_size) - load.file_end
                    found.append(
                        Operation(
                            "zero", load.file_end, tail, why=f"{load.name}: behind its bytes in the file"
                        )
                    )
                zeros = load.map_end
            end = _up(load.memory_end, page_size)
            if end > zeros:
                protection = _READ_WRITE | (load.protection & Protection.EXEC)
                found.append(
                    Operation("mmap", zeros, end - zeros, protection, _ANONYMOUS, why=f"{load.name}: zeros")
                )
    return found


def _by_linker(image: ElfImage, loads: list[_Load], bias: int, page_size: int) -> list[Operation]:
    found: list[Operation] = []
    first, last = loads[0], loads[-1]
    span = last.memory_end - first.map_start
    by: Literal["linker"] = "linker"
    align = max(load.align for load in loads)
    flags = MapFlags.PRIVATE | MapFlags.DENYWRITE
    if align > page_size:
        # Room for the span wherever in it the alignment falls; what is left over is given back.
        if bias % align:
            raise ValueError(f"a bias of {bias:#x} is not a multiple of the alignment, {align:#x}")
        room = span + align if span >= align else 2 * align
        reserved = MapFlags.PRIVATE | MapFlags.ANONYMOUS
        why = "room for the span of all segments at a multiple of their alignment"
        found.append(Operation("mmap", first.map_start, room, Protection.NONE, reserved, by=by, why=why))
        flags |= MapFlags.FIXED
    why = f"{first.name}, as long as the span of all segments"
    found.append(
        Operation("mmap", first.map_start, span, first.protection, flags, "image", first.map_offset, by, why)
    )
    if align > page_size:
        end = _up(first.map_start + span, page_size)
        left = first.map_start + room - end
        if left > 0:
            found.append(Operation("munmap", end, left, by=by, why="what the alignment did not need"))
    if any(later.map_start != earlier.map_end for earlier, later in itertools.pairwise(loads)):
        if last.map_start < first.map_end:
            raise Malformed(f"p_vaddr of {last.name}: it begins before the end of {first.name}")
        length = last.map_start - first.map_end
        why = "the holes between segments"
        found.append(Operation("mprotect", first.map_end, length, Protection.NONE, by=by, why=why))
    flags = MapFlags.PRIVATE | MapFlags.DENYWRITE | MapFlags.FIXED
    for index, load in enumerate(loads):
        if index and load.map_end > load.map_start:
            length = load.map_end - load.map_start
            found.append(
                Operation(
                    "mmap",
                    load.map_start,
                    length,
                    load.protection,
                    flags,
                    "image",
                    load.map_offset,
                    by,
                    load.name,
                )
            )
        if load.memory_end > load.file_end:
            found += _linker_zeros(load, page_size)
    found += _relocated(image, loads, bias, page_size, by)
    stack = image.stack_protection
    if stack is not None and stack & Protection.EXEC:
        found.append(Operation("stack", 0, 0, stack | _READ_WRITE, by=by, why="PT_GNU_STACK"))
    return found


def _linker_zeros(load: _Load, page_size: int) -> list[Operation]:
    found = []
    page = min(_up(load.file_end, page_size), load.memory_end)
    if page > load.file_end:
        start = load.file_end - load.file_end % page_size
        is_writable = bool(load.protection & Protection.WRITE)
        writable = load.protection | Protection.WRITE
        why = f"{load.name}: behind its bytes in the file"
        if not is_writable:
            found.append(Operation("mprotect", start, page_size, writable, by="linker", why=why))
        found.append(Operation("zero", load.file_end, page - load.file_end, by="linker", why=why))
        if not is_writable:
            found.append(Operation("mprotect", start, page_size, load.protection, by="linker", why=why))
    if load.memory_end > page:
        found.append(
            Operation(
                "mmap",
                page,
                load.memory_end - page,
                load.protection,
                _ANONYMOUS,
                by="linker",
                why=f"{load.name}: zeros",
            )
        )
    return found


def _relocated(
    image: ElfImage, loads: list[_Load], bias: int, page_size: int, by: Literal["linker", "program"]
) -> list[Operation]:
    found = []
    if image.has_text_relocations:
        closed = [load for load in loads if not load.protection & Protection.WRITE]
        for extra, what in ((Protection.WRITE, "to be relocated"), (Protection.NONE, "relocated")):
            for load in closed:
                length = _up(load.file_end, page_size) - load.map_start
                protection, why = load.protection | extra, f"{load.name}: {what}"
                found.append(Operation("mprotect", load.map_start, length, protection, by=by, why=why))
    return found + _relro(image, bias, page_size, by)


def _relro(image: ElfImage, bias: int, page_size: int, by: Literal["linker", "program"]) -> list[Operation]:
    segment = image.relro
    if segment is None:
        return []
    start = segment.address + bias
    start -= start % page_size
    end = segment.address + bias + segment.memory_size
    end -= end % page_size
    if end <= start:
        return []
    return [Operation("mprotect", start, end - start, Protection.READ, by=by, why="PT_GNU_RELRO")]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
