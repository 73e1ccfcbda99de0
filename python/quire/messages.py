"""The bytes of the messages that carry snapshots and mirrors over a socket; no socket in here.

The layout is in ``docs/formats.md``. Decoding trusts nothing: what does not follow the layout in every bit
raises Malformed.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from quire._native import MAX_LAYERS
from quire.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

__all__ = [
    "HEADER_BYTES",
    "MAX_DESCRIPTORS",
    "MIRROR",
    "SNAPSHOT",
    "Header",
    "LayerRecord",
    "decode_header",
    "decode_mirror",
    "decode_snapshot",
    "encode_mirror",
    "encode_snapshot",
]

SNAPSHOT = 1
MIRROR = 2

MAX_DESCRIPTORS = 64

_MAGIC = b"QUIM"
_VERSION = 1
_MAX_PAYLOAD_BYTES = 4096
_ATTACHED = 1

_HEADER = struct.Struct("<4sHHIIQ")
_LAYERS = struct.Struct("<II")
_LAYER = struct.Struct("<16sII")
_MIRROR = struct.Struct("<Q")

HEADER_BYTES = _HEADER.size


class Header(NamedTuple):
    """What a message announces about itself."""

    kind: int
    payload_bytes: int
    descriptors: int


class LayerRecord(NamedTuple):
    """One layer of a snapshot message."""

    layer_id: bytes
    attached: bool


def encode_snapshot(layer_ids: Sequence[bytes], known: Container[bytes]) -> bytes:
    """Write a snapshot message.

    Args:
        layer_ids: Identities, 16 bytes each, top layer first.
        known: Identities that the peer has; their descriptors do not come with the message.

    Returns:
        Header and payload, less than 2 KiB.
    """
    payload = bytearray(_LAYERS.pack(len(layer_ids), 0))
    attached = 0
    for layer_id in layer_ids:
        flags = 0 if layer_id in known else _ATTACHED
        attached += flags
        payload += _LAYER.pack(layer_id, flags, 0)
    return _HEADER.pack(_MAGIC, _VERSION, SNAPSHOT, len(payload), attached, 0) + payload


def encode_mirror(size_bytes: int) -> bytes:
    """Write the message of a mirror, whose one descriptor comes with it."""
    payload = _MIRROR.pack(size_bytes)
    return _HEADER.pack(_MAGIC, _VERSION, MIRROR, len(payload), 1, 0) + payload


def decode_header(data: bytes) -> Header:
    """Read the 24 bytes of a header.

    Raises:
        Malformed: They are not one, or announce more than a message may hold.
    """
    magic, version, kind, payload_bytes, descriptors, reserved = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise Malformed(f"a message starts with {_MAGIC!r}, this one with {magic!r}")
    if version != _VERSION:
        raise Malformed(f"message of version {version}; this quire reads version {_VERSION}")
    if kind not in (SNAPSHOT, MIRROR):
        raise Malformed(f"message of unknown type {kind}")
    if payload_bytes > _MAX_PAYLOAD_BYTES:
        raise Malformed(f"message announces {payload_bytes} bytes; at most {_MAX_PAYLOAD_BYTES} are allowed")
    if descriptors > MAX_DESCRIPTORS:
        raise Malformed(f"message announces {descriptors} descriptors; at most {MAX_DESCRIPTORS} are allowed")
    if reserved:
        raise Malformed(f"reserved field of the header is {reserved:#x} instead of 0")
    return Header(kind, payload_bytes, descriptors)


def decode_snapshot(payload: bytes, descriptors: int) -> list[LayerRecord]:
    """Read the payload of a snapshot message.

    Args:
        payload: Everything after the header.
        descriptors: How many came with the message.

    Returns:
        The layers, top layer first; as many are attached as there are descriptors.

    Raises:
        Malformed: The payload is not one, or the counts disagree.
    """
    if len(payload) < _LAYERS.size:
        raise Malformed(f"payload of {len(payload)} bytes is too short for a snapshot")
    count, padding = _LAYERS.unpack_from(payload)
    if not 1 <= count <= MAX_LAYERS or padding:
        raise Malformed(
            f"snapshot message with {count} layers (1 to {MAX_LAYERS} are allowed), padding {padding:#x}"
        )
    if len(payload) != _LAYERS.size + count * _LAYER.size:
        raise Malformed(f"payload of {len(payload)} bytes does not hold exactly {count} layers")
    records = []
    for layer_id, flags, padding in _LAYER.iter_unpack(payload[_LAYERS.size :]):
        if flags not in (0, _ATTACHED) or padding:
            raise Malformed(f"layer record with flags {flags:#x} and padding {padding:#x}")
        if not any(layer_id):
            raise Malformed("layer record with an identity of zeros")
        records.append(LayerRecord(layer_id, flags == _ATTACHED))
    if len({record.layer_id for record in records}) != count:
        raise Malformed("snapshot message names a layer twice")
    attached = sum(record.attached for record in records)
    if attached != descriptors:
        raise Malformed(f"{attached} layer records want a descriptor, {descriptors} came with the message")
    return records


def decode_mirror(payload: bytes, descriptors: int) -> int:
    """Read the payload of a mirror message.

    Returns:
        The size that the sender claims, in bytes.

    Raises:
        Malformed: The payload is not one, or not one descriptor came with it.
    """
    if len(payload) != _MIRROR.size:
        raise Malformed(f"payload of {len(payload)} bytes; that of a mirror has {_MIRROR.size}")
    if descriptors != 1:
        raise Malformed(f"a mirror comes with one descriptor, this one with {descriptors}")
    size_bytes: int = _MIRROR.unpack(payload)[0]
    if not 0 < size_bytes < 1 << 63:
        raise Malformed(f"a mirror cannot have {size_bytes} bytes")
    return size_bytes
