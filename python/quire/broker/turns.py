"""Whose turn it is: users one after another, and the connections of a user one after another."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Protocol

__all__ = ["Ready", "Turns"]

_USER_SECONDS = 50e-6


class Ready(Protocol):
    """A connection that may have frames to serve."""

    uid: int

    def serve_one(self) -> bool:
        """Serve one frame; False if there is none that may be served now."""


class Turns:
    """Serves a little for each user in one pass of the event loop.

    So the frame of a client of one user waits for one short turn of every other user who has frames waiting,
    however many connections those have open and however much they have sent.
    """

    def __init__(self) -> None:
        """Start with nobody."""
        self._users: dict[int, deque[Ready]] = {}
        self._waiting: set[Ready] = set()
        self._scheduled = False

    def join(self, connection: Ready) -> None:
        """Let a connection have its turn; without effect while it waits for one."""
        if connection in self._waiting:
            return
        self._waiting.add(connection)
        self._users.setdefault(connection.uid, deque()).append(connection)
        self._schedule()

    def waits(self, connection: Ready) -> bool:
        """Whether a connection has joined and not had its turn yet."""
        return connection in self._waiting

    def _schedule(self) -> None:
        if not self._scheduled and self._users:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        """Give each user a turn: one frame, and more as long as that is quick."""
        self._scheduled = False
        try:
            for uid, queue in list(self._users.items()):
                end = time.monotonic() + _USER_SECONDS
                while queue:
                    connection = queue.popleft()
                    self._waiting.discard(connection)
                    if connection.serve_one():
                        self.join(connection)
                    if time.monotonic() >= end:
                        break
                if not queue:
                    del self._users[uid]
        finally:
            self._schedule()
