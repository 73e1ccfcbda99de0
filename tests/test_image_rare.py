"""Program files that are rarely met: core files, Mach-O of 32 bits, shared objects with text relocations."""

import ctypes
import itertools
import os
import pathlib
import shutil
import struct
import subprocess

import pytest
from libraries import compiled

import quire
import quire.image
from quire.image.elf import ElfImage


def core_by_gcore(folder: pathlib.Path) -> pathlib.Path:
    """A core file of a process that waits."""
    if shutil.which("gcore") is None:
        pytest.skip("there is no gcore, which comes with gdb")
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            command = ["gcore", "-o", str(folder / "core"), str(process.pid)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        finally:
            process.kill()
    made = folder / f"core.{process.pid}"
    if not made.exists():
        pytest.skip(f"gcore may not trace here: {done.stderr.strip()[-200:]}")
    return made


def looked_through(data: bytes) -> None:
    """Read it, and ask for what loaders would trust."""
    image = quire.image.read(data)
    assert isinstance(image, ElfImage)
    image.check()


def test_a_core_file(tmp_path: pathlib.Path) -> None:
    path = core_by_gcore(tmp_path)
    with quire.image.read(path) as core:
        assert isinstance(core, ElfImage)
        assert core.kind == "core"
        assert core.entry in (None, 0)
        loads = [segment for segment in core.segments if segment.kind == "LOAD"]
        assert len(loads) > 5
        assert all(first.address < second.address for first, second in itertools.pairwise(loads))
        # The program that it is of is mapped in it: its header is among the bytes.
        heads = [core.read(load.offset, 4) for load in loads if load.file_size]
        assert b"\x7fELF" in heads
        names = {note.owner for note in core.notes}
        assert "CORE" in names
        assert not core.needed
        core.check()
        with pytest.raises(ValueError, match="core"):
            core.load_plan()
        data = path.read_bytes()
    for length in (64, 1000, len(data) // 2):
        with pytest.raises(quire.Malformed):
            looked_through(data[:length])


def macho_32(order: str) -> bytes:
    """An executable of one segment with one section, for 32 bits: a PowerPC or an i386 one."""
    cpu = {"<": 7, ">": 18}[order]
    section = struct.pack(
        order + "16s16s9I", b"__text", b"__TEXT", 0x1F00, 0x100, 0xF00, 2, 0, 0, 0x400, 0, 0
    )
    size = 56 + len(section)
    segment = struct.pack(order + "2I16s4I4I", 1, size, b"__TEXT", 0x1000, 0x1000, 0, 0x1000, 7, 5, 1, 0)
    zero = struct.pack(order + "2I16s4I4I", 1, 56, b"__PAGEZERO", 0, 0x1000, 0, 0, 0, 0, 0, 0)
    data = struct.pack(order + "2I16s4I4I", 1, 56, b"__DATA", 0x2000, 0x3000, 0x1000, 0x10, 7, 3, 0, 0)
    commands = zero + segment + section + data
    head = struct.pack(order + "7I", 0xFEEDFACE, cpu, 3, 2, 3, len(commands), 0)
    return (head + commands).ljust(0x1000, b"\0") + bytes(0x10)


@pytest.mark.parametrize("order", ["<", ">"])
def test_mach_o_of_32_bits(order: str) -> None:
    data = macho_32(order)
    with quire.image.read(data) as program:
        assert program.format == "mach-o"
        assert program.bits == 32
        assert program.byte_order == {"<": "little", ">": "big"}[order]
        sizes = [(s.address, s.memory_size, s.offset, s.file_size) for s in program.segments]
        assert sizes == [(0, 0x1000, 0, 0), (0x1000, 0x1000, 0, 0x1000), (0x2000, 0x3000, 0x1000, 0x10)]
        assert [(s.name, s.address, s.size) for s in program.sections] == [("__TEXT,__text", 0x1F00, 0x100)]
        assert program.symbols() == []
        places = [(step.call, step.address, step.length, step.offset) for step in program.load_plan()]
    assert places == [
        ("mmap", 0, 0x1000, 0),
        ("mmap", 0x1000, 0x1000, 0),
        ("mmap", 0x2000, 0x1000, 0x1000),
        ("zero", 0x2010, 0xFF0, 0),
        ("mmap", 0x3000, 0x2000, 0),
    ]
    for length in (27, 60, 200):
        with pytest.raises(quire.Malformed):
            quire.image.read(data[:length]).load_plan()
    # A command that is longer than all of them.
    bad = bytearray(data)
    struct.pack_into(order + "I", bad, 32, 0xFFFFFFF0)
    with pytest.raises(quire.Malformed, match="<4112 bytes>"):
        quire.image.read(bytes(bad)).load_plan()


TEXT_RELOCATION = """
int value = 42;
int *pointer(void);
__asm__(".text\\n.balign 8\\nslot: .quad value\\n"
        ".globl pointer\\n.type pointer, @function\\npointer:\\n%s\\n");
"""
CODE = {"x86_64": "mov slot(%rip), %rax\\nret", "aarch64": "ldr x0, slot\\nret"}


def test_a_plan_with_text_relocations(tmp_path: pathlib.Path) -> None:
    code = TEXT_RELOCATION % CODE[os.uname().machine]
    path = compiled(tmp_path, "libtext.so", code, "-Wl,-z,notext")
    with quire.image.read(path) as library:
        assert isinstance(library, ElfImage)
        code = next(s for s in library.segments if s.kind == "LOAD" and s.protection.letters == "r-x")
        page = code.address // quire.PAGE_SIZE * quire.PAGE_SIZE
        steps = [step for step in library.load_plan() if step.address == page]
    # Made writable to be relocated, and not after it.
    assert [(step.call, step.protection.letters) for step in steps] == [
        ("mmap", "r-x"),
        ("mprotect", "rwx"),
        ("mprotect", "r-x"),
    ]
    assert [step.why for step in steps[1:]] == ["segment 1: to be relocated", "segment 1: relocated"]
    # The plan is what the dynamic linker really does: the word in the code is right.
    loaded = quire.image.load(path.read_bytes())
    loaded.pointer.restype = ctypes.c_void_p
    assert loaded.pointer() == ctypes.addressof(ctypes.c_int.in_dll(loaded, "value"))
