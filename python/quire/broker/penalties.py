"""Who breaks the protocol waits before its next connection is read."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Penalties"]

_FIRST_SECONDS = 0.05
_MOST_SECONDS = 1.0
# An offence is forgotten when its user has kept to the protocol for so many times as long as it had to wait.
_FORGIVEN_AFTER = 10


class Penalties:
    """How long new connections of a user have to wait: twice as long with each offence, a second at most.

    Taking a connection, its Hello and its end cost the broker much more than reading garbage. So coming back
    is what has to be slowed down. It is the user who waits, as a process can have others made; a process of
    the same user that keeps to the protocol waits once, when it connects.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nobody.

        Args:
            clock: In seconds.
        """
        self._clock = clock
        # Of each user, for how long it has to wait and from when.
        self._terms: dict[int, tuple[float, float]] = {}

    def offended(self, uid: int) -> None:
        """A client of a user has broken the protocol."""
        now = self._clock()
        self._terms = {
            each: (seconds, since)
            for each, (seconds, since) in self._terms.items()
            if now < since + seconds * _FORGIVEN_AFTER
        }
        seconds, _ = self._terms.get(uid, (_FIRST_SECONDS / 2, 0.0))
        self._terms[uid] = min(2 * seconds, _MOST_SECONDS), now

    def wait_seconds(self, uid: int) -> float:
        """How long a connection that a user makes now is not to be read; 0 for who has done nothing wrong."""
        seconds, since = self._terms.get(uid, (0.0, 0.0))
        return max(0.0, since + seconds - self._clock())
