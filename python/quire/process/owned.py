"""Which object of this library an address of the calling process belongs to.

Objects keep no list of themselves, so that making one stays cheap: they are looked for among everything that
the garbage collector knows. That takes milliseconds and is done only when somebody asks.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

from quire._native import PAGE_SIZE
from quire.live import LiveSegment, MirrorMapping
from quire.purgeable import Purgeable
from quire.region import Region
from quire.segment import Segment
from quire.snapshot import Mapping, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quire.process.vma import VMA

__all__ = ["describe", "ranges"]

_MEMORY: tuple[type, ...] = (Segment, Mapping, LiveSegment, MirrorMapping, Region, Purgeable)


def _memory() -> tuple[type, ...]:
    """Return the classes of what has memory."""
    # Who has a lease has imported its module. To import it here would take msgspec, which may be missing.
    borrowed = sys.modules.get("quire.broker.borrowed")
    return _MEMORY if borrowed is None else (*_MEMORY, borrowed.Lease)


def ranges() -> list[tuple[int, int]]:
    """List the memory of all objects: addresses of first byte and behind the last page, in no order."""
    return [view[:2] for thing in _objects(_memory()) for view in _views(thing)]


def describe(address: int, vma: VMA | None) -> list[str]:
    """Say which objects have an address, and which snapshots have the file that is mapped there.

    Args:
        address: An address of the calling process.
        vma: The VMA there.

    Returns:
        A line for each, for people.
    """
    found = []
    for thing in _objects((*_memory(), Snapshot)):
        if isinstance(thing, Snapshot):
            keys = [] if thing.closed else thing._core.layer_keys()
            if vma is not None and (vma.device, vma.inode) in keys:
                layer = keys.index((vma.device, vma.inode))
                found.append(f"layer {layer} of {len(keys)} of {thing!r}")
            continue
        for start, end, what in _views(thing):
            if start <= address < end:
                offset = address - start
                found.append(f"byte {offset} of the {what} of {thing!r}{_state(thing, offset)}")
    return found


def _state(thing: Any, offset: int) -> str:
    """Say of what comes and goes whether a byte of it is there."""
    if isinstance(thing, Region):
        return ", filled" if _is_in(thing.resident(), offset) else ", not filled"
    if not isinstance(thing, _MEMORY) and not _is_in(thing.held, offset):
        return ", taken back"
    return ""


def _is_in(ranges: Iterable[tuple[int, int]], offset: int) -> bool:
    return any(first <= offset < last for first, last in ranges)


def _objects(kinds: tuple[type, ...]) -> list[Any]:
    # A class may claim with __class__ to be another; type() says what it is.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]


def _views(thing: Any) -> list[tuple[int, int, str]]:
    """List where an object's memory is; nothing if it is closed."""
    try:
        if thing.closed:
            return []
        if isinstance(thing, LiveSegment):
            views = [(thing.ro_address, "read-only alias"), (thing.rw_address, "writable alias")]
        else:
            views = [(thing.address, "memory")]
        size = -(-thing.size // PAGE_SIZE) * PAGE_SIZE
    except (AttributeError, ValueError):
        # Another thread is making it, or has closed it just now.
        return []
    return [(start, start + size, what) for start, what in views]
