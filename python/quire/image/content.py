"""Where the bytes of an image come from, and copies of them that the kernel can run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING

from quire.errors import Unsupported
from quire.sources import BytesSource, Source, open_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    # A path or url (``archive.zip!/member`` too), a source, or bytes; a Region is bytes.
    Content = str | os.PathLike[str] | Source | Buffer

__all__ = ["copy_to_memory", "executable_memfd", "opened", "pieces"]

_PIECE_BYTES = 1 << 20
_MFD_EXEC = 0x10
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# The kernel takes 249 bytes.
_NAME_BYTES = 200


@contextlib.contextmanager
def opened(content: Content) -> Iterator[Source]:
    """Open what an image is read from, for use in the block.

    Args:
        content: A path or url, as `open_source` takes it; a source, which stays the caller's; or bytes.

    Raises:
        OSError: It cannot be opened.
        PageError: It is a compressed file, and damaged.
        TypeError: It is none of these.
    """
    if isinstance(content, Source):
        yield content
        return
    with open_source(content) if isinstance(content, str | os.PathLike) else BytesSource(content) as source:
        yield source


def pieces(source: Source, offset: int, size: int) -> Iterator[bytes]:
    """Read a range of a source in pieces of bounded size.

    Args:
        source: Stays the caller's.
        offset: Of the first byte.
        size: In bytes.

    Raises:
        PageError: The bytes could not be had.
    """
    end = offset + size
    while offset < end:
        piece = source.read(offset, min(_PIECE_BYTES, end - offset))
        yield piece
        offset += len(piece)


def copy_to_memory(source: Source, offset: int = 0, size: int | None = None, *, name: str) -> int:
    """Copy a range of a source to a new memfd that nobody can change any more and that may be executed.

    Args:
        source: Stays the caller's.
        offset: Of the first byte.
        size: In bytes; None for all up to the end.
        name: Shown in ``/proc/PID/maps``; its end, if it is long.

    Returns:
        A descriptor, which is the caller's, closed on exec.

    Raises:
        Unsupported: The machine allows no executable memfd (``vm.memfd_noexec``).
        PageError: The bytes could not be had.
        OSError: There is no memory, or no descriptor.
    """
    fd = executable_memfd(os.fsdecode(os.fsencode(name)[-_NAME_BYTES:]))
    try:
        for piece in pieces(source, offset, source.size - offset if size is None else size):
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def executable_memfd(name: str) -> int:
    """Make a memfd that may be executed and sealed.

    Args:
        name: Shown in ``/proc/PID/maps``; at most 249 bytes.

    Returns:
        A descriptor, which is the caller's, closed on exec.

    Raises:
        Unsupported: The machine allows none (``vm.memfd_noexec``).
        OSError: There is no memory, or no descriptor.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_EXEC)
    except OSError as error:
        if error.errno == errno.EACCES:
            raise Unsupported(
                "this machine allows no executable memory files (memfd_create: EACCES); "
                "the setting is vm.memfd_noexec, which must not be 2"
            ) from error
        # Kernels before 6.3 do not know MFD_EXEC: all their memfds are executable.
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(name, flags)
