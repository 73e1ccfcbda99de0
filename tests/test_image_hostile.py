"""Damaged and hostile program files: an exception that names file and field, and nothing else."""

import functools
import pathlib
import random
import shutil
import struct
import subprocess
from collections.abc import Callable

import pytest
from foreignwheels import downloaded
from pip._vendor import distlib
from test_image_macho import members as macho_members

import quire
import quire.image
from quire.image import Image
from quire.image.elf import ElfImage

MUTATIONS = 1000
SOURCE = r"""
#include <stdio.h>
__thread int own = 1;
static int chosen(void) { return 1; }
static int (*resolve(void))(void) { return chosen; }
int by_ifunc(void) __attribute__((ifunc("resolve")));
int main(void) { return printf("%d", own + by_ifunc()) < 0; }
"""
# Sizes, counts and offsets that overflow, or just fit.
INTERESTING = (0, 1, 7, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1, (1 << 64) - 4096)


def built(folder: pathlib.Path, name: str, *options: str) -> bytes:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (folder / "p.c").write_text(SOURCE)
    subprocess.run([compiler, "-o", str(folder / name), str(folder / "p.c"), *options], check=True)
    return (folder / name).read_bytes()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return built(tmp_path_factory.mktemp("image"), "program", "-pie")


def refused(question: Callable[[], object]) -> Exception | None:
    """How a question was refused, in the two ways in which it may be."""
    try:
        question()
    except (quire.Malformed, ValueError) as error:
        return error
    return None


def exercise(image: Image) -> None:
    """Ask everything."""
    for each in image.members or [image]:
        questions: list[Callable[[], object]] = [
            each.symbols,
            each.imports,
            each.exports,
            each.relocations,
            each.slots,
            each.load_plan,
            functools.partial(getattr, each, "sections"),
            functools.partial(getattr, each, "segments"),
            functools.partial(getattr, each, "needed"),
            functools.partial(getattr, each, "interpreter"),
            *(
                functools.partial(getattr, each, name)
                for name in ("dynamic", "notes", "build_id", "eagerness", "tls")
                if hasattr(type(each), name)
            ),
        ]
        if check := getattr(each, "check", None):
            questions.append(check)
        for question in questions:
            refusal = refused(question)
            if isinstance(refusal, quire.Malformed):
                assert str(refusal).startswith(each.name), refusal
            else:
                # A kind of file that is not loaded at all.
                assert refusal is None or question in (each.load_plan, check), refusal


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, or with a word overwritten; most of it where headers are."""
    out = bytearray(data)
    if rng.random() < 0.1:
        return bytes(out[: rng.randrange(len(out))])
    for _ in range(rng.choice((1, 1, 2, 5))):
        end = rng.choice((64, 1024, 8192, len(out)))
        at = rng.randrange(min(end, len(out)))
        if rng.random() < 0.5:
            out[at] ^= 1 << rng.randrange(8)
        else:
            size = rng.choice((2, 4, 8))
            at = min(at - at % size, len(out) - size)
            out[at : at + size] = (rng.choice(INTERESTING) & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(out)


def survives(data: bytes, seed: int) -> int:
    """Read many damaged copies; how many were refused at once."""
    rng = random.Random(seed)
    count = 0
    for _ in range(MUTATIONS):
        bad = mutated(data, rng)
        refusal = refused(functools.partial(quire.image.read, bad))
        if refusal is None:
            exercise(quire.image.read(bad))
        else:
            assert isinstance(refusal, quire.Malformed)
            assert str(refusal).startswith(f"<{len(bad)} bytes>")
            count += 1
    return count


@pytest.mark.parametrize(
    "options",
    [
        ("-pie",),
        ("-static",),
        ("-shared", "-fPIC", "-Wl,-z,pack-relative-relocs"),
        ("-c",),
        ("-shared", "-fPIC", "-Wl,--hash-style=sysv"),
    ],
    ids=" ".join,
)
def test_damaged_elf_files(tmp_path: pathlib.Path, options: tuple[str, ...]) -> None:
    data = built(tmp_path, "p", *options, "-s" if options == ("-static",) else "-g0")
    exercise(quire.image.read(data))
    assert 0 < survives(data, 1) < MUTATIONS


def test_damaged_pe_files() -> None:
    path = min(pathlib.Path(distlib.__file__).parent.glob("*.exe"), key=lambda each: each.stat().st_size)
    assert 0 < survives(path.read_bytes(), 2) < MUTATIONS


def test_damaged_macho_files(pytestconfig: pytest.Config) -> None:
    wheels = downloaded(pytestconfig, ("macosx_10_9_universal2", "macosx_10_13_universal2"), ("markupsafe",))
    name, data = macho_members(wheels[0])[0]
    assert 0 < survives(data, 3) < MUTATIONS, name


def header_field(data: bytes, kind: int, field: int, value: int) -> bytes:
    """The program with a field of its first header of this kind changed; fields are words of 8 bytes."""
    out = bytearray(data)
    offset, count = struct.unpack_from("<Q", out, 32)[0], struct.unpack_from("<H", out, 56)[0]
    for index in range(count):
        at = offset + 56 * index
        if struct.unpack_from("<I", out, at)[0] == kind:
            struct.pack_into("<Q", out, at + 8 * field, value % (1 << 64))
            return bytes(out)
    raise AssertionError("no such program header")


OFFSET, ADDRESS, FILE_SIZE, MEMORY_SIZE, ALIGN = 1, 2, 4, 5, 6
LOAD, DYNAMIC, INTERP = 1, 2, 3


@pytest.mark.parametrize(
    ("kind", "field", "value", "text"),
    [
        (LOAD, ADDRESS, -0x1000, "p_vaddr of segment 3: it begins before the end of segment 2"),
        (LOAD, MEMORY_SIZE, -1, "p_vaddr of segment 3: it begins before the end of segment 2"),
        (LOAD, MEMORY_SIZE, 0x3000, "p_vaddr of segment 3: it begins before the end of segment 2"),
        (LOAD, MEMORY_SIZE, 1, "p_filesz of segment 2"),
        (LOAD, OFFSET, 1 << 40, "p_offset, p_filesz of segment 2: it ends past the end of the file"),
        (LOAD, OFFSET, 1, "p_offset of segment 2: address and offset differ"),
        (LOAD, ALIGN, 3, "p_align of segment 2: 0x3 is no power of two"),
        (DYNAMIC, ADDRESS, 1 << 40, "PT_DYNAMIC: 0x10000000000 is in no loaded segment"),
        (DYNAMIC, OFFSET, 1 << 40, "PT_DYNAMIC: "),
        (INTERP, OFFSET, 1 << 40, "PT_INTERP: "),
    ],
)
def test_what_is_wrong_with_a_segment(program: bytes, kind: int, field: int, value: int, text: str) -> None:
    bad = header_field(program, kind, field, value)
    image = quire.image.read(bad)
    assert isinstance(image, ElfImage)
    with pytest.raises(quire.Malformed) as found:
        image.check()
    assert str(found.value).startswith(f"<{len(bad)} bytes>: {text}")


def test_a_segment_that_ends_behind_the_last_address(program: bytes) -> None:
    bad = header_field(header_field(program, LOAD, ADDRESS, -0x1000), LOAD, MEMORY_SIZE, 0x2000)
    with pytest.raises(
        quire.Malformed, match="p_memsz of segment 2: it ends behind the last address of 64 bits"
    ):
        quire.image.read(bad).load_plan()


def dynamic_value(data: bytes, tag: int, value: int) -> bytes:
    """The program with the value of an entry of its dynamic section changed."""
    image = quire.image.read(data)
    segment = next(each for each in image.segments if each.kind == "DYNAMIC")
    out = bytearray(data)
    for at in range(segment.offset, segment.offset + segment.file_size, 16):
        if struct.unpack_from("<q", out, at)[0] == tag:
            struct.pack_into("<Q", out, at + 8, value)
            return bytes(out)
    raise AssertionError("no such entry")


@pytest.mark.parametrize(
    ("tag", "value", "text"),
    [
        (5, 1 << 40, "DT_STRTAB: 0x10000000000 is in no loaded segment"),
        (6, 1 << 40, "DT_SYMTAB: 0x10000000000 is in no loaded segment"),
        (10, 1 << 40, "DT_STRSZ: 0x10000000000 is past the end of the segment"),
        (1, 1 << 30, "DT_STRTAB: the name at 0x40000000 does not end in it"),
        (7, 1 << 40, "DT_RELA: 0x10000000000 is in no loaded segment"),
        (8, 24 << 40, "DT_RELA: "),
    ],
)
def test_what_is_wrong_with_the_dynamic_section(program: bytes, tag: int, value: int, text: str) -> None:
    image = quire.image.read(dynamic_value(program, tag, value))
    assert isinstance(image, ElfImage)
    with pytest.raises(quire.Malformed) as found:
        image.check()
    assert text in str(found.value)


def test_a_relocation_outside_of_the_object(program: bytes) -> None:
    image = quire.image.read(program)
    assert isinstance(image, ElfImage)
    table = next(entry.value for entry in image.dynamic if entry.kind == "RELA")
    load = next(
        e for e in image.segments if e.kind == "LOAD" and e.address <= table < e.address + e.file_size
    )
    out = bytearray(program)
    struct.pack_into("<Q", out, load.offset + table - load.address, 1 << 40)
    bad = quire.image.read(bytes(out))
    assert isinstance(bad, ElfImage)
    with pytest.raises(
        quire.Malformed, match=r"relocation 0 .*: its target 0x10000000000 is in no loaded segment"
    ):
        bad.check()
    struct.pack_into("<Q", out, load.offset + table - load.address, image.relocations()[0].address)
    struct.pack_into("<I", out, load.offset + table - load.address + 12, 1 << 30)
    bad = quire.image.read(bytes(out))
    with pytest.raises(quire.Malformed, match="relocation 0: its symbol 1073741824 is none of"):
        bad.relocations()


def test_every_cut_of_the_headers(program: bytes) -> None:
    for length in range(64 + 56):
        with pytest.raises(quire.Malformed):
            quire.image.read(program[:length])


def without_sections(data: bytes) -> bytes:
    out = bytearray(data)
    struct.pack_into("<Q", out, 40, 0)
    struct.pack_into("<HH", out, 60, 0, 0)
    return bytes(out)


@pytest.mark.parametrize("path", ["/usr/bin/bash", "libc"])
def test_section_headers_are_not_needed(path: str) -> None:
    if path == "libc":
        maps = pathlib.Path("/proc/self/maps").read_text("utf-8")
        path = next(line.split()[-1] for line in maps.splitlines() if "/libc.so" in line or "/libc-" in line)
    data = pathlib.Path(path).read_bytes()
    whole, bare = quire.image.read(data), quire.image.read(without_sections(data))
    assert isinstance(whole, ElfImage)
    assert isinstance(bare, ElfImage)
    assert whole.sections
    assert not bare.sections
    for name in (
        "segments",
        "dynamic",
        "needed",
        "soname",
        "interpreter",
        "build_id",
        "relro",
        "tls",
        "entry",
        "kind",
    ):
        assert getattr(bare, name) == getattr(whole, name), name
    assert bare.load_plan() == whole.load_plan()
    assert bare.relocations() == whole.relocations()
    assert bare.slots() == whole.slots()
    assert bare.exports() == whole.exports()
    assert bare.dynamic_symbols() == whole.dynamic_symbols()
    assert bare.imports() == whole.imports()


def test_names_that_would_take_more_than_the_file_has() -> None:
    """Many symbols with one long name: refused, not copied."""
    count, length = 20000, 4000
    # A relocatable object of three sections: none, symbols, and the long name.
    symbols_at = 64 + 3 * 64
    names_at = symbols_at + 24 * count
    head = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 1, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 3, 0
    )
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 0, 2, 0, 0, symbols_at, 24 * count, 2, 0, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, names_at, length, 0, 0, 1, 0)
    symbol = struct.pack("<IBBHQQ", 1, 0x10, 0, 0, 0, 0)
    data = head + sections + symbol * count + b"\0" + b"x" * (length - 2) + b"\0"
    image = quire.image.read(data)
    with pytest.raises(quire.Malformed, match="st_name: more names than the file has room for"):
        image.symbols()


def test_a_file_that_changes_is_no_malformed_one(tmp_path: pathlib.Path, program: bytes) -> None:
    path = tmp_path / "program"
    path.write_bytes(program)
    with quire.image.read(path) as image:
        path.write_bytes(program[:1000])
        with pytest.raises(quire.PageError, match="program"):
            image.symbols()
