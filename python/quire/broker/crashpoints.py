"""Named places at which a test may let the broker be killed, or be told that they were reached."""

from __future__ import annotations

import os
import signal

__all__ = ["crash_point"]

_WANTED, _, _COUNT = os.environ.get("QUIRE_BROKER_CRASH", "").partition("@")
_TRACE = os.environ.get("QUIRE_BROKER_TRACE", "")
_left = [int(_COUNT or 1)]


def crash_point(name: str) -> None:
    """Die with SIGKILL here if ``QUIRE_BROKER_CRASH`` is the name, or ``NAME@COUNT`` at the COUNT-th time.

    ``QUIRE_BROKER_TRACE`` names a file to which every name that is passed is appended.
    """
    if _TRACE:
        with open(_TRACE, "a", encoding="utf-8") as trace:
            trace.write(f"{name}\n")
    if name == _WANTED:
        _left[0] -= 1
        if _left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
