"""Where the bytes of an image come from, and copies of them that the kernel can run."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from quire import memfd
from quire.snapshot import Snapshot
from quire.sources import BytesSource, SnapshotSource, Source, open_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from quire.region import Region

    Content = str | os.PathLike[str] | Source | Snapshot | Region | Buffer

__all__ = ["as_source", "copy_to_memory", "opened", "pieces"]

_PIECE_BYTES = 1 << 20


def as_source(content: Content) -> tuple[Source, bool]:
    """Open what an image is read from.

    Args:
        content: A path, a member of an archive (``app.zip!/bin/tool``) or a url, as `open_source` takes them;
            a source; a snapshot; a region, whose source is read and whose pages are not; or a bytes-like
            object, which must not change.

    Returns:
        The source, and whether it is the caller's to close.

    Raises:
        OSError: It cannot be opened.
        PageError: It is a compressed file, and damaged.
        TypeError: It is none of these.
    """
    if isinstance(content, Source):
        return content, False
    if isinstance(content, str | os.PathLike):
        return open_source(content), True
    if isinstance(content, Snapshot):
        return SnapshotSource(content), True
    from quire.region import Region  # noqa: PLC0415 - regions are not needed to read files

    if isinstance(content, Region):
        return content._source, False
    return BytesSource(content), True


@contextlib.contextmanager
def opened(content: Content) -> Iterator[Source]:
    """Open what an image is read from, for use in the block; see `as_source`."""
    source, is_owned = as_source(content)
    try:
        yield source
    finally:
        if is_owned:
            source.close()


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
    length = source.size - offset if size is None else size
    return memfd.sealed(name, pieces(source, offset, length), executable=True)
