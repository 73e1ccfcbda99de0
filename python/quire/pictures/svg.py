"""A small writer of SVG that stands alone: escaped, with a style for light and dark, and hatches.

Coordinates and lengths are in user units, which browsers draw as CSS pixels.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from quire.pictures.palette import KINDS, Tone, ink, slug
from quire.pictures.text import clipped, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["CHARACTER", "Svg", "fitted", "tone_rules"]

CHARACTER = 0.62
"""Width of a character of the font used, as a share of the font's size; a little generous."""

_STYLE = """
text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
text { font-size: 12px; fill: #111827; }
.page { fill: #ffffff; } .line { stroke: #6b7280; stroke-width: 1; fill: none; } .edge { stroke: #ffffff; }
.faint { fill: #4b5563; } .title { font-size: 15px; font-weight: bold; } .small { font-size: 10px; }
.on-light { fill: #000000; } .on-dark { fill: #ffffff; } .hatch { stroke: #111827; stroke-opacity: 0.55; }
.bad { fill: #9a3c00; } .box { fill: none; stroke: #111827; stroke-width: 2; } .quiet { fill: #e5e7eb; }
.single { fill: #374151; } .single-ink { fill: #ffffff; }
.several { fill: #d6d9de; stroke: #374151; stroke-width: 2; }
.mark { fill: #111827; }
@media (prefers-color-scheme: dark) {
text { fill: #e5e7eb; } .page { fill: #14171c; } .line { stroke: #9ca3af; } .edge { stroke: #14171c; }
.faint { fill: #b3bac5; } .on-light { fill: #000000; } .on-dark { fill: #ffffff; }
.hatch { stroke: #e5e7eb; } .bad { fill: #ff9f5a; } .box { stroke: #e5e7eb; } .quiet { fill: #343b45; }
.mark { fill: #e5e7eb; } .single { fill: #d6d9de; } .single-ink { fill: #000000; }
.several { fill: #374151; stroke: #d6d9de; }
}
"""

_PATTERNS = {
    "stripes": '<path class="hatch" d="M-2 2 L2 -2 M0 8 L8 0 M6 10 L10 6" stroke-width="1.2"/>',
    "crosses": '<path class="hatch" d="M0 0 L8 8 M8 0 L0 8" stroke-width="1"/>',
    "dots": '<path class="hatch" d="M3 4 h2" stroke-width="2"/>',
}


def tone_rules(tones: Iterable[Tone]) -> str:
    """Write the style rules by which ``class=slug(kind)`` fills with the kind's colour, light or dark.

    Text on such a fill has the class ``slug(kind) + "-ink"``.
    """
    tones = list(tones)

    def rules(fills: list[tuple[str, str]]) -> str:
        return "".join(
            f".{slug(kind)} {{ fill: {fill}; }} .{slug(kind)}-ink {{ fill: {ink(fill)}; }}\n"
            for kind, fill in fills
        )

    light = rules([(each.kind, each.light) for each in tones])
    dark = rules([(each.kind, each.dark) for each in tones])
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


def fitted(text: str, width: float, *, font_px: float = 12, keep_end: bool = False) -> str:
    """Cut a text to what fits a width; the empty text if that would be less than three characters of it."""
    characters = int(width / (font_px * CHARACTER))
    return "" if characters < min(3, len(text)) else clipped(text, characters, keep_end=keep_end)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


class Svg:
    """A picture under construction.

    Elements are drawn in the order in which they are added. Every text and attribute is escaped, and
    characters that are invisible or that XML forbids are shown as escapes.

    Args:
        width: Of the picture. It may be changed until it is rendered.
        height: The same.
        title: What it shows, for screen readers and tooltips.
        description: The same in more words.
        tones: Kinds that are drawn by `block`.
    """

    def __init__(
        self,
        width: float,
        height: float,
        *,
        title: str,
        description: str = "",
        tones: Iterable[Tone] = KINDS.values(),
    ) -> None:
        self.width = width
        self.height = height
        self._title = title
        self._description = description
        self._tones = {each.kind: each for each in tones}
        self._parts: list[str] = []

    def add(
        self, element: str, attributes: Mapping[str, float | str], text: str | None = None, *, hint: str = ""
    ) -> None:
        """Add an element.

        Args:
            element: Its name.
            attributes: Their names and values, not escaped.
            text: Its content.
            hint: A tooltip.
        """
        inner = f"<title>{_escaped(hint)}</title>" if hint else ""
        inner += _escaped(text) if text is not None else ""
        opening = f"<{element}{_attributes(attributes)}"
        self._parts.append(f"{opening}>{inner}</{element}>" if inner else f"{opening}/>")

    def text(self, x: float, y: float, text: str, *, style: str = "", anchor: str = "start") -> None:
        """Write a text whose baseline is at ``y``.

        Args:
            x: Where it starts, has its middle, or ends.
            y: The baseline.
            text: The text.
            style: Classes, such as ``title``, ``faint``, ``small``.
            anchor: ``start``, ``middle`` or ``end``.
        """
        attributes: dict[str, float | str] = {"x": x, "y": y}
        if style:
            attributes["class"] = style
        if anchor != "start":
            attributes["text-anchor"] = anchor
        self.add("text", attributes, text)

    def block(
        self, x: float, y: float, width: float, height: float, kind: str, *, hint: str = "", style: str = ""
    ) -> None:
        """Draw a box in the colour and hatch of a kind; ``style`` has classes besides that of the kind."""
        tone = self._tones[kind]
        box: dict[str, float | str] = {"x": x, "y": y, "width": width, "height": height}
        self.add("rect", {**box, "class": f"{slug(kind)} {style}".rstrip()}, hint=hint)
        if tone.hatch:
            self.add("rect", {**box, "fill": f"url(#{tone.hatch})", "pointer-events": "none"})

    @contextmanager
    def group(self, attributes: Mapping[str, float | str], *, hint: str = "") -> Iterator[None]:
        """Put what is added inside the block into one ``<g>``."""
        title = f"<title>{_escaped(hint)}</title>" if hint else ""
        self._parts.append(f"<g{_attributes(attributes)}>{title}")
        yield
        self._parts.append("</g>")

    def render(self) -> str:
        """Return the picture as a document of its own."""
        width, height = _number(self.width), _number(self.height)
        patterns = "".join(
            f'<pattern id="{name}" width="8" height="8" patternUnits="userSpaceOnUse">{lines}</pattern>'
            for name, lines in _PATTERNS.items()
            if any(each.hatch == name for each in self._tones.values())
        )
        described = f"<desc>{_escaped(self._description)}</desc>\n" if self._description else ""
        body = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" role="img">\n'
            f"<title>{_escaped(self._title)}</title>\n{described}"
            f"<style>{_STYLE}{tone_rules(self._tones.values())}</style>\n<defs>{patterns}</defs>\n"
            f'<rect class="page" width="{width}" height="{height}"/>\n{body}\n</svg>\n'
        )


def _escaped(text: str) -> str:
    return escape(printable(text))


def _attributes(attributes: Mapping[str, float | str]) -> str:
    return "".join(f" {name}={quoteattr(printable(_number(value)))}" for name, value in attributes.items())
