"""Text for people of names, sizes and addresses that may hold anything."""

from __future__ import annotations

import unicodedata

__all__ = ["address", "clipped", "frame_name", "printable", "size"]

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of characters that draw nothing, break lines, or turn the direction of what follows."""


def printable(name: str | bytes) -> str:
    r"""Make every character of a name visible, so that it cannot pretend to be something else.

    Args:
        name: Bytes are taken as UTF-8; those that are none are shown as ``\xNN``, as are surrogate escapes.

    Returns:
        The name, with control and format characters and lone surrogates written as escapes (``\n``,
        ``\u202e``), and a backslash that was there as it was. It has no line break and no character
        that XML forbids.
    """
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _INVISIBLE else c for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def size(count: int) -> str:
    """Write a number of bytes with three digits and a binary unit: ``0``, ``12.5 MiB``."""
    if not count:
        return "0"
    value = float(abs(count))
    sign = "-" if count < 0 else ""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))
    unit = next(units)
    while value >= 999.5 and unit != "EiB":
        value /= 1024
        unit = next(units)
    digits = 0 if value >= 99.95 or unit == "B" else 1 if value >= 9.995 else 2
    number = f"{value:.{digits}f}"
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return f"{sign}{number} {unit}"


def address(value: int) -> str:
    """Write an address as the tools do: ``0x7f0012345000``."""
    return f"{value:#x}"


def frame_name(number: int) -> str:
    """Name a frame of a model: A, B, … Z, AA, AB for 1, 2, … and 0 for the page of zeros."""
    name = ""
    while number > 0:
        number, letter = divmod(number - 1, 26)
        name = chr(ord("A") + letter) + name
    return name or "0"


def clipped(text: str, characters: int, *, keep_end: bool = False) -> str:
    """Cut a text to a number of characters, with an ellipsis where something is missing.

    Args:
        text: Any text.
        characters: The most that the result has; 0 gives the empty text.
        keep_end: Cut at the start, as suits paths.
    """
    if len(text) <= characters:
        return text
    if characters < 2:
        return "…"[:characters]
    return "…" + text[1 - characters :] if keep_end else text[: characters - 1] + "…"
