"""Neutral drawing: text that cannot lie, colours that can be told apart, a line for sparse addresses, SVG."""

import itertools
import unicodedata
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.pictures.axis import Axis
from quire.pictures.model import CELLS, PAGE, Change, Pages, Row, Sample, Total, changes
from quire.pictures.palette import ADDED, EXCLUSIVE, KINDS, REMOVED, SHARED, SWAPPED, ink, slug, tone
from quire.pictures.svg import Svg, fitted
from quire.pictures.text import clipped, printable, size

SVG = "{http://www.w3.org/2000/svg}"


def row(first: int, pages: int, kind: str = "private data", **more: object) -> Row:
    return Row(first * PAGE, (first + pages) * PAGE, kind, **more)


# Text


@given(st.one_of(st.binary(), st.text()))
def test_printable_shows_every_character(name: str | bytes) -> None:
    shown = printable(name)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"/usr/lib/libc.so.6", "/usr/lib/libc.so.6"),
        (b"a b (deleted)", "a b (deleted)"),
        (b"line\nbreak", "line\\nbreak"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("gr\u00fcn", "gr\u00fcn"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("\udcff", "\\xff"),
        ("</script>", "</script>"),
    ],
)
def test_printable(name: str | bytes, shown: str) -> None:
    assert printable(name) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (4096, "4 KiB"),
        (12 * 1024 + 512, "12.5 KiB"),
        (-4096, "-4 KiB"),
        (1 << 20, "1 MiB"),
        (123456789, "118 MiB"),
        (1 << 47, "128 TiB"),
        (1 << 63, "8 EiB"),
    ],
)
def test_size(count: int, shown: str) -> None:
    assert size(count) == shown


def test_clipped() -> None:
    assert clipped("abcdef", 6) == "abcdef"
    assert clipped("abcdef", 4) == "abc…"
    assert clipped("abcdef", 4, keep_end=True) == "…def"
    assert clipped("abcdef", 1) == "…"
    assert clipped("abcdef", 0) == ""
    assert fitted("abcdef", 12 * 0.62 * 4.5) == "abc…"
    assert fitted("abcdef", 10) == ""


# Colours


def seen(colour: str, matrix: list[list[float]]) -> np.ndarray:
    """The colour as somebody with a colour blindness sees it, in linear light."""
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return np.clip(np.array(matrix) @ linear, 0, 1)


def lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira and Fernandes 2009, full severity.
SIGHTS = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_kinds_are_told_apart(sight: str, scheme: str) -> None:
    """Two kinds with the same hatch differ in colour by more than is just noticeable (a distance of 2.3)."""
    for one, other in itertools.combinations(KINDS.values(), 2):
        if one.hatch != other.hatch:
            continue
        left, right = (lab(seen(getattr(each, scheme), SIGHTS[sight])) for each in (one, other))
        assert np.linalg.norm(left - right) > 7, f"{one.kind} and {other.kind} look alike"


@pytest.mark.parametrize("sight", SIGHTS)
def test_states_are_told_apart(sight: str) -> None:
    for one, other in [*itertools.combinations((EXCLUSIVE, SHARED, SWAPPED), 2), (ADDED, REMOVED)]:
        assert np.linalg.norm(lab(seen(one, SIGHTS[sight])) - lab(seen(other, SIGHTS[sight]))) > 15


def test_kinds_are_told_apart_without_colour() -> None:
    assert len({each.letter for each in KINDS.values()}) == len(KINDS)
    assert len({slug(kind) for kind in KINDS}) == len(KINDS)


def test_ink_is_readable() -> None:
    def luminance(colour: str) -> float:
        return float(np.array([0.2126, 0.7152, 0.0722]) @ seen(colour, SIGHTS["usual"]))

    for fill in {colour for each in KINDS.values() for colour in (each.light, each.dark)}:
        low, high = sorted((luminance(fill), luminance(ink(fill))))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"text on {fill} is hard to read"


def test_unknown_kind_looks_the_same_always() -> None:
    assert tone("a kind of tomorrow") == tone("a kind of tomorrow")
    assert tone("a kind of tomorrow").hatch


# Cells of pages


def test_cells_of_few_pages_are_pages() -> None:
    assert Pages.of(3, [0, 2], shared=[0]) == Pages(1, b"\x0f\x00\x0f", b"\x0f\x00\x00")


def test_cells_of_many_pages_lose_no_page() -> None:
    total = CELLS * 5 + 3
    pages = Pages.of(total, [0, 9, *range(16, 24), total - 1])
    assert pages.pages_per_cell == 8
    assert len(pages.resident) == -(-total // 8) <= CELLS
    assert {n: level for n, level in enumerate(pages.resident) if level} == {
        0: 1, 1: 1, 2: 15, len(pages.resident) - 1: 5,
    }  # fmt: skip


def test_no_pages() -> None:
    assert Pages.of(0, []) == Pages(1, b"")


def test_a_reservation_of_terabytes_costs_nothing() -> None:
    assert Pages.of(1 << 33, [1 << 32]).resident.count(1) == 1


# Sums and changes


def test_totals_are_in_the_order_of_the_palette() -> None:
    sample = Sample(
        "now",
        (row(1, 2, "stack", resident=PAGE), row(4, 1, "image", committed=5), row(9, 1, "stack", resident=1)),
        (Total("page tables", 0, 7, 7, 7),),
    )
    assert sample.totals() == [
        Total("image", 1, PAGE, 5, 0),
        Total("stack", 2, 3 * PAGE, 0, PAGE + 1),
        Total("page tables", 0, 7, 7, 7),
    ]


def test_changes() -> None:
    kept, gone, new = row(1, 1), row(3, 1), row(5, 1)
    grown = row(10, 1), row(10, 2)
    stack = row(100, 2, "stack"), row(90, 12, "stack")
    split = row(150, 9), row(150, 3), row(153, 6)
    touched = row(200, 1, resident=0), row(200, 1, resident=PAGE)
    found = changes(
        [kept, gone, grown[0], stack[0], split[0], touched[0]],
        [kept, new, grown[1], stack[1], split[1], split[2], touched[1]],
    )
    assert found == [
        Change(gone, None), Change(None, new), Change(*grown), Change(*stack), Change(*split[:2]),
        Change(None, split[2]), Change(*touched),
    ]  # fmt: skip
    verbs = ["removed", "added", "grown", "grown", "shrunk", "added", "changed"]
    assert [change.verb for change in found] == verbs
    assert changes([row(1, 1, proportional=5)], [row(1, 1, proportional=6)]) == []


# The line of addresses

SPANS = st.lists(
    st.tuples(st.integers(0, 1 << 51), st.sampled_from([1, 2, 33, 512, 1 << 18, 1 << 28])), min_size=1
)


@given(SPANS)
def test_axis_keeps_the_order_and_every_row_is_seen(spans: list[tuple[int, int]]) -> None:
    rows = [row(first, pages) for first, pages in spans]
    axis = Axis(rows)
    assert axis.addresses == sorted(set(axis.addresses))
    assert axis.places == sorted(axis.places)
    assert axis.places[0] == 0
    assert axis.places[-1] == 1
    for each in rows:
        start, middle, end = (axis.place(at) for at in (each.start, each.start + each.size // 2, each.end))
        assert 0 <= start < middle < end <= 1


def test_axis_of_nothing() -> None:
    assert Axis([]).place(5) == 0


def test_axis_does_not_let_many_or_much_hide_the_rest() -> None:
    rows = [row(0x555555554, 300), row(0x7FFFFFF00, 33)]
    rows += [row(0x600000000 + 2 * number, 1) for number in range(10_000)]
    rows += [row(0x700000000, 1 << 24)]
    axis = Axis(rows)
    assert len(axis.gaps) == 3
    for number in (0, 1, -1):
        assert axis.place(rows[number].end) - axis.place(rows[number].start) > 0.01


# SVG


def test_svg_escapes_everything() -> None:
    hostile = "</svg><script>alert(1)</script>\x00\x1b\u202e\"'&"
    svg = Svg(100, 50, title=hostile, description=hostile)
    svg.text(1, 2, hostile, style="small", anchor="end")
    svg.block(0, 0, 10, 10, "reserved", hint=hostile)
    with svg.group({"aria-label": hostile}, hint=hostile):
        svg.add("path", {"d": hostile})
    root = ET.fromstring(svg.render())
    assert not list(root.iter(f"{SVG}script"))
    shown = printable(hostile)
    assert root.findtext(f"{SVG}title") == shown
    assert root.find(f"{SVG}text").text == shown
    assert root.find(f"{SVG}g").get("aria-label") == shown
    assert root.find(f"{SVG}g/{SVG}title").text == shown


def test_svg_writes_short_numbers_and_hatches() -> None:
    svg = Svg(100, 50.5, title="t")
    svg.block(1 / 3, 0, 10.0, -0.001, "reserved")
    drawn = svg.render()
    assert 'viewBox="0 0 100 50.5"' in drawn
    assert 'x="0.33" y="0" width="10"' in drawn
    assert 'fill="url(#stripes)"' in drawn
    assert 'id="stripes"' in drawn
