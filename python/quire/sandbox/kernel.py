"""System calls that Python has no function for; each raises OSError with its name.

Numbers and flags are those of the kernel's headers.
"""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = [
    "MOUNT_NAMESPACE",
    "NAMESPACES",
    "drop_bounding_set",
    "drop_capabilities",
    "install_filter",
    "landlock_abi",
    "landlock_restrict_all",
    "mount",
    "no_new_privileges",
    "pivot_root",
    "set_parent_death_signal",
    "umount_detached",
    "unshare",
]

NAMESPACES = 0x1000_0000 | 0x2000_0000 | 0x4000_0000 | 0x0800_0000 | 0x0400_0000 | 0x0200_0000
"""CLONE_NEWUSER, NEWPID, NEWNET, NEWIPC, NEWUTS and NEWCGROUP."""

MOUNT_NAMESPACE = 0x0002_0000
"""CLONE_NEWNS."""

_NUMBERS = {
    "x86_64": {"pivot_root": 155, "capset": 126, "seccomp": 317},
    "aarch64": {"pivot_root": 41, "capset": 91, "seccomp": 277},
}
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # the same on every machine

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAPABILITY_VERSION_3 = 0x2008_0522
_SECCOMP_SET_MODE_FILTER = 1
_FILTER_BYTES = 8  # struct sock_filter
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _number(name: str) -> int:
    return _NUMBERS[platform.machine()][name]


def _check(result: int, name: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(name: str, *arguments: object, number: int | None = None) -> int:
    return _check(_libc.syscall(_number(name) if number is None else number, *arguments), name)


def _prctl(name: str, option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), name)


def unshare(flags: int) -> None:
    """Move this process to new namespaces; of a pid namespace, its next children."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount, remount or change how mounts propagate."""
    words = [None if word is None else word.encode() for word in (source, target, kind, options)]
    _check(_libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), "mount")


def umount_detached(target: str) -> None:
    """Take a mount, and all below it, out of the tree."""
    _check(_libc.umount2(target.encode(), _MNT_DETACH), "umount2")


def pivot_root(new_root: str, put_old: str) -> None:
    """Change the root of this mount namespace."""
    _syscall("pivot_root", new_root.encode(), put_old.encode())


def set_parent_death_signal(number: int) -> None:
    """Have this signal when the thread that started this process ends; a change of user undoes it."""
    _prctl("prctl(PR_SET_PDEATHSIG)", _PR_SET_PDEATHSIG, number)


def no_new_privileges() -> None:
    """Give up, for good, to gain rights by executing a file."""
    _prctl("prctl(PR_SET_NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVS, 1)


def drop_bounding_set() -> None:
    """Give up every capability that executing a file could give."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for capability in range(last + 1):
        _prctl("prctl(PR_CAPBSET_DROP)", _PR_CAPBSET_DROP, capability)


def drop_capabilities() -> None:
    """Give up all capabilities of this thread."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _syscall("capset", header, (ctypes.c_uint32 * 6)())


def landlock_abi() -> int:
    """The version of Landlock that the kernel has; 0 without it."""
    null, version_flag = ctypes.c_void_p(None), ctypes.c_uint32(1)
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE_RULESET, null, ctypes.c_size_t(0), version_flag)))


def landlock_restrict_all(abi: int) -> None:
    """Forbid this thread all that a version of Landlock knows of: files, TCP ports, peers outside.

    Args:
        abi: 1 or more, as ``landlock_abi`` returned. No new privileges must be allowed any more.
    """
    # Rights on files up to: MAKE_SYM in the first version, then REFER, TRUNCATE, and IOCTL_DEV in the fifth.
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    network = 3 if abi >= 4 else 0
    scopes = 3 if abi >= 6 else 0
    attributes = (ctypes.c_uint64 * 3)(files, network, scopes)
    size = ctypes.c_size_t(8 if abi < 4 else 16 if abi < 6 else 24)
    ruleset = _syscall(
        "landlock_create_ruleset", attributes, size, ctypes.c_uint32(0), number=_LANDLOCK_CREATE_RULESET
    )
    try:
        _syscall("landlock_restrict_self", ruleset, ctypes.c_uint32(0), number=_LANDLOCK_RESTRICT_SELF)
    finally:
        os.close(ruleset)


def install_filter(program: bytes) -> None:
    """Have the kernel judge every system call of this thread from now on.

    Args:
        program: An array of ``struct sock_filter``.
    """

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    argument = Program(len(program) // _FILTER_BYTES, program)
    _syscall("seccomp", ctypes.c_uint(_SECCOMP_SET_MODE_FILTER), ctypes.c_uint(0), ctypes.byref(argument))
