"""Virtual memory for Python: shared, versioned, verifiable, and read without copying.

Memory is written through a `Segment`; its versions are `Snapshot` objects, which other processes verify with
the kernel and map. `LiveSegment` is memory whose readers see every write at once.
"""

# Imports that would make this one slow happen on first use.
# ruff: noqa: PLC0415

from typing import TYPE_CHECKING, Any

from quire._native import PAGE_SIZE
from quire.capabilities import capabilities
from quire.errors import (
    Conflict,
    ForkedError,
    Malformed,
    NotImmutable,
    PageError,
    QuireError,
    QuotaExceeded,
    Revoked,
    Stalled,
    Unsupported,
)
from quire.live import LiveSegment, Mirror
from quire.ranges import Ranges
from quire.segment import Segment
from quire.snapshot import Mapping, Snapshot, load

if TYPE_CHECKING:
    from quire.purgeable import Purgeable, PurgeableCache
    from quire.wire import Channel, recv, send

    __version__: str

__all__ = [
    "PAGE_SIZE",
    "Channel",
    "Conflict",
    "ForkedError",
    "LiveSegment",
    "Malformed",
    "Mapping",
    "Mirror",
    "NotImmutable",
    "PageError",
    "Purgeable",
    "PurgeableCache",
    "QuireError",
    "QuotaExceeded",
    "Ranges",
    "Revoked",
    "Segment",
    "Snapshot",
    "Stalled",
    "Unsupported",
    "__version__",
    "capabilities",
    "load",
    "recv",
    "send",
]


def __getattr__(name: str) -> Any:
    """Import on first use what would make ``import quire`` slow: sockets, and the package's metadata."""
    if name in ("Channel", "recv", "send"):
        from quire import wire

        value: Any = getattr(wire, name)
    elif name in ("Purgeable", "PurgeableCache"):
        from quire import purgeable

        value = getattr(purgeable, name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("quire")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name the public names, those not imported yet among them."""
    return __all__
