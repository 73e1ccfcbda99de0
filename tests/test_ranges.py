"""Ranges is an immutable sequence of pairs, and packs them."""

import pickle
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quire
from quire import PAGE_SIZE, Ranges

PAIRS = st.lists(
    st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 40)).map(
        lambda pair: (pair[0], pair[0] + pair[1])
    ),
    max_size=20,
)


def packed(pairs: list[tuple[int, int]]) -> Ranges:
    """As the native diff makes them."""
    return Ranges._from_native(array("Q", [number for pair in pairs for number in pair]).tobytes())


@given(PAIRS)
def test_is_the_sequence_of_its_pairs(pairs: list[tuple[int, int]]) -> None:
    for ranges in (packed(pairs), Ranges(pairs)):
        assert len(ranges) == len(pairs)
        assert list(ranges) == pairs
        assert [ranges[place] for place in range(len(pairs))] == pairs
        assert [ranges[place - len(pairs)] for place in range(len(pairs))] == pairs
        assert list(reversed(ranges)) == pairs[::-1]
        assert ranges == pairs
        assert ranges == tuple(pairs)
        assert pairs == ranges
        assert hash(ranges) == hash(tuple(pairs))
        assert bool(ranges) == bool(pairs)
        assert ranges.total_bytes == sum(stop - start for start, stop in pairs)
        assert ranges.array().tolist() == [list(pair) for pair in pairs]
        assert pickle.loads(pickle.dumps(ranges)) == ranges
        assert all(pair in ranges for pair in pairs)


@given(PAIRS, st.slices(20))
def test_slices(pairs: list[tuple[int, int]], key: slice) -> None:
    part = packed(pairs)[key]
    assert isinstance(part, Ranges)
    assert part == pairs[key]
    assert part == Ranges(pairs[key])


def test_what_it_is_not_equal_to() -> None:
    ranges = Ranges([(0, 4096)])
    for other in ([], [(0, 8192)], [(0, 4096), (8192, 12288)], [0, 4096], "(", None, 5, [(0, 4096, 1)]):
        assert ranges != other
    assert (0, 8192) not in ranges
    assert 5 not in ranges
    assert Ranges() == ()


def test_refuses_what_is_no_range() -> None:
    for pair in [(4096, 4096), (5, 4), (-1, 4)]:
        with pytest.raises(ValueError, match="not a range"):
            Ranges([pair])
    with pytest.raises(OverflowError):
        Ranges([(0, 1 << 64)])
    with pytest.raises(IndexError):
        Ranges([(0, 1)])[1]
    with pytest.raises(TypeError):
        Ranges([(0, 1)])["0"]  # type: ignore[call-overload]


def test_cannot_be_changed() -> None:
    for ranges in (Ranges([(0, 1)]), packed([(0, 1)])):
        with pytest.raises(TypeError):
            ranges[0] = (0, 2)  # type: ignore[index]
        with pytest.raises(ValueError, match="read-only"):
            ranges.array()[0] = 5
        with pytest.raises(TypeError):
            ranges._flat[0] = 5


def test_repr_is_short() -> None:
    assert repr(Ranges()) == "Ranges([])"
    assert repr(Ranges([(0, 1), (2, 3)])) == "Ranges([(0, 1), (2, 3)])"
    many = Ranges((start, start + 1) for start in range(0, 200_000, 2))
    assert len(repr(many)) < 150
    assert "100000 ranges" in repr(many)


def test_those_of_a_diff_are_aligned_merged_and_ascending() -> None:
    with quire.Segment(64 * PAGE_SIZE + 10) as segment:
        first = segment.snapshot()
        for page in (3, 4, 5, 9, 64):
            segment[page * PAGE_SIZE + 7] = 1
        ranges = first.diff(segment.snapshot())
        assert ranges == [
            (3 * PAGE_SIZE, 6 * PAGE_SIZE),
            (9 * PAGE_SIZE, 10 * PAGE_SIZE),
            (64 * PAGE_SIZE, 65 * PAGE_SIZE),
        ]
        assert ranges.total_pages == 5
        assert ranges.array().dtype == np.uint64
