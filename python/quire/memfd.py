"""Memory files: made, filled, and sealed against every change."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from quire.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["create", "sealed"]

# Flags that kernels before 6.3 do not know: all their memfds are executable.
_MFD_NOEXEC_SEAL = 0x8
_MFD_EXEC = 0x10
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# The kernel takes 249 bytes.
_NAME_BYTES = 200


def create(name: str, *, executable: bool) -> int:
    """Make a memfd that can be sealed.

    Args:
        name: Shown in ``/proc/PID/maps``; its end, if it is long.
        executable: Whether it may be executed, and not only mapped.

    Returns:
        A descriptor, which is the caller's, closed on exec.

    Raises:
        Unsupported: It is to be executable, and the machine allows none (``vm.memfd_noexec``).
        OSError: There is no memory, or no descriptor.
    """
    short = os.fsdecode(os.fsencode(name)[-_NAME_BYTES:])
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(short, flags | (_MFD_EXEC if executable else _MFD_NOEXEC_SEAL))
    except OSError as error:
        if executable and error.errno == errno.EACCES:
            raise Unsupported(
                "this machine allows no executable memory files (memfd_create: EACCES); "
                "the setting is vm.memfd_noexec, which must not be 2"
            ) from error
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(short, flags)


def sealed(name: str, pieces: Iterable[bytes], *, executable: bool) -> int:
    """Copy pieces, one behind the other, to a new memfd that nobody can change any more.

    Args:
        name: See ``create``.
        pieces: What they raise is let through, and the memfd closed.
        executable: See ``create``.

    Returns:
        A descriptor, which is the caller's, closed on exec.

    Raises:
        Unsupported, OSError: See ``create``.
    """
    fd = create(name, executable=executable)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd
