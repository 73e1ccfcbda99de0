"""The users of a new user namespace, which whoever started the process in it has to set."""

from __future__ import annotations

import os

from quire.errors import Unsupported
from quire.sandbox.doors import UID

__all__ = ["map_users"]


def map_users(pid: int) -> None:
    """Give the new user namespace of a process its users.

    One is enough: us, under the name of the one without rights. If we are root and may, a second, other user
    takes that name, so that the sandbox is not even by accident the owner of anything; root is there until
    the doors are shut, because it may be needed to read modules.
    """
    privileged = os.geteuid() == 0 and all(_has(kind, UID) for kind in ("uid", "gid"))
    if not privileged:
        _write(pid, "setgroups", "deny")
    for kind, mine in (("gid", os.getegid()), ("uid", os.geteuid())):
        one = f"{UID} {mine} 1\n"
        _write(pid, f"{kind}_map", f"0 {mine} 1\n{UID} {UID} 1\n" if privileged else one)


def _has(kind: str, number: int) -> bool:
    """Whether our own user namespace has this user or group."""
    with open(f"/proc/self/{kind}_map", encoding="ascii") as file:
        ranges = [line.split() for line in file]
    return any(int(first) <= number < int(first) + int(count) for first, _, count in ranges)


def _write(pid: int, name: str, text: str) -> None:
    fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    except OSError as error:
        raise Unsupported(
            f"the users of a new user namespace cannot be set: {name}: {error.strerror}"
        ) from error
    finally:
        os.close(fd)
