"""Frames and messages; and that the document says what the code does."""

import os
import pathlib
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.broker import protocol
from quire.errors import Malformed

DOCUMENT = (pathlib.Path(__file__).parents[1] / "docs" / "protocol.md").read_text("utf-8")
CLIENT = protocol.ClientMessage.__args__
SERVER = protocol.ServerMessage.__args__


def tag(kind: type) -> str:
    return kind.__struct_config__.tag


@pytest.mark.parametrize("kind", [*CLIENT, *SERVER], ids=tag)
def test_the_document_has_every_message_and_field(kind: type) -> None:
    rows = [line for line in DOCUMENT.split("\n") if line.startswith(f"| `{tag(kind)}` |")]
    assert len(rows) == 1, f"docs/protocol.md has {len(rows)} rows for {tag(kind)}"
    for field in kind.__struct_fields__:
        assert field == "id" or f"`{field}`" in rows[0], f"{tag(kind)} has a field {field}"


def test_the_document_has_no_others() -> None:
    known = {tag(kind) for kind in (*CLIENT, *SERVER)}
    after = DOCUMENT.split("## Requests")[1]
    rows = set(re.findall(r"^\| `([a-z!]+)` \|", after, re.MULTILINE))
    faults = {"unknown", "denied", "invalid", "quota", "exists", "kernel", "unsupported", "internal"}
    assert rows - faults == known


def test_a_message_survives() -> None:
    message = protocol.Lease(7, 3, 4096, 5, True)
    reader = protocol.FrameReader()
    frame = protocol.encode(message, 0)
    for byte in frame[:-1]:
        reader.feed(bytes([byte]), [])
        assert list(reader.frames()) == []
    assert reader.missing_bytes == 1
    reader.feed(frame[-1:], [])
    ((payload, descriptors),) = reader.frames()
    assert protocol.decode_request(payload) == message
    assert descriptors == []


def test_descriptors_belong_to_the_frames_that_announce_them() -> None:
    reader = protocol.FrameReader()
    reader.feed(protocol.encode(protocol.Ping(1)) + protocol.encode(protocol.Import(2), 1), [10])
    reader.feed(protocol.encode(protocol.Deposit(3, 1), 2), [11, 12])
    assert [descriptors for _, descriptors in reader.frames()] == [[], [10], [11, 12]]


@pytest.mark.parametrize(
    ("data", "descriptors"),
    [
        (b"XX\x01\x00\x00\x00\x00\x00", []),
        (b"QB\x02\x00\x00\x00\x00\x00", []),
        (b"QB\x01\x00\x01\x00\x01\x00", []),
        (b"QB\x01\x41\x00\x00\x00\x00", []),
        (b"QB\x01\x01\x00\x00\x00\x00", []),
        (b"QB\x01\x00\x00\x00\x00\x00", [5]),
        (b"", [5]),
        (b"QB", list(range(100, 170))),
    ],
)
def test_bad_frames(data: bytes, descriptors: list[int]) -> None:
    reader = protocol.FrameReader()
    reader.feed(data, descriptors)
    with pytest.raises(Malformed):
        list(reader.frames())


@pytest.mark.parametrize(
    "message",
    [
        protocol.Ping(-1),
        protocol.Ping(1 << 32),
        protocol.Make(1, 1, 1 << 48),
        protocol.Make(1, 1, -5),
        protocol.Lease(1, 1, -1, 5),
        protocol.Lease(1, 1, 0, 1 << 63),
        protocol.Revoke(1, 1, deadline_ms=10**9),
        protocol.Open(1, ""),
        protocol.Open(1, "a\0b"),
        protocol.Open(1, "\u20ac" * 100),
        protocol.Weaken(1, 1, 64),
        protocol.MakeBank(1, 1, 1 << 63, 0, 0),
        protocol.Done(1),
    ],
    ids=repr,
)
def test_bad_messages(message: protocol.Message) -> None:
    with pytest.raises(Malformed):
        protocol.decode_request(protocol.encode(message)[8:])


def test_unknown_fields_and_types() -> None:
    for payload in (
        {"t": "ping", "id": 1, "more": 2},
        {"t": "nothing", "id": 1},
        {"id": 1},
        [1],
        5,
        "x",
        {"t": "ping", "id": "x"},
    ):
        with pytest.raises(Malformed):
            protocol.decode_request(msgspec.msgpack.encode(payload))


def test_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="too long"):
        protocol.encode(protocol.Publish(1, 1, "x", 1, list(range(100_000, 200_000))))


@given(st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 3)), max_size=8))
def test_any_bytes(pieces: list[tuple[bytes, int]]) -> None:
    reader = protocol.FrameReader()
    try:
        for data, count in pieces:
            reader.feed(data, [os.O_RDONLY] * count)
            for payload, _ in reader.frames():
                protocol.decode_request(payload)
    except Malformed:
        pass


@given(st.binary(max_size=200))
def test_any_payload(payload: bytes) -> None:
    for decode in (protocol.decode_request, protocol.decode_reply):
        try:
            decode(payload)
        except Malformed:
            continue
