"""Repeating what failed for a reason that passes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from quire.errors import PageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Passing", "retrying"]

T = TypeVar("T")

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0


class Passing(Exception):  # noqa: N818 - it is no error yet
    """It failed, and may work in a moment."""


def retrying(attempt: Callable[[float], T], timeout: float, what: str) -> T:
    """Call until it does not raise `Passing`, with growing pauses.

    Args:
        attempt: Called with the time, by ``time.monotonic``, after which nobody waits any more.
        timeout: The reader's patience in seconds. A little less is used, so that it hears the reason.
        what: For the message.

    Raises:
        PageError: The time is over; the message has the last reason.
    """
    deadline = time.monotonic() + 0.9 * timeout
    pause = FIRST_PAUSE
    while True:
        try:
            return attempt(deadline)
        except Passing as reason:
            if time.monotonic() + pause >= deadline:
                raise PageError(f"{what} could not be read within {timeout:g} s: {reason}") from reason
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
