"""Looking in ``/proc`` whether a process has let go of memory. For any thread; it may take milliseconds."""

from __future__ import annotations

import os
import select

__all__ = ["Holding", "holding"]

_MAX_DESCRIPTORS = 65536
_MAX_MAPS_BYTES = 64 << 20


class Holding:
    """What a process was seen to hold, or why that could not be seen."""

    def __init__(self, seen: bool, what: str = "") -> None:
        """Describe it.

        Args:
            seen: Whether everything could be looked at.
            what: What it still holds; empty for nothing.
        """
        self.seen = seen
        self.what = what


def holding(pid: int, pidfd: int, ranges: dict[tuple[int, int], list[tuple[int, int]]]) -> Holding:
    """Look whether a process has any of these files open, or a range of them mapped.

    A child that it forked, or a process that it passed a descriptor to, is not looked at.

    Args:
        pid: The process.
        pidfd: The same process, so that another one of the same number is not taken for it.
        ranges: By device and inode: half-open byte ranges of the file that it must not have mapped. An empty
            list means that it must not have the file open and may keep its mappings.

    Returns:
        What was seen. A process that has ended holds nothing.
    """
    try:
        what = _mapped(pid, ranges)
        if pid == os.getpid():
            # A client inside the broker's process, whose descriptors cannot be told from the broker's.
            return Holding(bool(what), what)
        what = what or _opened(pid, ranges)
    except (FileNotFoundError, ProcessLookupError):
        return Holding(True) if _ended(pidfd) else Holding(False)
    except PermissionError:
        return Holding(False)
    if _ended(pidfd):
        return Holding(True)
    return Holding(True, what)


def _ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def _mapped(pid: int, ranges: dict[tuple[int, int], list[tuple[int, int]]]) -> str:
    """Name a mapping of one of the ranges; a map that is too long to read counts as one."""
    inodes = {f"{inode}": (device, inode) for device, inode in ranges}
    with open(f"/proc/{pid}/maps", "rb", buffering=1 << 16) as maps:
        read_bytes = 0
        for line in maps:
            read_bytes += len(line)
            if read_bytes > _MAX_MAPS_BYTES:
                return "has more mappings than are looked at"
            fields = line.split(None, 5)
            key = inodes.get(fields[4].decode())
            if key is None:
                continue
            major, _, minor = fields[3].decode().partition(":")
            if os.makedev(int(major, 16), int(minor, 16)) != key[0]:
                continue
            start, _, stop = fields[0].decode().partition("-")
            offset = int(fields[2], 16)
            end = offset + int(stop, 16) - int(start, 16)
            if any(a < end and offset < b for a, b in ranges[key]):
                return f"still maps bytes {offset} to {end} at {start}"
    return ""


def _opened(pid: int, ranges: dict[tuple[int, int], list[tuple[int, int]]]) -> str:
    """Name a descriptor of one of the files; more descriptors than are looked at count as one."""
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for count, entry in enumerate(entries):
            if count >= _MAX_DESCRIPTORS:
                return "has more open descriptors than are looked at"
            try:
                # The text of the link is read before the file is asked, so that no file system is.
                if not os.readlink(entry.path).startswith("/memfd:quire-lease"):
                    continue
                status = os.stat(entry.path)
            except FileNotFoundError:
                continue
            if (status.st_dev, status.st_ino) in ranges:
                return f"still has descriptor {entry.name} open"
    return ""
