"""Mach-O and universal files of real wheels: ours against LIEF."""

import pathlib
import struct
import zipfile
from typing import Any

import lief
import pytest
from foreignwheels import downloaded

import quire
import quire.image
from quire.image import Image
from quire.image.macho import MachOImage

PLATFORMS = {
    ("macosx_10_9_universal2", "macosx_10_13_universal2"): ("markupsafe", "charset-normalizer"),
    # Chained fixups, and libraries of Fortran and C++.
    ("macosx_11_0_arm64",): ("numpy",),
    ("macosx_10_9_x86_64", "macosx_10_12_x86_64"): ("msgpack", "pydantic-core"),
}
LARGEST = 5 << 20
MACHINES = {"X86_64": "x86_64", "ARM64": "aarch64"}
N_STAB = 0xE0


@pytest.fixture(scope="module")
def files(pytestconfig: pytest.Config) -> list[tuple[str, bytes]]:
    found = []
    for platforms, projects in PLATFORMS.items():
        for wheel in downloaded(pytestconfig, platforms, projects):
            found += members(wheel)
    assert len(found) > 10
    return found


def members(wheel: pathlib.Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(wheel) as archive:
        return [
            (f"{wheel.name}!/{info.filename}", archive.read(info))
            for info in archive.infolist()
            if info.filename.endswith((".so", ".dylib")) and info.file_size <= LARGEST
        ]


def opened(data: bytes) -> list[MachOImage]:
    image = quire.image.read(data)
    found: list[Image] = list(image.members) or [image]
    for each in found:
        assert isinstance(each, MachOImage)
    return found  # type: ignore[return-value]


def test_as_lief_has_it(files: list[tuple[str, bytes]]) -> None:
    kinds = set()
    for name, data in files:
        # LIEF's programs live as long as the file that they are taken from.
        whole = lief.MachO.parse(list(data))
        theirs = [whole.at(index) for index in range(whole.size)]
        ours = opened(data)
        assert len(ours) == len(theirs), name
        for image, binary in zip(ours, theirs, strict=True):
            compare(image, binary, name)
            image.check()
            kinds |= {each.kind for each in image.relocations()}
    assert kinds >= {"rebase", "bind", "lazy"}


def compare(image: MachOImage, theirs: Any, name: str) -> None:
    assert image.machine == MACHINES[theirs.header.cpu_type.name], name
    assert image.build_id == (bytes(theirs.uuid.uuid).hex() if theirs.has_uuid else None), name
    own = [each.name for each in theirs.libraries if each.command == lief.MachO.LoadCommand.TYPE.ID_DYLIB]
    assert image.install_name == (own[0] if own else None), name
    needed = [each.name for each in theirs.libraries if each.command != lief.MachO.LoadCommand.TYPE.ID_DYLIB]
    assert list(image.needed) == needed, name
    assert image.run_paths == [each.path for each in theirs.rpaths], name
    assert [
        (e.kind, e.address, e.memory_size, e.offset, e.file_size, int(e.protection), e.flags)
        for e in image.segments
    ] == [
        (
            e.name,
            e.virtual_address,
            e.virtual_size,
            e.file_offset,
            e.file_size,
            int(e.init_protection),
            int(e.flags),
        )
        for e in theirs.segments
    ], name
    assert [(e.name, e.address, e.size, e.offset, e.align) for e in image.sections] == [
        (f"{e.segment_name},{e.name}", e.virtual_address, e.size, e.offset, 1 << e.alignment)
        for e in theirs.sections
    ], name
    plain = [each for each in theirs.symbols if each.origin.name == "SYMTAB" and not each.raw_type & N_STAB]
    assert [(each.name, each.value) for each in image.symbols()] == [(e.name, e.value) for e in plain], name
    assert [each.section is not None for each in image.symbols()] == [
        each.raw_type & 0xE != 0 for each in plain
    ], name
    exported = {each.name: each.export_info.address for each in theirs.symbols if each.has_export_info}
    base = next(each.address for each in image.segments if each.kind == "__TEXT")
    assert {each.name: each.value - base for each in image.exports()} == exported, name
    compare_fixups(image, theirs, name)


def library(name: str | None) -> str:
    """A library's name; nothing for what stands for several, which LIEF does not name."""
    return name if name and name.startswith(("/", "@")) else ""


def compare_fixups(image: MachOImage, theirs: Any, name: str) -> None:
    dyld = [each for each in theirs.relocations if each.origin.name in ("DYLDINFO", "CHAINED_FIXUPS")]
    rebases = sorted(each.address for each in image.relocations() if each.kind == "rebase")
    assert rebases == sorted(each.address for each in dyld), name
    bound = sorted(
        (each.address, each.symbol.name, library(each.symbol.library))
        for each in image.relocations()
        if each.symbol is not None
    )
    expected = sorted(
        (each.address, each.symbol.name, each.library.name if each.has_library else "")
        for each in theirs.bindings
    )
    assert bound == expected, name


def test_the_plan_maps_what_the_segments_say(files: list[tuple[str, bytes]]) -> None:
    bias = 0x7F0000000000
    for name, data in files:
        for image in opened(data):
            memory: dict[int, bytes] = {}
            for step in image.load_plan(bias):
                assert step.call in ("mmap", "zero")
                if step.file is not None:
                    assert step.offset % 4096 == 0, name
                    memory[step.address] = data[step.offset : step.offset + step.length]
            for segment in image.segments:
                if segment.file_size:
                    found = memory[segment.address + bias][: segment.file_size]
                    assert found == image.read(segment.offset, segment.file_size), name


def universal(*programs: bytes, wide: bool = False) -> bytes:
    """A universal file with these Mach-O files, each at a page."""
    entry = struct.Struct(">IIQQII") if wide else struct.Struct(">IIIII")
    head, body, offset = struct.pack(">II", 0xCAFEBABF if wide else 0xCAFEBABE, len(programs)), b"", 4096
    for program in programs:
        cpu, subtype = struct.unpack_from("<II", program, 4)
        size = len(program)
        head += entry.pack(cpu, subtype, offset, size, 12, *([0] if wide else []))
        body += program + bytes(-size % 4096)
        offset += size + -size % 4096
    return head.ljust(4096, b"\0") + body


@pytest.mark.parametrize("wide", [False, True])
def test_universal_files_of_both_widths(files: list[tuple[str, bytes]], wide: bool) -> None:
    alone = [data for _, data in files if data[:4] == b"\xcf\xfa\xed\xfe"][:2]
    image = quire.image.read(universal(*alone, wide=wide))
    assert image.format == "universal"
    assert len(image.members) == len(alone)
    for member, data in zip(image.members, alone, strict=True):
        single = quire.image.read(data)
        assert member.segments == single.segments
        assert member.exports() == single.exports()
        assert member.read(0, 64) == data[:64]
        file_offsets = [step.offset for step in member.load_plan() if step.file]
        assert file_offsets == [step.offset + member.offset for step in single.load_plan() if step.file]


def test_classes_of_java_are_not_universal() -> None:
    for major in (45, 52, 65):
        head = struct.pack(">IHH", 0xCAFEBABE, 0, major)
        with pytest.raises(quire.Malformed, match="no known format"):
            quire.image.read(head + bytes(100))


def test_members_that_overlap_or_leave_the_file(files: list[tuple[str, bytes]]) -> None:
    program = next(data for _, data in files if data[:4] == b"\xcf\xfa\xed\xfe")
    good = bytearray(universal(program))
    for offset, value, text in (
        (16, 0, "overlaps"),
        (20, len(good), "not within"),
        (16, 1 << 31, "not within"),
    ):
        bad = bytearray(good)
        struct.pack_into(">I", bad, offset, value)
        with pytest.raises(quire.Malformed, match=text):
            quire.image.read(bytes(bad))
