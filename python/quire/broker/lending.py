"""Lending what a region shows: memory of the broker is filled with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.broker.borrowed import Lease
    from quire.region import Region

__all__ = ["copy_region"]

_PIECE_BYTES = 1 << 20


def copy_region(lease: Lease, region: Region, offset: int, discard: bool) -> None:
    """Fill all of a lease with what a region shows from an offset on. Blocks while the region is filled.

    Args:
        lease: For writing.
        region: As long as that, at least.
        offset: In bytes.
        discard: Drop the region's windows as soon as they are copied: there are never two whole copies.

    Raises:
        PageError: The region could not be filled.
        Revoked: The memory was taken back meanwhile.
    """
    window = region.window_bytes
    piece = max(_PIECE_BYTES, window)
    done = 0
    while done < lease.size:
        # Up to a multiple of the piece, so that a window is read once.
        count = min(lease.size - done, piece - (offset + done) % piece)
        # Read, not looked at: a page that cannot be had is an exception and not a signal.
        lease.store(done, region.read(offset + done, count))
        if discard:
            first = max(offset, (offset + done) // window * window)
            region.discard(first, offset + done + count - first)
        done += count
