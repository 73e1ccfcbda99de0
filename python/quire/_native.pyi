"""The native core. Private: import the public names from ``quire`` instead.

Every call that may take long releases the GIL. Every class is thread-safe.
Failures are the exceptions of ``quire.errors``; kernel failures are ``OSError``.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self, final

from typing_extensions import Buffer

PAGE_SIZE: int
MAX_LAYERS: int

@final
class Snapshot:
    """An immutable version: layers (descriptors) and a page table."""

    @staticmethod
    def from_fds(fds: Sequence[int]) -> Snapshot:
        """Verify descriptors received from a peer; the first is the top layer.

        Takes ownership of every descriptor in ``fds``, also when it raises.
        Raises NotImmutable, Malformed.
        """
    @staticmethod
    def load(path: str | bytes, copy: bool, check: bool) -> Snapshot: ...
    @property
    def size(self) -> int: ...
    @property
    def layer_count(self) -> int: ...
    def layer_fds(self) -> list[int]:
        """Borrowed descriptors, top layer first; valid while this snapshot is open."""
    def layer_ids(self) -> list[bytes]:
        """16-byte identities, in the order of ``layer_fds``."""
    def layer_keys(self) -> list[tuple[int, int]]:
        """(st_dev, st_ino) of each layer, in the order of ``layer_fds``."""
    def verify(self) -> None: ...
    def diff(self, other: Snapshot) -> bytes:
        """Native-endian u64 pairs (start, stop) in bytes, ascending, merged, page aligned."""
    def save(self, path: str | bytes) -> None: ...
    @property
    def stats(self) -> tuple[int, int, int, int]:
        """(pages_scanned, pages_copied, nodes_written, duration_ns) of its making."""
    def check_invariants(self) -> int:
        """Walk the page table, raise Malformed if any invariant fails; return the pages that hold data."""
    def memory(self) -> list[tuple[int, int]]:
        """(allocated_bytes, live_bytes) of each layer, in the order of ``layer_fds``."""
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...

class Segment:
    """Growable pages with one writer. Subclassable; exports a writable buffer."""

    def __new__(cls, size_bytes: int, *, start: Snapshot | None = None) -> Self:
        """Zero-filled, or starting as ``start`` (whose size must equal ``size_bytes``)."""
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    def snapshot_native(self) -> Snapshot: ...
    def sever_native(self) -> Snapshot: ...
    def grow(self, size_bytes: int) -> None: ...
    def write_at(self, offset: int, data: Buffer) -> None:
        """Copy ``data`` in; a full memory raises instead of SIGBUS. Bounds checked."""
    def check_invariants(self) -> None: ...
    def memory(self) -> dict[str, int]:
        """Bytes: ``private`` (copies of pages in this process), ``duplicate`` (those also in a layer),
        ``layers`` (allocated in the layers of the last version), ``live`` (content of the last version)."""
    def close(self) -> None:
        """Raises BufferError while views are exported."""
    @property
    def closed(self) -> bool: ...
    @property
    def forked(self) -> bool:
        """True in a child process that inherited this segment through fork."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Mapping:
    """A view of a snapshot at a fixed address. Subclassable; exports a buffer."""

    def __new__(cls, snapshot: Snapshot, *, private: bool = False) -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def private(self) -> bool: ...
    @property
    def vma_budget(self) -> int: ...
    @property
    def copied_pages(self) -> int:
        """Pages copied in because the VMA budget was spent."""
    def advance_native(self, snapshot: Snapshot) -> None: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class LiveSegment:
    """Shared live pages. The buffer it exports is the read-only alias. Subclassable."""

    def __new__(cls, size_bytes: int, *, backend: Literal["memfd", "sysv"] = "memfd") -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def ro_address(self) -> int: ...
    @property
    def rw_address(self) -> int: ...
    @property
    def fd(self) -> int:
        """Borrowed descriptor of the memfd backend; -1 for System V."""
    @property
    def shmid(self) -> int:
        """System V id; -1 for the memfd backend."""
    def snapshot_native(self) -> Snapshot: ...
    def writable(self) -> WritableAlias:
        """The writable alias; ForkedError in a forked child."""
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def forked(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class WritableAlias:
    """The read-write view of a LiveSegment. Exports a writable buffer until released. Subclassable."""

    def __new__(cls, segment: LiveSegment) -> Self:
        """The same as ``segment.writable()``, for subclasses."""
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    def release(self) -> None:
        """Raises BufferError while views of it are exported; afterwards no new view can be made."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

class MirrorView:
    """A read-only live mapping of another process's LiveSegment. Subclassable."""

    @staticmethod
    def verify_fd(fd: int) -> int:
        """Check that the descriptor's seals make a mirror; return its size in bytes. Raises NotImmutable, Malformed."""
    def __new__(cls, *, fd: int = -1, shmid: int = -1, size_bytes: int = 0) -> Self:
        """Map; the descriptor is borrowed for the call only."""
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def probe() -> dict[str, Any]:
    """What this kernel and user can do; see quire.doctor for the meaning of each key."""

@final
class Source:
    @property
    def size(self) -> int: ...
    def read(self, offset: int, length: int) -> bytes: ...
