"""The journal: what the broker would forget when it is killed, in a memfd that somebody else keeps open.

A record is ``u32 length, u32 CRC-32, msgpack list of [key, value]``; nil removes the key. A record is all or
nothing, so what belongs together goes into one. Layout and keys are in ``docs/broker.md``.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING, Any

import msgspec

from quire.broker.crashpoints import crash_point
from quire.errors import Malformed

if TYPE_CHECKING:
    from quire.broker.keeper import Keeper

__all__ = ["Journal", "replay"]

_HEAD = struct.Struct("<II")
_SLACK_BYTES = 1 << 20


def replay(descriptor: int) -> tuple[dict[str, Any], int]:
    """Read a journal up to its last whole record; what a killed broker left half-written is no record.

    Returns:
        What it says, and the offset at which the next record goes.
    """
    entries: dict[str, Any] = {}
    data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    at = 0
    while at + _HEAD.size <= len(data):
        length, crc = _HEAD.unpack_from(data, at)
        payload = data[at + _HEAD.size : at + _HEAD.size + length]
        if length == 0 or len(payload) < length or zlib.crc32(payload) != crc:
            break
        for key, value in msgspec.msgpack.decode(payload):
            if value is None:
                entries.pop(key, None)
            else:
                entries[key] = value
        at += _HEAD.size + length
    return entries, at


class Journal:
    """Keys and values, changed in transactions."""

    def __init__(self, keeper: Keeper, found: dict[str, int]) -> None:
        """Go on with a journal, or start one.

        Args:
            keeper: Keeps the memfd.
            found: Descriptors that were kept, by name; those called ``journal.N`` are taken out of it.

        Raises:
            Malformed: There is a journal and its first record is damaged.
        """
        self._keeper = keeper
        self._changes: dict[str, Any] = {}
        self.entries: dict[str, Any] = {}
        kept = sorted((int(name.partition(".")[2]), name) for name in found if name.startswith("journal."))
        if kept:
            self._number, name = kept[-1]
            self._descriptor = found.pop(name)
            self.entries, self._at = replay(self._descriptor)
            if not self._at:
                raise Malformed("the journal that was kept is damaged from its start")
            self._base = self._at
            for _, name in kept[:-1]:
                keeper.forget(name)
                os.close(found.pop(name))
        else:
            self._number, self._descriptor = 0, -1
            self._at = self._base = 0
            self._rewrite()

    def put(self, key: str, value: Any) -> None:
        """Change a key with the next commit; None removes it."""
        self._changes[key] = value

    @property
    def pending(self) -> bool:
        """Whether something waits for the commit."""
        return bool(self._changes)

    def commit(self) -> None:
        """Make the changes since the last one last, together or not at all.

        Raises:
            OSError: The kernel refused; nothing was changed.
        """
        if not self._changes:
            return
        payload = msgspec.msgpack.encode(list(self._changes.items()))
        record = _HEAD.pack(len(payload), zlib.crc32(payload)) + payload
        done = 0
        while done < len(record):
            done += os.pwrite(self._descriptor, record[done:], self._at + done)
            crash_point("journal:written")
        self._at += len(record)
        for key, value in self._changes.items():
            if value is None:
                self.entries.pop(key, None)
            else:
                self.entries[key] = value
        self._changes = {}
        if self._at > 2 * self._base + _SLACK_BYTES:
            self._rewrite()

    def _rewrite(self) -> None:
        """Begin a new journal with what is true now; the old one counts until the new one is kept."""
        payload = msgspec.msgpack.encode(list(self.entries.items()))
        record = _HEAD.pack(len(payload), zlib.crc32(payload)) + payload
        descriptor = os.memfd_create("quire-journal", os.MFD_CLOEXEC)
        os.fchmod(descriptor, 0o600)
        done = 0
        while done < len(record):
            done += os.pwrite(descriptor, record[done:], done)
        crash_point("journal:rewritten")
        self._keeper.keep(f"journal.{self._number + 1}", descriptor)
        crash_point("journal:kept")
        if self._descriptor >= 0:
            self._keeper.forget(f"journal.{self._number}")
            os.close(self._descriptor)
        self._number += 1
        self._descriptor = descriptor
        self._at = self._base = len(record)

    def close(self) -> None:
        """Close the memfd; whoever keeps it keeps it."""
        os.close(self._descriptor)
