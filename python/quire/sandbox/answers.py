"""What comes out of a sandbox beside a snapshot: one typed message of bounded length, never a pickle.

A message is its length (u32, little-endian) and MessagePack. ``Returned`` is followed by a snapshot as in
``docs/formats.md``.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Annotated

import msgspec

from quire.errors import Malformed

__all__ = [
    "HEADER",
    "MAX_BYTES",
    "MAX_TEXT",
    "Answer",
    "Raised",
    "Returned",
    "ReturnedNothing",
    "body_bytes",
    "decode",
    "encode",
    "item_bytes",
]

HEADER = struct.Struct("<I")
MAX_BYTES = 16 << 10
MAX_TEXT = 2000
"""In characters."""

# Numbers and bytes. Objects would be pointers, and structures are more than anybody has asked for.
_ITEM = re.compile(r"[<>|][biufcSV]([1-9][0-9]{0,5})")

_Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
_Length = Annotated[int, msgspec.Meta(ge=0, le=1 << 47)]


class Returned(msgspec.Struct, tag="returned", forbid_unknown_fields=True, frozen=True):
    """The snapshot that follows holds an array."""

    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[list[_Length], msgspec.Meta(max_length=32)]


class ReturnedNothing(msgspec.Struct, tag="nothing", forbid_unknown_fields=True, frozen=True):
    """The function returned None."""


class Raised(msgspec.Struct, tag="raised", forbid_unknown_fields=True, frozen=True):
    """An exception left the function."""

    kind: _Text
    message: _Text
    traceback: _Text


Answer = Returned | ReturnedNothing | Raised

_decoder = msgspec.msgpack.Decoder(Answer)


def encode(answer: Answer) -> bytes:
    """The message with its length."""
    body = msgspec.msgpack.encode(answer)
    return HEADER.pack(len(body)) + body


def body_bytes(header: bytes | bytearray) -> int:
    """The length of a message, from the bytes before it.

    Raises:
        Malformed: It is longer than a message may be, or empty.
    """
    (length,) = HEADER.unpack(header)
    if not 0 < length <= MAX_BYTES:
        raise Malformed(f"the answer is said to be {length} bytes long, not 1 to {MAX_BYTES}")
    return int(length)


def decode(body: bytes) -> Answer:
    """Check and decode a message.

    Raises:
        Malformed: It is none.
    """
    try:
        answer: Answer = _decoder.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError) as error:
        raise Malformed(f"the answer is no message: {error}") from error
    if isinstance(answer, Returned):
        item_bytes(answer)
    return answer


def item_bytes(answer: Returned) -> int:
    """The length in bytes of the array that an answer announces.

    Raises:
        Malformed: The type of its items is not one that may be returned.
    """
    found = _ITEM.fullmatch(answer.dtype)
    if not found or (answer.dtype[1] in "biufc" and int(found[1]) not in (1, 2, 4, 8, 16, 32)):
        raise Malformed(f"the answer has items of type {answer.dtype!r}; numbers and bytes may be returned")
    return int(found[1]) * math.prod(answer.shape)
