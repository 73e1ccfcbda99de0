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
    SandboxError,
    Stalled,
    Unsupported,
)
from quire.live import LiveSegment, Mirror
from quire.ranges import Ranges
from quire.segment import Segment
from quire.snapshot import Mapping, Snapshot, load

if TYPE_CHECKING:
    from quire.client import connect
    from quire.functions import FunctionSource
    from quire.process import maps
    from quire.purgeable import Purgeable, PurgeableCache
    from quire.region import Region, RegionStats, open  # noqa: A004
    from quire.remote import HTTPSource, ObjectSource
    from quire.sources import (
        BytesSource,
        FileSource,
        GzipSource,
        SnapshotSource,
        Source,
        ZipSource,
        ZstdSource,
        open_source,
    )
    from quire.space import AddressSpace
    from quire.wire import Channel, recv, send

    __version__: str

__all__ = [
    "PAGE_SIZE",
    "AddressSpace",
    "BytesSource",
    "Channel",
    "Conflict",
    "FileSource",
    "ForkedError",
    "FunctionSource",
    "GzipSource",
    "HTTPSource",
    "LiveSegment",
    "Malformed",
    "Mapping",
    "Mirror",
    "NotImmutable",
    "ObjectSource",
    "PageError",
    "Purgeable",
    "PurgeableCache",
    "QuireError",
    "QuotaExceeded",
    "Ranges",
    "Region",
    "RegionStats",
    "Revoked",
    "SandboxError",
    "Segment",
    "Snapshot",
    "SnapshotSource",
    "Source",
    "Stalled",
    "Unsupported",
    "ZipSource",
    "ZstdSource",
    "__version__",
    "capabilities",
    "connect",
    "load",
    "maps",
    "open",
    "open_source",
    "recv",
    "send",
]


_LATER = {
    "client": ("connect",),
    "functions": ("FunctionSource",),
    "process": ("maps",),
    "purgeable": ("Purgeable", "PurgeableCache"),
    "region": ("Region", "RegionStats", "open"),
    "remote": ("HTTPSource", "ObjectSource"),
    "sources": (
        "BytesSource",
        "FileSource",
        "GzipSource",
        "SnapshotSource",
        "Source",
        "ZipSource",
        "ZstdSource",
        "open_source",
    ),
    "space": ("AddressSpace",),
    "wire": ("Channel", "recv", "send"),
}
_HOMES = {name: module for module, names in _LATER.items() for name in names}
_PACKAGES = ("image", "sandbox")


def __getattr__(name: str) -> Any:
    """Import on first use what would make ``import quire`` slow: sockets, archives, metadata."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("quire")
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(f"quire.{_HOMES[name]}"), name)
    elif name in _PACKAGES:
        from importlib import import_module

        value = import_module(f"quire.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name the public names, those not imported yet among them."""
    return __all__
