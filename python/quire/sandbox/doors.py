"""Shutting the doors of the process that will run code nobody trusts.

What is shut, and in which order, is in ``docs/sandbox.md``. After ``shut`` nothing can be opened again.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import time
from typing import TYPE_CHECKING, NamedTuple

from quire.sandbox import kernel

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["UID", "Limits", "shut"]

UID = 65534
"""What user and group the process has in its own user namespace."""

MAX_DESCRIPTORS = 64
# Reservations of address space take no memory; a segment reserves eight times its size.
_ADDRESS_SPACE = 16
_SLACK_BYTES = 64 << 20

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18


class Limits(NamedTuple):
    """What the code may have, beyond what the interpreter and the imported modules take."""

    memory_bytes: int
    threads: int
    cpu_seconds: int | None


def shut(limits: Limits, keep: Container[int], filter_program: bytes) -> None:
    """Shut everything but the system-call filter, which is installed last.

    Args:
        limits: For this process.
        keep: Descriptors that stay open.
        filter_program: As ``syscalls.program`` returned.

    Raises:
        RuntimeError: The process has several threads, so one of them would stay outside.
        OSError: The kernel refused.
    """
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError(
            "an imported module has started threads; the doors can be shut for one thread only"
        )
    for fd in _open_files():
        if fd not in keep:
            # The one that the listing had is closed by now.
            with contextlib.suppress(OSError):
                os.close(fd)
    used = _memory()
    landlock = kernel.landlock_abi()
    kernel.drop_bounding_set()
    _empty_root()
    _limit(limits, used)
    _become_nobody()
    kernel.drop_capabilities()
    kernel.no_new_privileges()
    # A change of user undoes it.
    kernel.set_parent_death_signal(signal.SIGKILL)
    if landlock:
        kernel.landlock_restrict_all(landlock)
    kernel.install_filter(filter_program)


def _open_files() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]


def _memory() -> tuple[int, int]:
    """Address space, and private writable memory as RLIMIT_DATA counts it, in bytes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        sizes = dict(line.split(":", 1) for line in file)
    return int(sizes["VmSize"].split()[0]) * 1024, int(sizes["VmData"].split()[0]) * 1024


def _empty_root() -> None:
    """Make an empty directory that nobody can write to the root, and take everything else out of sight."""
    hardened = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    # Its own, not the watcher's: pivot_root moves every process of the namespace, and the watcher still has
    # files to write.
    kernel.unshare(kernel.MOUNT_NAMESPACE)
    kernel.mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    # Over a directory that every system has; only this namespace sees it.
    kernel.mount("none", "/proc", "tmpfs", hardened, "size=4k,nr_inodes=1,mode=0555")
    os.chdir("/proc")
    kernel.pivot_root(".", ".")
    # The old root lies over the new one now.
    kernel.umount_detached(".")
    os.chdir("/")
    kernel.mount("none", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | hardened)


def _limit(limits: Limits, used: tuple[int, int]) -> None:
    address_space, data = used
    allowed = {
        resource.RLIMIT_AS: address_space + _ADDRESS_SPACE * limits.memory_bytes + _SLACK_BYTES,
        resource.RLIMIT_DATA: data + limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.memory_bytes,
        resource.RLIMIT_NOFILE: MAX_DESCRIPTORS,
        # Where there is one user only, the watcher counts too.
        resource.RLIMIT_NPROC: limits.threads + (os.getuid() == UID),
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if limits.cpu_seconds is not None:
        allowed[resource.RLIMIT_CPU] = limits.cpu_seconds + math.ceil(time.process_time())
    for kind, value in allowed.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)  # noqa: PLW2901 - what may not be raised stays
        resource.setrlimit(kind, (value, value))


def _become_nobody() -> None:
    """Take the user that has no rights; already so where this user namespace has no other."""
    if os.getuid() == UID:
        return
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
