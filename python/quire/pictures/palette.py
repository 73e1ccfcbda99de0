"""Colours of the kinds of memory, safe for colour-blind eyes and told apart without colour too.

The hues are those of Okabe and Ito (jfly.uni-koeln.de/color), which people with any of the common kinds of
colour blindness tell apart. There are more kinds than safe hues, so some have a hatch, and all have a letter
for terminals without colour.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ADDED", "EXCLUSIVE", "KINDS", "REMOVED", "SHARED", "SWAPPED", "Tone", "ink", "slug", "tone"]


class Tone(NamedTuple):
    """How one kind of memory looks.

    Attributes:
        kind: The kind's name, for people too.
        light: Fill on a light background, ``#rrggbb``.
        dark: Fill on a dark background.
        hatch: ``""``, ``"stripes"``, ``"crosses"`` or ``"dots"``, drawn over the fill.
        letter: One ASCII character, for terminals without colour.
    """

    kind: str
    light: str
    dark: str
    hatch: str
    letter: str


KINDS: dict[str, Tone] = {
    each.kind: each
    for each in (
        Tone("image", "#0072b2", "#3d9ad1", "", "I"),
        Tone("mapped file", "#56b4e9", "#8ccbf0", "", "F"),
        Tone("heap", "#d55e00", "#ef7d2a", "", "H"),
        Tone("private data", "#e69f00", "#f0b53c", "", "P"),
        Tone("stack", "#f0e442", "#f0e442", "", "S"),
        Tone("shareable", "#009e73", "#2fbf96", "", "M"),
        Tone("quire", "#cc79a7", "#dd98be", "", "Q"),
        Tone("kernel", "#4b5563", "#7b8494", "", "K"),
        Tone("page tables", "#4b5563", "#7b8494", "dots", "T"),
        Tone("reserved", "#d6d9de", "#4b5563", "stripes", "-"),
        Tone("unusable", "#d6d9de", "#4b5563", "crosses", "x"),
    )
}
"""The kinds that processes have, in the order of legends."""

_SPARE = (("#0072b2", "#3d9ad1"), ("#e69f00", "#f0b53c"), ("#009e73", "#2fbf96"), ("#cc79a7", "#dd98be"))

EXCLUSIVE, SHARED, SWAPPED = "#e69f00", "#0072b2", "#cc79a7"
"""Pages in memory that one process has, that several have, and pages that are swapped out."""

ADDED, REMOVED = "#0072b2", "#d55e00"
"""What a comparison found new, and what it found gone."""


def tone(kind: str) -> Tone:
    """Say how a kind looks; one that `KINDS` lacks gets a safe hue with a hatch, always the same one."""
    known = KINDS.get(kind)
    if known is not None:
        return known
    number = sum(kind.encode("utf-8", "surrogateescape"))
    light, dark = _SPARE[number % len(_SPARE)]
    return Tone(kind, light, dark, ("stripes", "crosses", "dots")[number // len(_SPARE) % 3], "?")


def ink(fill: str) -> str:
    """Choose black or white for text on a fill (``#rrggbb``), whichever has the greater contrast (WCAG 2)."""
    channels = (int(fill[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def slug(kind: str) -> str:
    """Make a CSS class of a kind: ASCII letters, digits and hyphens."""
    return "k-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in kind)
