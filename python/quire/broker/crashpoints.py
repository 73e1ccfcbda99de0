"""Named places at which a test may have the broker killed, or be told that they were reached."""

from __future__ import annotations

import os
import signal
from pathlib import Path

__all__ = ["crash_point"]

_DIRECTORY = os.environ.get("QUIRE_BROKER_CRASH_POINTS", "")


def crash_point(name: str) -> None:
    """Do nothing, unless ``QUIRE_BROKER_CRASH_POINTS`` names a folder.

    Then the name is added to its file ``reached``; and if the file ``die-at`` holds it, that is removed
    and this process killed with SIGKILL.
    """
    if not _DIRECTORY:
        return
    folder = Path(_DIRECTORY)
    with (folder / "reached").open("a", encoding="utf-8") as reached:
        reached.write(f"{name}\n")
    wanted = folder / "die-at"
    if wanted.exists() and wanted.read_text("utf-8") == name:
        wanted.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
