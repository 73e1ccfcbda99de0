"""``Maps.find``: what is at an address of a process."""

from __future__ import annotations

import bisect
import os
from typing import TYPE_CHECKING, NamedTuple

from quire import image, linking
from quire._native import PAGE_SIZE
from quire.errors import Malformed, PageError
from quire.process.kinds import LIBRARY, Kind
from quire.process.pages import read_pages
from quire.sources import FileSource, Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quire.image import Section, Segment
    from quire.process.procfs import Folder
    from quire.process.reading import Maps
    from quire.process.vma import VMA

__all__ = ["Found", "Page", "Place", "find"]

_SHF_TLS = 0x400


class Place(NamedTuple):
    """Where in a program file an address lies.

    Attributes:
        address: The address that the file itself gives to it, before it was moved to where it is loaded.
        segment: Kind, index and protection of the ELF segment that was mapped there; None if none was.
        section: The section's name; None if the file has none there.
        symbol: The nearest symbol at or below the address; None if there is none.
        symbol_offset: Bytes from the symbol to the address.
        is_inside: Whether the address is within the symbol's size; else the symbol is only the nearest.
    """

    address: int
    segment: str | None
    section: str | None
    symbol: str | None
    symbol_offset: int
    is_inside: bool


class Page(NamedTuple):
    """What is known of one page. None: it is not known.

    Attributes:
        present: It is in memory and in the process's page table.
        swapped: It is swapped out.
        is_file: It belongs to a file or shared memory, and not to this process alone.
        huge: A huge page holds it.
        frame: The number of its frame.
        mapped: How many page tables have it.
        mapped_evidence: How ``mapped`` is known, in words; where ``mapped`` is None, what is known instead.
        written: Whether it was written by this process, since the mapping was made or the last fork.
        written_evidence: How that is known.
    """

    present: bool
    swapped: bool
    is_file: bool
    huge: bool | None
    frame: int | None
    mapped: int | None
    mapped_evidence: str
    written: bool | None
    written_evidence: str


class Found(NamedTuple):
    """What is at an address.

    Attributes:
        address: The address.
        vma: The VMA that holds it; None if none does.
        before: The VMA below it.
        after: The VMA above it.
        file_offset: Where in the mapped file it lies; None if no file is mapped.
        place: Where in the program file it lies; None if that is no program, or cannot be read.
        objects: Objects of this library that it belongs to, in words; only of the own process.
        page: What is known of its page; None if no VMA holds it.
        notes: What could not be found out, in words.
    """

    address: int
    vma: VMA | None
    before: VMA | None
    after: VMA | None
    file_offset: int | None
    place: Place | None
    objects: tuple[str, ...]
    page: Page | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Show it as text for people, several lines."""
        return "\n".join(_lines(self))


def find(maps: Maps, folder: Folder, address: int) -> Found:
    """Tell what is at an address; see ``Maps.find``."""
    if not 0 <= address < 1 << 64:
        raise ValueError(f"{address:#x} is no address")
    vma = maps.at(address)
    index = bisect.bisect_right([each.start for each in maps], address)
    before = maps[index - 1 - (vma is not None)] if index > (vma is not None) else None
    after = maps[index] if index < len(maps) else None
    notes: list[str] = []
    objects: tuple[str, ...] = ()
    if maps.pid == os.getpid():
        from quire.process import owned  # noqa: PLC0415 - of the own process only

        objects = tuple(owned.describe(address, vma))
    if vma is None:
        return Found(address, None, before, after, None, None, objects, None, ())
    has_file = bool(vma.inode) or vma.path is not None
    return Found(
        address,
        vma,
        before,
        after,
        address - vma.start + vma.offset if has_file else None,
        _place(maps, folder, vma, address, notes),
        objects,
        _page(folder, vma, address),
        tuple(notes),
    )


def _page(folder: Folder, vma: VMA, address: int) -> Page:
    start = address // PAGE_SIZE * PAGE_SIZE
    pages = read_pages(folder, start, start + PAGE_SIZE)
    if not len(pages.numbers):
        written = None if not vma.is_private else False
        return Page(False, False, False, None, None, None, "not in memory", written, "not in memory")
    frames = pages.frames
    frame = int(frames[0]) if frames is not None and frames[0] else None
    present, is_file, exclusive = bool(pages.present[0]), bool(pages.file[0]), bool(pages.exclusive[0])
    is_zero = pages.zero is not None and bool(pages.zero[0])
    mapped, evidence = _mapped(frame, present, exclusive)
    if is_zero:
        mapped, evidence = None, "the page of zeros, which all share"
    written, why = _written(vma, present, is_file, exclusive, is_zero)
    huge = None if pages.huge is None else bool(pages.huge[0])
    return Page(present, bool(pages.swapped[0]), is_file, huge, frame, mapped, evidence, written, why)


def _mapped(frame: int | None, present: bool, exclusive: bool) -> tuple[int | None, str]:
    """Tell how many page tables have a page."""
    if not present:
        return None, "swapped out"
    if frame is not None:
        try:
            with open("/proc/kpagecount", "rb", buffering=0) as counts:
                word = os.pread(counts.fileno(), 8, frame * 8)
        except (FileNotFoundError, PermissionError):
            word = b""
        if len(word) == 8:
            return int.from_bytes(word, "little"), "counted by the kernel (kpagecount)"
    if exclusive:
        return 1, "pagemap says that no other page table has it"
    return None, "more than one: pagemap does not call it exclusive"


def _written(
    vma: VMA, present: bool, is_file: bool, exclusive: bool, is_zero: bool
) -> tuple[bool | None, str]:
    """Tell whether this process has written a page, as far as that shows."""
    if not vma.is_private:
        return None, "shared memory: who wrote it does not show"
    if is_zero:
        return False, "still the page of zeros"
    if is_file:
        return False, "still the file's own page"
    if vma.inode:
        return True, "a private copy of the file's page"
    if not present:
        return True, "swapped out, which only written pages are"
    if exclusive:
        return True, "anonymous and in no other page table: written here, or nobody else is left who has it"
    return False, "anonymous and in several page tables: not written since the fork that shares it"


def _place(maps: Maps, folder: Folder, vma: VMA, address: int, notes: list[str]) -> Place | None:
    """Find segment, section and symbol."""
    owner = _image_below(maps, vma)
    if owner is None:
        return None
    try:
        opened = _open(maps, folder, owner, notes)
        if opened is None:
            return None
        with opened as source:
            program = image.read(source)
            loads = [segment for segment in program.segments if segment.kind == "LOAD"]
            base = _base(maps, owner, loads)
            if base is None:
                if vma is owner:
                    notes.append("where the program file was loaded does not show")
                return None
            return _place_in(program, loads, address - base, is_file=vma is owner)
    except (Malformed, PageError, OSError, ValueError) as error:
        notes.append(f"the file cannot be read as a program: {error}")
    return None


def _image_below(maps: Maps, vma: VMA) -> VMA | None:
    """Return the VMA itself if a program is mapped there, or the program that ends where its memory begins.

    A program's variables that begin as zeros are in no file: they are anonymous memory behind it.
    """
    index = bisect.bisect_left([each.start for each in maps], vma.start)
    end = vma.start
    while maps[index].kind is not Kind.IMAGE:
        if maps[index].inode or not maps[index].is_private or maps[index].name or index == 0:
            return None
        index -= 1
        if maps[index].end != end:
            return None
        end = maps[index].start
    return maps[index]


def _open(maps: Maps, folder: Folder, owner: VMA, notes: list[str]) -> Source | None:
    """Open the file that is mapped."""
    if owner.name.startswith(LIBRARY):
        native = linking.source_of(owner.device, owner.inode) if maps.pid == os.getpid() else None
        if native is not None:
            # What is read of it through the file would be filled in by that, or be zeros.
            return Source(native, owner.label)
        notes.append(
            "the file was loaded out of an archive: parts of it that the process never touched "
            "read as zeros, so sections and symbols may be missing"
        )
    path = _file_of(folder, owner, notes)
    return None if path is None else FileSource(path)


def _file_of(folder: Folder, vma: VMA, notes: list[str]) -> str | None:
    """Find a path that leads to the very file that is mapped."""
    exact = f"/proc/{folder.pid}/map_files/{vma.start:x}-{vma.end:x}"
    try:
        os.stat(exact)
    except OSError:
        # It takes CAP_CHECKPOINT_RESTORE to follow such a link; the path may lead there too.
        pass
    else:
        return exact
    if vma.path is None or vma.is_deleted:
        notes.append("the mapped file has no name any more, and this user may not open it without one")
        return None
    path = f"/proc/{folder.pid}/root{vma.path}"
    try:
        stat = os.stat(path)
    except OSError as error:
        notes.append(f"the mapped file cannot be opened: {error}")
        return None
    if stat.st_ino != vma.inode:
        notes.append(f"{vma.path} is another file now than the one that is mapped")
        return None
    return path


def _base(maps: Maps, owner: VMA, loads: Sequence[Segment]) -> int | None:
    """Find what was added to the file's own addresses: from the nearest mapping of its first segment."""
    if not loads:
        return None
    first = loads[0]
    for vma in reversed(maps.overlapping(0, owner.end)):
        same = (vma.major, vma.minor, vma.inode) == (owner.major, owner.minor, owner.inode)
        if same and vma.offset == first.offset // PAGE_SIZE * PAGE_SIZE:
            return vma.start - first.address // PAGE_SIZE * PAGE_SIZE
    return None


def _place_in(program: image.Image, loads: Sequence[Segment], at: int, *, is_file: bool) -> Place | None:
    """Find segment, section and symbol of an address of the file's own."""
    segment = None
    for index, load in enumerate(loads):
        start = load.address // PAGE_SIZE * PAGE_SIZE
        end = -(-(load.address + load.memory_size) // PAGE_SIZE) * PAGE_SIZE
        if start <= at < end:
            segment = f"LOAD {index} {load.protection.letters}"
    if segment is None and not is_file:
        return None
    section = next(
        (
            each.name
            for each in program.sections
            if each.address and 0 <= at - each.address < each.size and not _is_template(each)
        ),
        None,
    )
    symbol = max(
        (
            each
            for each in program.symbols()
            if each.name and each.is_defined and each.kind != "TLS" and 0 < each.value <= at
        ),
        # Of several at one address the one that tells its size, and of these a global one.
        key=lambda each: (each.value, each.value + each.size > at, each.binding != "LOCAL"),
        default=None,
    )
    if symbol is None:
        return Place(at, segment, section, None, 0, False)
    offset = at - symbol.value
    return Place(at, segment, section, symbol.name, offset, offset < symbol.size)


def _is_template(section: Section) -> bool:
    """Tell whether a section only says how much zeroed memory each thread gets; it is mapped nowhere."""
    return bool(section.flags & _SHF_TLS) and section.kind == "NOBITS"


def _lines(found: Found) -> Iterator[str]:
    yield f"{found.address:#x}"
    vma = found.vma
    if vma is None:
        yield "  nothing is mapped here"
        if found.before is not None:
            yield f"  {_size(found.address - found.before.end)} above the end of {found.before}"
        if found.after is not None:
            yield f"  {_size(found.after.start - found.address)} below {found.after}"
    else:
        yield f"  in      {vma}"
        flags = f", flags {' '.join(vma.flags)}" if vma.flags else ""
        inside = _size(found.address - vma.start)
        yield f"  kind    {vma.kind}, {_size(vma.size)}, {inside} from its start{flags}"
    if found.file_offset is not None:
        yield f"  file    offset {found.file_offset:#x}"
    if found.place is not None:
        place = found.place
        section = place.section or "none"
        yield f"  program address {place.address:#x}, segment {place.segment}, section {section}"
        if place.symbol is not None:
            nearest = "" if place.is_inside else " (the nearest below; the address is not inside it)"
            yield f"  symbol  {place.symbol}+{place.symbol_offset:#x}{nearest}"
    for line in found.objects:
        yield f"  quire   {line}"
    if found.page is not None:
        yield from _page_lines(found.page)
    for note in found.notes:
        yield f"  note    {note}"


def _page_lines(page: Page) -> Iterator[str]:
    where = "in memory" if page.present else "swapped out" if page.swapped else "not in memory"
    huge = ", in a huge page" if page.huge else ""
    frame = "" if page.frame is None else f", frame {page.frame:#x}"
    yield f"  page    {where}{huge}{frame}"
    if page.present:
        times = "" if page.mapped is None else f"in {page.mapped} page tables: "
        yield f"  shared  {times}{page.mapped_evidence}"
    if page.present or page.swapped:
        written = {True: "yes", False: "no", None: "unknown"}[page.written]
        yield f"  written {written}: {page.written_evidence}"


def _size(count: int) -> str:
    """Show a number of bytes, exactly where it is small."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count} bytes"
