"""Formats that the kernel does not run by itself, and the programs that run them."""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.image import fatelf
from quire.image.machines import machine_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quire.image.machines import Ident
    from quire.sources import Source

__all__ = ["Foreign", "machine", "recognise"]

# What qemu-user is called for, where that is not the machine's name: by name, bits and byte order.
_QEMU = {
    ("arm", 32, "big"): "armeb",
    ("loongarch", 64, "little"): "loongarch64",
    ("mips", 32, "little"): "mipsel",
    ("mips", 64, "big"): "mips64",
    ("mips", 64, "little"): "mips64el",
    ("ppc64", 64, "little"): "ppc64le",
    ("riscv", 32, "little"): "riscv32",
    ("riscv", 64, "little"): "riscv64",
    ("s390", 64, "big"): "s390x",
    ("sparcv9", 64, "big"): "sparc64",
    ("sh", 32, "little"): "sh4",
    ("aarch64", 64, "big"): "aarch64_be",
}
_X86 = {"x86_64": ("box64", "FEXInterpreter"), "i386": ("box86", "FEXInterpreter")}
_TEXT_CONTROLS = frozenset(b"\t\n\v\f\r\x1b")
# A universal file with more architectures is none: a Java class has its version there, which is larger.
_UNIVERSAL_MAX = 39


@dataclass(frozen=True, slots=True)
class Foreign:
    """What a file is, and which programs run it."""

    what: str
    """With an article."""
    loader: str = ""
    """What runs it is called, for people; empty if nothing that is known does."""
    programs: tuple[str, ...] = ()
    """Programs any of which runs it, the preferred first."""
    options: tuple[str, ...] = ()
    """What stands between the program and the file."""
    note: str = ""

    def hints(self, name: str, environ: Mapping[str, str]) -> list[str]:
        """Say whether what runs it is installed, one sentence each.

        Args:
            name: Of the file.
            environ: Its ``PATH`` is searched.
        """
        found = [self.note] if self.note else []
        if not self.loader:
            return found
        path = environ.get("PATH", os.defpath)
        for program in self.programs:
            place = shutil.which(program, path=path)
            if place is not None:
                words = " ".join((program, *self.options, name))
                return [
                    *found,
                    f"{self.loader} is installed ({place}): {words} runs it",
                ]
        names = " or ".join(self.programs)
        return [*found, f"{self.loader} would run it and is not installed (no {names} on PATH)"]


def machine(ident: Ident, description: str) -> Foreign:
    """Tell what runs programs for another machine.

    Args:
        ident: The machine.
        description: For people.
    """
    name = machine_name(ident.machine)
    qemu = _QEMU.get((name, ident.bits, ident.byte_order), name)
    # These run on little-endian machines of 64 bits that are no x86.
    others = _X86.get(name, ()) if os.uname().machine in ("aarch64", "riscv64", "loongarch64") else ()
    programs = (*others, f"qemu-{qemu}", f"qemu-{qemu}-static")
    return Foreign(f"a program for {description}", f"an emulator of {qemu}", programs)


def recognise(head: bytes, source: Source) -> Foreign:
    """Tell what a file is that is neither ELF nor a script, by its content.

    Args:
        head: Its first 256 bytes, or all of it.
        source: Stays the caller's.
    """
    if not head:
        return Foreign("an empty file", note="a shell runs it as a script without commands")
    if fatelf.is_fatelf(head):
        return Foreign(
            "a FatELF file", note="quire fatelf run starts the program in it that is for this machine"
        )
    if head[:2] == b"\x1f\x8b" or head[:4] == b"\x28\xb5\x2f\xfd":
        return Foreign("a compressed file", note="quire image exec runs the program in it, if it is one")
    for test in (_windows, _apple, _java, _wasm, _zip, _bytecode):
        found = test(head, source)
        if found is not None:
            return found
    if _is_text(head):
        return Foreign(
            "text without #! in its first line",
            note="shells and execvp take such a file for a script of /bin/sh",
        )
    return Foreign(f"of no known format (it begins with {head[:4].hex(' ')})")


def _windows(head: bytes, source: Source) -> Foreign | None:
    if head[:2] != b"MZ" or len(head) < 64:
        return None
    (at,) = struct.unpack_from("<I", head, 60)
    header = source.read(at, min(24 + 240, source.size - at)) if at < source.size else b""
    if header[:4] != b"PE\0\0" or len(header) < 26:
        return Foreign("a program for MS-DOS", "DOSBox", ("dosbox", "dosbox-x"))
    (characteristics, magic) = struct.unpack_from("<HH", header, 22)
    what = "a Windows library" if characteristics & 0x2000 else "a Windows program"
    # The 15th data directory is that of .NET.
    directory = 24 + (112 if magic == 0x20B else 96) + 14 * 8
    if len(header) >= directory + 8 and struct.unpack_from("<I", header, directory)[0]:
        return Foreign(f"{what} for .NET (PE)", "Mono", ("mono",))
    return Foreign(f"{what} (PE{'32+' if magic == 0x20B else '32'})", "Wine", ("wine", "wine64"))


def _apple(head: bytes, source: Source) -> Foreign | None:  # noqa: ARG001 - as the other tests
    magic = head[:4]
    if magic in (b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe"):
        return Foreign("a Mach-O file, for macOS", "Darling", ("darling",))
    is_universal = magic in (b"\xca\xfe\xba\xbe", b"\xca\xfe\xba\xbf")
    if is_universal and 0 < int.from_bytes(head[4:8], "big") <= _UNIVERSAL_MAX:
        return Foreign("a universal Mach-O file, for macOS", "Darling", ("darling",))
    return None


def _java(head: bytes, source: Source) -> Foreign | None:  # noqa: ARG001
    if head[:4] == b"\xca\xfe\xba\xbe":
        note = "java wants the name of the class, and its directory with -cp"
        return Foreign("a Java class", "Java", ("java",), note=note)
    return None


def _wasm(head: bytes, source: Source) -> Foreign | None:  # noqa: ARG001
    if head[:4] == b"\0asm":
        return Foreign(
            "a WebAssembly module", "a WebAssembly runtime", ("wasmtime", "wasmer", "wasmedge", "iwasm")
        )
    return None


def _zip(head: bytes, source: Source) -> Foreign | None:
    if head[:4] not in (b"PK\3\4", b"PK\5\6"):
        return None
    # The directory at the end has the names; most archives that run have few members, and short comments.
    tail = source.read(max(0, source.size - (1 << 16)))
    if b"META-INF/MANIFEST.MF" in tail:
        return Foreign("a Java archive", "Java", ("java",), ("-jar",))
    if b"__main__.py" in tail:
        return Foreign("a zip archive with a Python program", "Python", ("python3",))
    note = "quire.image.exec runs a program in it: archive.zip!/member"
    return Foreign("a zip archive", note=note)


def _bytecode(head: bytes, source: Source) -> Foreign | None:  # noqa: ARG001
    if head[:4] == b"BC\xc0\xde":
        return Foreign("LLVM bitcode", "LLVM's lli", ("lli",))
    if head[2:4] == b"\r\n" and 0 < int.from_bytes(head[:2], "little") < 5000 and len(head) >= 16:
        return Foreign(
            "compiled Python", "Python", ("python3",), note="it must be of the same version of Python"
        )
    return None


def _is_text(head: bytes) -> bool:
    """Tell text as shells do: what there is of the first line has no zero byte or control character."""
    line = head.partition(b"\n")[0]
    return not any((byte < 32 and byte not in _TEXT_CONTROLS) or byte == 127 for byte in line)
