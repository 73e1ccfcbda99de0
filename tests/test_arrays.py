"""Views: right places, right bounds, never dangling."""

import array as std_array
import gc
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import quire
from quire import PAGE_SIZE, Segment


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment(1000)
    yield made
    gc.collect()
    made.close()


def test_whole_items_that_fit(segment: Segment) -> None:
    assert segment.array("u1").shape == (1000,)
    assert segment.array("f8").shape == (125,)
    assert segment.array("f8", offset=1).shape == (124,)
    assert segment.array("f8", offset=993).shape == (0,)
    assert segment.array("f8", offset=1000).shape == (0,)
    assert segment.array("u1", offset=999).shape == (1,)


def test_shapes(segment: Segment) -> None:
    assert segment.array("f4", 10).shape == (10,)
    assert segment.array("f4", np.int64(10)).shape == (10,)
    assert segment.array("f4", (5, 50)).shape == (5, 50)
    assert segment.array("f4", [5, 50]).shape == (5, 50)
    assert segment.array("f4", (-1, 7)).shape == (35, 7)
    assert segment.array("f4", (2, -1, 7)).shape == (2, 17, 7)
    assert segment.array("f4", -1).shape == (250,)
    assert segment.array("f4", ()).shape == ()
    assert segment.array("f4", (3, 0, 2)).shape == (3, 0, 2)
    assert segment.array("f4", 0, offset=1000).shape == (0,)
    assert segment.array("f4", (-1, 1000)).shape == (0, 1000)


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [
        ("u1", None, -1),
        ("u1", None, 1001),
        ("u1", 1001, 0),
        ("u1", 1, 1000),
        ("f8", 125, 1),
        ("f8", (1 << 40, 1 << 40), 0),
        ("f8", (1 << 63,), 0),
        ("f8", -2, 0),
        ("f8", (-1, -1), 0),
        ("f8", (-1, 0), 0),
        ("f8", (3, -5), 0),
        ("O", None, 0),
        ([("x", "i4"), ("y", "O")], None, 0),
        ("V0", None, 0),
        ("S0", None, 0),
    ],
)
def test_what_does_not_fit_is_a_value_error(
    segment: Segment, dtype: object, shape: object, offset: int
) -> None:
    with pytest.raises(ValueError, match=r".+"):
        segment.array(dtype, shape, offset)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [("f8", 1.5, 0), ("f8", (1.5,), 0), ("f8", None, 0.5), ("no such type", None, 0)],
)
def test_what_is_no_number_is_a_type_error(
    segment: Segment, dtype: object, shape: object, offset: int
) -> None:
    with pytest.raises(TypeError):
        segment.array(dtype, shape, offset)  # type: ignore[arg-type]


def test_no_copy_at_the_right_place(segment: Segment) -> None:
    view = segment.array("<u4", (3, 4), offset=100)
    view[1, 2] = 0x01020304
    assert segment[100 + 4 * 6 : 100 + 4 * 7] == b"\4\3\2\1"
    assert view.ctypes.data == segment.address + 100
    assert view.flags.c_contiguous
    assert view.flags.writeable


def test_unaligned(segment: Segment) -> None:
    view = segment.array("<u4", 3, offset=1)
    view[:] = [1, 2, 3]
    assert segment[1:13] == bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])


def test_structured_types(segment: Segment) -> None:
    records = np.dtype([("when", "datetime64[ns]"), ("price", ">f4"), ("tags", "S3", (2,))])
    view = segment.array(records, 10)
    view[3] = (np.datetime64("2020-01-01"), 1.5, [b"ab", b"cde"])
    again = segment.array(records)
    assert again[3]["price"] == 1.5
    assert again[3]["tags"].tolist() == [b"ab", b"cde"]


def test_dtypes_that_are_arrays(segment: Segment) -> None:
    assert segment.array("(3,2)f4", 5).shape == (5, 3, 2)
    assert segment.array("(3,2)f4", (-1, 2)).shape == (20, 2, 3, 2)


def test_a_view_keeps_the_memory(segment: Segment) -> None:
    view = segment.array("u1")[10:20].view("u2").T
    with pytest.raises(BufferError):
        segment.close()
    view[:] = 7
    del view
    gc.collect()
    segment.close()
    with pytest.raises(ValueError, match="closed"):
        segment.array("u1")
    with pytest.raises(ValueError, match="closed"):
        memoryview(segment)


def test_a_view_outlives_its_names() -> None:
    view = Segment(PAGE_SIZE).snapshot().map(private=True).array("u1")
    gc.collect()
    view[:] = 9
    assert view.sum() == 9 * PAGE_SIZE


def test_leaving_the_block_with_a_view() -> None:
    segment = Segment(10)
    with pytest.raises(BufferError), segment:
        view = segment.array("u1")
    assert not segment.closed
    del view
    segment.close()
    assert segment.closed
    segment.close()


def test_leaving_the_block_does_not_mask_an_exception() -> None:
    segment = Segment(10)
    with pytest.raises(KeyError) as caught, segment:  # noqa: PT012 - leaving the block must not raise
        view = segment.array("u1")
        raise KeyError
    assert any("stayed open" in note for note in caught.value.__notes__)
    view[:] = 1
    del view, caught
    gc.collect()
    segment.close()


def test_bytes_of_a_segment(segment: Segment) -> None:
    assert len(segment) == 1000
    assert segment
    segment[0] = 255
    segment[-1] = 254
    assert (segment[0], segment[-1], segment[999]) == (255, 254, 254)
    segment[10:14] = b"abcd"
    segment[14:18] = std_array.array("f", [1.0])
    segment[18:26] = np.array([(1, 2)], [("x", "<i4"), ("y", "<i4")])
    segment[26:30:2] = b"ef"
    assert segment[10:14] == b"abcd"
    assert segment[18:26] == bytes([1, 0, 0, 0, 2, 0, 0, 0])
    assert segment[26:30] == b"e\0f\0"
    assert segment[5:3] == b""
    segment[5:3] = b""
    assert segment[990:2000] == bytes(9) + b"\xfe"


def test_misuse_of_a_segment(segment: Segment) -> None:
    for place in (1000, -1001):
        with pytest.raises(IndexError):
            segment[place]
        with pytest.raises(IndexError):
            segment[place] = 1
    with pytest.raises(ValueError, match="fill"):
        segment[0:5] = b"1234"
    with pytest.raises(ValueError, match="fill"):
        segment[996:1004] = b"12345678"
    with pytest.raises(ValueError, match=r"."):
        segment[0:4:2] = b"123"
    with pytest.raises(ValueError, match=r"."):
        segment[0] = 256
    with pytest.raises(TypeError):
        segment[0] = b"a"
    with pytest.raises(TypeError):
        segment[0:2] = "ab"  # type: ignore[assignment]
    with pytest.raises(TypeError):
        segment["a"]  # type: ignore[call-overload]


def test_read_only_memory() -> None:
    segment = Segment(100)
    mapping = segment.snapshot().map()
    assert not mapping.array("u1").flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        mapping.array("u1").flags.writeable = True
    assert memoryview(mapping).readonly
    for key, value in ((0, 1), (slice(0, 2), b"ab"), (slice(0, 4, 2), b"ab")):
        with pytest.raises(TypeError):
            mapping[key] = value  # type: ignore[assignment]
    gc.collect()
    mapping.close()


@pytest.mark.parametrize(
    "data",
    [
        b"abc",
        bytearray(5000),
        np.arange(10_000),
        np.ones((3, 4, 5), ">f4"),
        np.zeros(4, [("x", "i2"), ("y", "S5")]),
        std_array.array("d", [1, 2, 3]),
        np.float64(3),
    ],
    ids=lambda data: type(data).__name__,
)
def test_from_buffer(data: bytes) -> None:
    segment = Segment.from_buffer(data)
    wanted = np.asarray(data).tobytes() if not isinstance(data, bytes | bytearray) else bytes(data)
    assert segment.size == len(wanted)
    assert segment[:] == wanted
    assert segment.snapshot().map()[:] == wanted


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shift", [1, 100, PAGE_SIZE, 5 * PAGE_SIZE])
def test_a_slice_of_the_segment_itself_may_overlap(frozen: bool, shift: int) -> None:
    data = np.random.default_rng(shift).integers(0, 256, 40 * PAGE_SIZE, np.uint8)
    segment = Segment.from_buffer(data)
    if frozen:
        segment.snapshot()
    for source, target in ((slice(0, -shift), slice(shift, None)), (slice(shift, None), slice(0, -shift))):
        data[target] = data[source].copy()
        segment[target] = memoryview(segment)[source]
        assert segment[:] == data.tobytes()


def test_from_buffer_refuses() -> None:
    with pytest.raises(ValueError, match="empty"):
        Segment.from_buffer(b"")
    with pytest.raises(ValueError, match="empty"):
        Segment.from_buffer(np.zeros((3, 0)))
    with pytest.raises(ValueError, match="contiguous"):
        Segment.from_buffer(np.zeros((3, 4))[:, 1:])
    with pytest.raises(ValueError, match="contiguous"):
        Segment.from_buffer(np.zeros((3, 4), order="F"))
    with pytest.raises(TypeError):
        Segment.from_buffer("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Segment.from_buffer(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, 1 << 63, 1 << 64])
@pytest.mark.parametrize("kind", [Segment, quire.LiveSegment])
def test_sizes_that_cannot_be(kind: type[Segment], size: int) -> None:
    with pytest.raises(ValueError, match="size"):
        kind(size)


def test_sizes_that_are_no_integers() -> None:
    with pytest.raises(TypeError):
        Segment(10.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Segment("10")  # type: ignore[arg-type]


def test_numpy_is_not_imported_without_an_array() -> None:
    script = """
import sys, quire
segment = quire.Segment(100)
segment[0:3] = b"abc"
segment.snapshot().map()[:]
segment.snapshot().diff(segment.snapshot())
assert "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
