"""Descriptors that travel with bytes over a Unix socket (SCM_RIGHTS in unix(7))."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import threading
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Ancillary: TypeAlias = list[tuple[int, int, "array.array[int]"]]

__all__ = ["ROOM_BYTES", "discard", "is_shared_memory", "received", "rights"]

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


def is_shared_memory(descriptor: int) -> bool:
    """Whether it is of a file system that seals; asks nobody but the kernel, so it cannot hang."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def discard(descriptors: Sequence[int], patience_s: float = 0) -> None:
    """Close descriptors that a peer sent.

    Closing a file of FUSE waits, beyond the reach of any signal, for whoever serves it, who may be the peer.
    So all but shared memory is left to a thread.

    Args:
        descriptors: Open ones; they are gone afterwards.
        patience_s: How long to wait for the thread, in seconds: ordinary descriptors are closed by then.
    """
    slow = []
    for descriptor in descriptors:
        if is_shared_memory(descriptor):
            os.close(descriptor)
        else:
            slow.append(descriptor)
    if slow:
        thread = threading.Thread(target=_close_all, args=(slow,), name="quire-discard", daemon=True)
        thread.start()
        if patience_s > 0:
            thread.join(patience_s)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        # Linux has closed it, whatever close() reports.
        with contextlib.suppress(OSError):
            os.close(descriptor)
