"""PE files of real wheels: ours against pefile."""

import pathlib
import struct
import zipfile
from typing import Any

import pefile
import pytest
from foreignwheels import downloaded
from pip._vendor import distlib

import quire.image
from quire.image.pe import PeImage

PAGE = 4096
# Two of 32 bits and several of 64, made by Visual C++, by LLVM and by Rust.
PROJECTS = {
    "win_amd64": ("numpy", "lxml", "orjson"),
    "win32": ("lxml", "orjson"),
}
LARGEST = 1 << 20


@pytest.fixture(scope="module")
def files(pytestconfig: pytest.Config) -> list[tuple[str, bytes]]:
    found = []
    for platform, projects in PROJECTS.items():
        for wheel in downloaded(pytestconfig, (platform,), projects):
            found += members(wheel)
    assert len(found) > 20
    return found


def members(wheel: pathlib.Path, largest: int = LARGEST) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(wheel) as archive:
        return [
            (f"{wheel.name}!/{info.filename}", archive.read(info))
            for info in archive.infolist()
            if info.filename.endswith((".pyd", ".dll", ".exe")) and info.file_size <= largest
        ]


def opened(data: bytes) -> PeImage:
    image = quire.image.read(data)
    assert isinstance(image, PeImage)
    return image


def text(name: bytes | None) -> str | None:
    return None if name is None else name.decode("utf-8", "surrogateescape")


def imports_of(theirs: Any) -> list[Any]:
    entries = [(entry, False) for entry in getattr(theirs, "DIRECTORY_ENTRY_IMPORT", ())]
    entries += [(entry, True) for entry in getattr(theirs, "DIRECTORY_ENTRY_DELAY_IMPORT", ())]
    return [
        (
            text(entry.dll),
            # pefile knows some ordinals of Windows' own libraries by name.
            "" if one.import_by_ordinal else text(one.name),
            one.ordinal if one.import_by_ordinal else None,
            one.address,
            is_delayed,
        )
        for entry, is_delayed in entries
        for one in entry.imports
    ]


def described_imports(image: PeImage) -> list[Any]:
    return [
        (slot.symbol.library, slot.symbol.name, slot.symbol.ordinal, slot.address, slot.is_lazy)
        for slot in image.slots()
        if slot.symbol
    ]


def test_as_pefile_has_it(files: list[tuple[str, bytes]]) -> None:
    for name, data in files:
        image = opened(data)
        theirs = parsed(data, "IMPORT", "EXPORT", "BASERELOC", "DELAY_IMPORT")
        head = theirs.OPTIONAL_HEADER
        assert image.image_base == head.ImageBase, name
        assert (image.entry or image.image_base) == head.ImageBase + head.AddressOfEntryPoint, name
        assert (image.image_size, image.headers_size) == (head.SizeOfImage, head.SizeOfHeaders), name
        assert (image.section_align, image.file_align) == (head.SectionAlignment, head.FileAlignment), name
        assert image.dll_characteristics == head.DllCharacteristics, name
        assert (image.kind == "shared object") == theirs.is_dll(), name
        assert [
            (one.name, one.address, one.size, one.offset, one.file_size, one.flags) for one in image.sections
        ] == [
            (
                text(one.Name.split(b"\0")[0]),
                head.ImageBase + one.VirtualAddress,
                one.Misc_VirtualSize,
                one.PointerToRawData,
                one.SizeOfRawData,
                one.Characteristics,
            )
            for one in theirs.sections
        ], name
        assert described_imports(image) == imports_of(theirs), name
        exports = getattr(theirs, "DIRECTORY_ENTRY_EXPORT", None)
        assert sorted(
            (one.ordinal or 0, one.name, one.value - head.ImageBase if not one.forward else 0, one.forward)
            for one in image.exports()
        ) == sorted(
            (one.ordinal, text(one.name) or "", 0 if one.forwarder else one.address, text(one.forwarder))
            for one in (exports.symbols if exports else ())
            if one.address
        ), name
        blocks = getattr(theirs, "DIRECTORY_ENTRY_BASERELOC", ())
        assert [(one.address - head.ImageBase, one.kind) for one in image.relocations()] == [
            (entry.rva, pefile.RELOCATION_TYPE[entry.type].removeprefix("IMAGE_REL_BASED_"))
            for block in blocks
            for entry in block.entries
            if entry.type
        ], name
        image.check()


def parsed(data: bytes, *kinds: str) -> Any:
    theirs = pefile.PE(data=data, fast_load=True)
    theirs.parse_data_directories([pefile.DIRECTORY_ENTRY[f"IMAGE_DIRECTORY_ENTRY_{kind}"] for kind in kinds])
    return theirs


def test_thread_local_storage(pytestconfig: pytest.Config) -> None:
    found = []
    for wheel in downloaded(pytestconfig, ("win_amd64",), ("numpy",)):
        for name, data in members(wheel, largest=1 << 30):
            image, theirs = opened(data), parsed(data, "TLS")
            tls = getattr(theirs, "DIRECTORY_ENTRY_TLS", None)
            assert (image.tls is None) == (tls is None), name
            if image.tls is None or tls is None:
                continue
            assert image.tls.address == tls.struct.StartAddressOfRawData, name
            assert image.tls.address + image.tls.size == tls.struct.EndAddressOfRawData, name
            word = image.bits // 8
            list_at = tls.struct.AddressOfCallBacks - theirs.OPTIONAL_HEADER.ImageBase
            for index, callback in enumerate((*image.tls.callbacks, 0)):
                raw = theirs.get_data(list_at + index * word, word)
                assert int.from_bytes(raw, "little") == callback, name
            found.append(len(image.tls.callbacks))
    assert 0 in found
    assert max(found) > 1


def test_delayed_imports(files: list[tuple[str, bytes]]) -> None:
    for name, data in files[:6]:
        theirs = parsed(data, "IMPORT")
        first = theirs.DIRECTORY_ENTRY_IMPORT[0].struct
        place = theirs.sections[-1].VirtualAddress
        # No wheel has such a directory, so what is imported at once is made to wait: a descriptor of it takes
        # the place of what the last section has.
        directory = theirs.OPTIONAL_HEADER.DATA_DIRECTORY[13]
        fields = (1, first.Name, 0, first.FirstThunk, first.OriginalFirstThunk, 0, 0, 0)
        theirs.set_bytes_at_rva(place, struct.pack("<8I", *fields) + bytes(32))
        changed = bytearray(theirs.__data__)
        struct.pack_into("<II", changed, directory.get_file_offset(), place, 64)
        image = opened(bytes(changed))
        expected = imports_of(parsed(bytes(changed), "IMPORT", "DELAY_IMPORT"))
        delayed = [each for each in expected if each[-1]]
        assert delayed, name
        assert described_imports(image) == expected, name
        assert image.delayed == (text(theirs.DIRECTORY_ENTRY_IMPORT[0].dll),), name


def test_programs() -> None:
    """The launchers that pip has for Windows."""
    folder = pathlib.Path(distlib.__file__).parent
    found = sorted(folder.glob("*.exe"))
    assert found
    for path in found:
        with quire.image.read(path) as image:
            theirs = parsed(path.read_bytes(), "IMPORT")
            assert image.kind == "executable"
            assert (
                image.entry == theirs.OPTIONAL_HEADER.ImageBase + theirs.OPTIONAL_HEADER.AddressOfEntryPoint
            )
            assert isinstance(image, PeImage)
            assert described_imports(image) == imports_of(theirs)


def executed(image: PeImage, data: bytes, bias: int) -> tuple[bytes, dict[int, int]]:
    """What a plan leaves in memory, relocation left out, and the protection of every page."""
    plan = image.load_plan(bias)
    base, span = plan[0].address, plan[0].length
    assert base == image.image_base + bias
    memory, protections = bytearray(span), {}
    for step in plan:
        at, end = step.address - base, step.end - base
        assert 0 <= at <= end <= span
        if step.call in ("mmap", "mprotect"):
            assert at % PAGE == 0
            for page in range(at // PAGE, -(-end // PAGE)):
                protections[page] = int(step.protection)
        if step.call in ("mmap", "zero"):
            memory[at:end] = bytes(end - at)
        if step.file is not None:
            piece = data[step.offset : step.offset + step.length]
            memory[at : at + len(piece)] = piece
    return bytes(memory), protections


def test_the_plan_lays_it_out_as_pefile_does(files: list[tuple[str, bytes]]) -> None:
    for name, data in files:
        image = opened(data)
        theirs = pefile.PE(data=data, fast_load=True)
        memory, protections = executed(image, data, 0)
        expected = theirs.get_memory_mapped_image()
        for section in theirs.sections:
            # Behind the bytes in the file pefile has zeros, and a loader the rest of the last page.
            start = section.VirtualAddress
            end = start + min(section.Misc_VirtualSize, section.SizeOfRawData)
            assert memory[start:end] == expected[start:end], name
            for page in range(start // PAGE, -(-end // PAGE)):
                flags = section.Characteristics
                assert protections[page] == (flags >> 30 & 1) | (flags >> 31) << 1 | (flags >> 29 & 1) << 2, (
                    name
                )
        assert memory[: head_size(theirs)] == data[: head_size(theirs)], name


def head_size(theirs: Any) -> int:
    return int(theirs.OPTIONAL_HEADER.SizeOfHeaders)


def test_rebasing_dirties_the_pages_that_relocation_changes(files: list[tuple[str, bytes]]) -> None:
    bias = 0x1230000
    for name, data in files:
        image = opened(data)
        theirs = parsed(data, "BASERELOC")
        before = theirs.get_memory_mapped_image()
        base = theirs.OPTIONAL_HEADER.ImageBase
        theirs.relocate_image(base + bias)
        after = theirs.get_memory_mapped_image()
        # The first page has the header, in which pefile notes the new base.
        changed = {
            at // PAGE
            for at in range(PAGE, len(before), PAGE)
            if before[at : at + PAGE] != after[at : at + PAGE]
        }
        dirty = {
            page
            for step in image.load_plan(bias)
            if step.call == "relocate"
            for page in range((step.address - base - bias) // PAGE, (step.end - base - bias) // PAGE)
        }
        assert changed == dirty, name
        assert all(step.call != "relocate" for step in image.load_plan(0)), name


def test_a_bias_that_cannot_be(files: list[tuple[str, bytes]]) -> None:
    image = opened(files[0][1])
    with pytest.raises(ValueError, match="64 KiB"):
        image.load_plan(PAGE)
