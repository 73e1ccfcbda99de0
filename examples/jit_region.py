"""Code that is produced when it is first called: a region of functions, one on each page.

Function number n returns n * n. None of them exists before it is called: a call jumps to a page that is
missing, and the page's source compiles it. The memory is never writable where it is executable.

    python examples/jit_region.py
"""

from __future__ import annotations

import ctypes
import platform
import struct

import quire

FUNCTIONS = 10_000
PAGE = quire.PAGE_SIZE


def compiled(number: int) -> bytes:
    """Machine code of a function without arguments that returns ``number`` squared."""
    value = number * number
    if platform.machine() == "x86_64":
        # mov eax, value; ret
        return b"\xb8" + struct.pack("<I", value) + b"\xc3"
    if platform.machine() == "aarch64":
        # movz w0, low; movk w0, high, lsl 16; ret
        low, high = value & 0xFFFF, value >> 16
        return struct.pack("<III", 0x52800000 | low << 5, 0x72A00000 | high << 5, 0xD65F03C0)
    raise NotImplementedError(f"no code is known for {platform.machine()}")


def fill(offset: int, length: int) -> bytes:
    """Compile the functions of some whole pages; called in a helper process."""
    pages = range(offset // PAGE, (offset + length) // PAGE)
    return b"".join(compiled(number).ljust(PAGE, b"\0") for number in pages)


def open_functions(**options: str) -> quire.Region:
    """Open the region; nothing is compiled yet."""
    source = quire.FunctionSource(fill, FUNCTIONS * PAGE)
    return quire.Region(source, window_bytes=PAGE, executable=True, **options)  # type: ignore[arg-type]


def call(region: quire.Region, number: int) -> int:
    """Call a function of the region."""
    function = ctypes.CFUNCTYPE(ctypes.c_int)(region.address + number * PAGE)
    return function()


def main() -> None:
    with open_functions() as region:
        for number in (3, 1000, 9_999, 3):
            print(f"{number} squared is {call(region, number)}")
        stats = region.stats
        print(f"of {FUNCTIONS} functions {stats.fills} were compiled, at {stats.faults} calls")


if __name__ == "__main__":
    main()
