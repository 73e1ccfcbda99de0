"""A memory cgroup for one sandbox, of version 2 where it is delegated to this user, or of version 1."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Group"]

_ROOT = "/sys/fs/cgroup"


class Group:
    """A cgroup with a limit and no swap; its maker removes it when its processes have ended."""

    def __init__(self, path: str, version: int) -> None:
        """Use ``make``."""
        self._path = path
        self._version = version

    @classmethod
    def make(cls, name: str, limit_bytes: int) -> tuple[Group | None, str]:
        """Make one.

        Args:
            name: Of the new directory.
            limit_bytes: What its processes may have charged to it.

        Returns:
            The group, or None and why there is none.
        """
        refusals = []
        for parent, version in _parents():
            group = cls(os.path.join(parent, name), version)
            try:
                os.mkdir(group._path)
            except OSError as error:
                refusals.append(str(error))
                continue
            try:
                group._limit(limit_bytes)
            except OSError as error:
                refusals.append(str(error))
                group.remove()
                continue
            return group, ""
        return None, "; ".join(refusals) or "no memory controller is mounted"

    def _limit(self, limit_bytes: int) -> None:
        if self._version == 2:
            self._write("memory.max", str(limit_bytes))
            # Killed as a whole, and swap would hide memory from the limit. Either may be missing.
            for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
                if os.path.exists(os.path.join(self._path, name)):
                    self._write(name, value)
            return
        self._write("memory.limit_in_bytes", str(limit_bytes))
        self._write("memory.swappiness", "0")

    def add(self, pid: int) -> None:
        """Move a process into it; what it has already stays charged where it is."""
        self._write("cgroup.procs", str(pid))

    def peak_bytes(self) -> int | None:
        """The most that was ever charged to it; None where the kernel (before 5.19) does not keep it."""
        name = "memory.peak" if self._version == 2 else "memory.max_usage_in_bytes"
        try:
            return int(self._read(name))
        except FileNotFoundError:
            return None

    def killed(self) -> bool:
        """Whether the kernel killed for want of memory in it."""
        text = self._read("memory.events" if self._version == 2 else "memory.oom_control")
        return any(
            word == "oom_kill" and int(count) > 0
            for word, count in (line.split() for line in text.splitlines())
        )

    def remove(self) -> None:
        """Remove it; all its processes must have ended."""
        os.rmdir(self._path)

    def _read(self, name: str) -> str:
        with open(os.path.join(self._path, name), encoding="ascii") as file:
            return file.read()

    def _write(self, name: str, value: str) -> None:
        # Unbuffered, so that what the kernel refuses is raised here.
        fd = os.open(os.path.join(self._path, name), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode("ascii"))
        finally:
            os.close(fd)


def _parents() -> Iterator[tuple[str, int]]:
    """Groups in which one with a limit might be made, and their version."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/cgroup", encoding="utf-8") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if "memory" in controllers.split(","):
                yield os.path.join(_ROOT, "memory", path.lstrip("/")), 1
                yield os.path.join(_ROOT, "memory"), 1
            elif not controllers:
                # One that has processes cannot have limited children, but its parent may.
                own = os.path.normpath(os.path.join(_ROOT, path.lstrip("/")))
                yield own, 2
                if own != _ROOT:
                    yield os.path.dirname(own), 2
