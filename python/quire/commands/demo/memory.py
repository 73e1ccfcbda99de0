"""How much memory a family of processes uses, everything counted once."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Memory", "measure"]


class Memory(NamedTuple):
    """Memory of some processes, in bytes.

    Attributes:
        pss: Sum of Pss, which divides each page among those that map it.
        unmapped: What memfds hold that is not in any Pss, because no process has it mapped and touched.
    """

    pss: int
    unmapped: int

    @property
    def total(self) -> int:
        """Everything, once."""
        return self.pss + self.unmapped


def measure() -> Memory:
    """Measure this process and all that descend from it."""
    pss = shmem = 0
    memfds: dict[tuple[int, int], int] = {}
    for pid in family(os.getpid()):
        # A process may end while it is looked at.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = dict(
                line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            )
            pss += _bytes(fields["Pss"])
            shmem += _bytes(fields.get("Pss_Shmem", "0 kB"))
            memfds |= _memfds(pid)
    return Memory(pss, max(0, sum(memfds.values()) - shmem))


def family(root: int) -> list[int]:
    """List a process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # The name, in parentheses, may hold anything.
                after_name = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2]
                children.setdefault(int(after_name.split()[1]), []).append(int(entry))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _memfds(pid: int) -> dict[tuple[int, int], int]:
    """Return the allocated bytes of each memfd that a process has open, by device and inode."""
    found = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{number}"
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(path).startswith("/memfd:"):
                status = os.stat(path)
                found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return found


def _bytes(field: str) -> int:
    number, unit = field.split()
    assert unit == "kB"
    return int(number) * 1024
