"""The stubs of a procedure linkage table (PLT): code that jumps to where a slot of the GOT points.

Linkers write them in a few shapes. Each jumps through one word, whose address the instruction has; a stub is
taken for one only if that word is a slot.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

__all__ = ["find"]

EM_386, EM_X86_64, EM_AARCH64 = 3, 62, 183

# [endbr] [bnd] jmp *word, then what fills the stub up: push and jmp to the table's head, or nop.
_X86 = re.compile(
    rb"(?:\xf3\x0f\x1e[\xfa\xfb])?\xf2?\xff([\x25\xa3])(.{4})"
    rb"(?:\x68.{4}\xf2?\xe9|\x90|\x66\x90|\x0f\x1f\x44\x00\x00|\x66\x0f\x1f\x44\x00\x00)",
    re.DOTALL,
)
_ABSOLUTE, _FROM_EBX = b"\x25", b"\xa3"
# [bti c] adrp x16; ldr x17, [x16, …]; add x16, x16, …; [autia1716] br x17
_AARCH64 = re.compile(
    rb"(\x5f\x24\x03\xd5)?(.{3}[\x90\xb0\xd0\xf0].{3}\xf9.{3}\x91)(?:\x9f\x21\x03\xd5)?\x20\x02\x1f\xd6",
    re.DOTALL,
)
_ALIGN = 4


def find(
    machine: int,
    bits: int,
    got: int | None,
    slots: Collection[int],
    code: Iterable[tuple[int, bytes]],
) -> dict[int, int]:
    """Find the stubs of slots.

    Args:
        machine: ``e_machine``.
        bits: Of the file's class.
        got: What ``DT_PLTGOT`` says: where code of i386 that is position independent counts from.
        slots: Addresses of slots.
        code: Where to look: addresses, and what is there, little-endian.

    Returns:
        For each slot that has one the address of its first stub. Empty for machines whose stubs are not
        known.
    """
    if machine == EM_AARCH64 and bits == 64:
        return _found(code, slots, _AARCH64, _aarch64_word)
    if machine == EM_X86_64:
        return _found(code, slots, _X86, _x86_64_word)
    if machine == EM_386:
        return _found(code, slots, _X86, lambda match, _: _i386_word(match, got))
    return {}


def _found(
    code: Iterable[tuple[int, bytes]],
    slots: Collection[int],
    shape: re.Pattern[bytes],
    word: Callable[[re.Match[bytes], int], int | None],
) -> dict[int, int]:
    found: dict[int, int] = {}
    for start, data in code:
        for match in shape.finditer(data):
            address = start + match.start()
            target = word(match, start)
            if address % _ALIGN == 0 and target is not None and target in slots:
                found.setdefault(target, address)
    return found


def _x86_64_word(match: re.Match[bytes], start: int) -> int | None:
    if match[1] != _ABSOLUTE:
        return None
    # Counted from the end of the instruction.
    return start + match.end(2) + int.from_bytes(match[2], "little", signed=True)


def _i386_word(match: re.Match[bytes], got: int | None) -> int | None:
    value = int.from_bytes(match[2], "little")
    if match[1] == _FROM_EBX:
        return None if got is None else (got + value) & 0xFFFFFFFF
    return value


def _aarch64_word(match: re.Match[bytes], start: int) -> int | None:
    adrp, load, add = (int.from_bytes(match[2][at : at + 4], "little") for at in (0, 4, 8))
    if (adrp & 0x9F00001F, load & 0xFFC003FF, add & 0xFFC003FF) != (0x90000010, 0xF9400211, 0x91000210):
        return None
    pages = (adrp >> 5 & 0x7FFFF) << 2 | adrp >> 29 & 3
    pages -= (pages & 1 << 20) << 1
    inside = (load >> 10 & 0xFFF) * 8
    if inside != add >> 10 & 0xFFF:
        return None
    return (start + match.start(2) & ~0xFFF) + (pages << 12) + inside
