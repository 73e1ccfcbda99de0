"""Read-only descriptors of the extents that were lent last."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.broker.objects import Extent

__all__ = ["Readers"]

# Out of the descriptors that are left for connections; more than one lease has extents.
_MOST = 256


class Readers:
    """Keeps them open, as opening one through ``/proc`` takes ten times as long as copying it.

    A lease has up to 64, and a client may take and give back leases in a loop. Lessees of an extent share one
    open file: one sees the offset that another has set, and nothing else.
    """

    def __init__(self) -> None:
        """Start with none."""
        # By the extent's serial, least recently used first: its generation, and the descriptor.
        self._kept: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        """How many are open."""
        return len(self._kept)

    def open(self, extent: Extent) -> int:
        """Open an extent for reading; the caller owns the descriptor.

        Raises:
            OSError: There are too many open descriptors.
        """
        generation, descriptor = self._kept.pop(extent.serial, (-1, -1))
        if generation != extent.generation:
            if descriptor >= 0:
                os.close(descriptor)
            descriptor = extent.open_for(False)
        self._kept[extent.serial] = extent.generation, descriptor
        if len(self._kept) > _MOST:
            self.drop(next(iter(self._kept)))
        return os.dup(descriptor)

    def drop(self, serial: int) -> None:
        """Close what is kept of an extent."""
        _, descriptor = self._kept.pop(serial, (-1, -1))
        if descriptor >= 0:
            os.close(descriptor)

    def close(self) -> None:
        """Close all."""
        for serial in list(self._kept):
            self.drop(serial)
