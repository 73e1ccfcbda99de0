"""Messages byte by byte, for tests that must be able to send wrong ones (docs/formats.md)."""

import array
import os
import socket
import struct
from collections.abc import Iterable

HEADER_BYTES = 24


def header(
    payload: bytes = b"",
    *,
    magic: bytes = b"QUIM",
    version: int = 1,
    kind: int = 1,
    length: int | None = None,
    descriptors: int = 1,
    reserved: int = 0,
) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack("<4sHHIIQ", magic, version, kind, size, descriptors, reserved) + payload


def records(
    layer_ids: Iterable[bytes], *, flags: int = 1, padding: int = 0, count: int | None = None, zero: int = 0
) -> bytes:
    packed = [struct.pack("<16sII", layer_id, flags, padding) for layer_id in layer_ids]
    return struct.pack("<II", len(packed) if count is None else count, zero) + b"".join(packed)


def snapshot_message(layer_ids: list[bytes]) -> bytes:
    return header(records(layer_ids), descriptors=len(layer_ids))


def mirror_message(size: int) -> bytes:
    return header(struct.pack("<Q", size), kind=2)


def put(sock: socket.socket, data: bytes, fds: list[int] | None = None) -> None:
    """Send all bytes; the descriptors go with the first and are closed here."""
    fds = fds or []
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sent = sock.sendmsg([data], ancillary)
    finally:
        for fd in fds:
            os.close(fd)
    sock.sendall(data[sent:])
