"""Names of machines as ELF files number them, and which of them this machine runs."""

from __future__ import annotations

import errno
import functools
import os
import struct
from typing import NamedTuple

from quire import memfd

__all__ = ["Ident", "identify", "kernel_runs", "machine_name", "machine_number", "native"]

_NAMES = {
    2: "sparc",
    3: "i386",
    4: "m68k",
    8: "mips",
    15: "parisc",
    18: "sparc32plus",
    20: "ppc",
    21: "ppc64",
    22: "s390",
    40: "arm",
    42: "sh",
    43: "sparcv9",
    50: "ia64",
    62: "x86_64",
    93: "arc",
    94: "xtensa",
    164: "hexagon",
    183: "aarch64",
    189: "microblaze",
    195: "arcv2",
    243: "riscv",
    247: "bpf",
    252: "csky",
    258: "loongarch",
    0x9026: "alpha",
}
_NUMBERS = {name: number for number, name in _NAMES.items()} | {"amd64": 62, "arm64": 183, "x86": 3}

IDENT_BYTES = 20
"""So many bytes at the start of an ELF file say what it is for."""

# No file can be in it, which execve tells with an errno that means nothing else here.
_NO_INTERPRETER = b"/dev/null/none\0"
_ARM_EABI5 = 0x0500_0000


class Ident(NamedTuple):
    """What the first bytes of an ELF file say of the machine that it is for."""

    machine: int
    """As ``e_machine``."""
    osabi: int
    osabi_version: int
    bits: int
    """32 or 64."""
    byte_order: str
    """``little`` or ``big``."""

    @property
    def name(self) -> str:
        """The machine's name, with what tells it apart from the usual one of this name."""
        name = machine_name(self.machine)
        usual = _USUAL.get(name)
        if usual is not None and usual != (self.bits, self.byte_order):
            name += f":{self.bits}:{'le' if self.byte_order == 'little' else 'be'}"
        return name

    @property
    def for_linux(self) -> bool:
        """Whether it says so, in one of the two ways that are usual; the kernel does not look at it."""
        return self.osabi in _LINUX

    def runs_as(self, other: Ident) -> bool:
        """Tell whether it is for Linux, and machine, word size and byte order are the other's."""
        return self.for_linux and (self.machine, *self[3:]) == (other.machine, *other[3:])


# System V, and GNU.
_LINUX = (0, 3)
_USUAL = {
    "i386": (32, "little"),
    "arm": (32, "little"),
    "x86_64": (64, "little"),
    "aarch64": (64, "little"),
    "riscv": (64, "little"),
    "loongarch": (64, "little"),
    "ppc": (32, "big"),
    "ppc64": (64, "big"),
    "s390": (64, "big"),
    "mips": (32, "big"),
    "sparc": (32, "big"),
    "sparcv9": (64, "big"),
    "m68k": (32, "big"),
}


def machine_name(number: int) -> str:
    """Name a machine as ``uname -m`` does, or by its number if it has no common name."""
    return _NAMES.get(number, f"machine-{number}")


def machine_number(name: str) -> int:
    """Find the number of a machine by its name, or by ``machine-N``.

    Raises:
        ValueError: There is no such name.
    """
    number = name.removeprefix("machine-")
    if number != name and number.isascii() and number.isdigit() and int(number) < 1 << 16:
        return int(number)
    try:
        return _NUMBERS[name]
    except KeyError:
        raise ValueError(f"no machine is called {name!r}; known are {', '.join(sorted(_NUMBERS))}") from None


def identify(head: bytes) -> Ident | None:
    """Read what the first 20 bytes of an ELF file say; None if they are not those of one."""
    if len(head) < IDENT_BYTES or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return None
    (machine,) = struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)
    return Ident(machine, head[7], head[8], 32 * head[4], "little" if head[5] == 1 else "big")


@functools.cache
def native() -> Ident:
    """Identify this process's own program: what it loads into itself must be for the same machine."""
    with open("/proc/self/exe", "rb") as file:
        found = identify(file.read(IDENT_BYTES))
    if found is None:
        raise OSError(f"/proc/self/exe, on {os.uname().machine}, does not begin like an ELF file")
    return found


@functools.cache
def kernel_runs(ident: Ident, flags: int | None = None) -> str | None:
    """Ask the kernel whether it runs programs for a machine, by executing one that cannot start.

    It is a header that names an interpreter that cannot be: the kernel gets to looking for it only if it
    accepts the machine. The answer is remembered.

    Args:
        ident: What the program is for.
        flags: As ``e_flags``; None for what is usual.

    Returns:
        ``native`` if the kernel does; ``rule`` if it starts something else for it, by a rule of
        ``binfmt_misc``; None if it refuses.

    Raises:
        Unsupported: The machine allows no executable memfd.
        OSError: There is no memory, process or descriptor.
    """
    if flags is None:
        flags = _ARM_EABI5 if machine_name(ident.machine) == "arm" else 0
    fd = memfd.create("quire-probe", executable=True)
    try:
        os.write(fd, _unstartable(ident, flags))
        nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
        pid = os.posix_spawn(f"/proc/self/fd/{fd}", ["quire-probe"], {}, file_actions=nowhere)
    except OSError as error:
        if error.errno == errno.ENOTDIR:
            return "native"
        if error.errno == errno.ENOEXEC:
            return None
        raise
    finally:
        os.close(fd)
    os.waitpid(pid, 0)
    return "rule"


def _unstartable(ident: Ident, flags: int) -> bytes:
    order = "<" if ident.byte_order == "little" else ">"
    wide = ident.bits == 64
    header_bytes, entry_bytes = (64, 56) if wide else (52, 32)
    at, size = header_bytes + entry_bytes, len(_NO_INTERPRETER)
    data = 1 if order == "<" else 2
    magic = b"\x7fELF" + bytes([ident.bits // 32, data, 1, ident.osabi, ident.osabi_version]) + bytes(7)
    shared_object, interpreter, readable = 3, 3, 4
    header = struct.pack(
        order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"),
        *(shared_object, ident.machine, 1, 0, header_bytes, 0, flags),
        *(header_bytes, entry_bytes, 1, 0, 0, 0),
    )
    if wide:
        segment = struct.pack(order + "IIQQQQQQ", interpreter, readable, at, at, at, size, size, 1)
    else:
        segment = struct.pack(order + "IIIIIIII", interpreter, at, at, at, size, size, readable, 1)
    return magic + header + segment + _NO_INTERPRETER
