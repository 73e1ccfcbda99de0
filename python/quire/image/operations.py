"""What a load plan is made of: the operations that turn a program file into an address space.

The types are plain data, so that a model of an address space can execute a plan and a picture can draw it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

__all__ = ["Call", "MapFlags", "Operation", "Protection"]

Call = Literal["mmap", "munmap", "mprotect", "zero", "copy", "relocate", "brk", "stack"]


class Protection(enum.IntFlag):
    """The kernel's ``PROT_`` bits."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4

    @classmethod
    def of(cls, *, read: object, write: object, execute: object) -> Protection:
        """Take what is allowed from flags of a format, each true or false."""
        return (
            (cls.READ if read else cls.NONE)
            | (cls.WRITE if write else cls.NONE)
            | (cls.EXEC if execute else cls.NONE)
        )

    @property
    def letters(self) -> str:
        """As ``/proc/PID/maps`` shows them: ``r-x``."""
        return "".join(letter if self & bit else "-" for letter, bit in zip("rwx", (1, 2, 4), strict=True))


class MapFlags(enum.IntFlag):
    """The kernel's ``MAP_`` bits, which are the same on x86-64 and aarch64."""

    SHARED = 0x01
    PRIVATE = 0x02
    FIXED = 0x10
    ANONYMOUS = 0x20
    DENYWRITE = 0x800
    FIXED_NOREPLACE = 0x100000


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a load plan. Addresses and lengths are in bytes.

    ============ =====================================================================================
    ``call``     what is done to ``[address, address + length)``
    ============ =====================================================================================
    mmap         mapped with ``protection`` and ``flags``: from ``offset`` of ``file``, or zeros if
                 ``file`` is None. Length is as the call has it; the kernel rounds it up to pages.
    munmap       unmapped
    mprotect     given ``protection``
    zero         overwritten with zeros: the part of a file's page that is past the segment's bytes
    copy         filled with bytes from ``offset`` of ``file``, where the file cannot be mapped
    relocate     written to by relocation: these whole pages become private copies
    brk          the heap begins at ``address``; length 0
    stack        the stack gets ``protection``; address and length are 0
    ============ =====================================================================================

    Attributes:
        call: What is done.
        address: The first byte.
        length: How many bytes.
        protection: For mmap, mprotect and stack.
        flags: For mmap.
        file: ``"image"``, or ``"interpreter"`` for the program that the image names; None for no file.
        offset: In the file, of the byte that comes to ``address``. Within a fat file it counts from the
            beginning of the whole file.
        by: ``"kernel"``; ``"linker"`` for the dynamic linker; ``"program"`` for its own start-up code.
        why: Which part of the file asks for it, in a few words.
    """

    call: Call
    address: int
    length: int
    protection: Protection = Protection.NONE
    flags: MapFlags = MapFlags(0)  # noqa: RUF009 - immutable
    file: Literal["image", "interpreter"] | None = None
    offset: int = 0
    by: Literal["kernel", "linker", "program"] = "kernel"
    why: str = ""

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.address + self.length
