"""Descriptors that travel with bytes over a Unix socket (SCM_RIGHTS in unix(7))."""

from __future__ import annotations

import array
import socket
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Ancillary: TypeAlias = list[tuple[int, int, "array.array[int]"]]

__all__ = ["ROOM_BYTES", "received", "rights"]

_INT_BYTES = array.array("i").itemsize
ROOM_BYTES = socket.CMSG_SPACE(253 * _INT_BYTES) + 256
"""For as many descriptors as the kernel attaches to one message (SCM_MAX_FD), and credentials."""


def rights(descriptors: Sequence[int]) -> Ancillary:
    """What to give to ``sendmsg``, so that copies of descriptors travel; they stay the caller's."""
    if not descriptors:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]


def received(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in what ``recvmsg`` gave; they are the caller's."""
    descriptors: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors += array.array("i", content[: len(content) - len(content) % _INT_BYTES])
    return descriptors
