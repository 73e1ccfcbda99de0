"""What the broker holds: memory made of extents, snapshots made of layers, factories."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from quire import _native
from quire.broker.area import Area
from quire.broker.banks import Amount
from quire.broker.hugepages import HUGE_BYTES, collapse
from quire.broker.protocol import MAX_EXTENTS
from quire.errors import Malformed, NotImmutable

if TYPE_CHECKING:
    from quire.broker.banks import Bank
    from quire.broker.leases import Lease
    from quire.broker.sessions import Session

__all__ = [
    "OBJECT",
    "Extent",
    "Factory",
    "Held",
    "Layer",
    "Memory",
    "SnapshotObject",
    "allocate",
    "check_layer",
    "copy_extent",
    "extent_size",
    "seal_extent",
    "seals",
]

PAGE = _native.PAGE_SIZE
F_SEAL_FUTURE_WRITE = 0x10
IMMUTABLE = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_DEFAULT_EXTENT_BYTES = 64 << 20
_COPY_BYTES = 8 << 20
# What a process takes to map a MiB of small pages and unmap it, about.
_MAP_MIB_MS = 0.5


class Held:
    """Something that handles, names and descriptors stand for. It ends when none is left."""

    kind = ""

    def __init__(self, number: int, bank: Bank) -> None:
        """Start with no reference.

        Args:
            number: Names it in the journal.
            bank: Pays for it.
        """
        self.number = number
        self.bank = bank
        self.references = 0
        self.dead = False
        # Names and tokens that stand for it, and factories of which it is the current version.
        self.names: set[str] = set()
        self.tokens: dict[Held, None] = {}
        self.shown_by: dict[Held, None] = {}


def extent_size(size_bytes: int, wanted_bytes: int) -> int:
    """How long the extents of a memory object are, in bytes.

    Args:
        size_bytes: Of the object.
        wanted_bytes: What its maker asked for; 0 leaves it to the broker.

    Raises:
        ValueError: It is no multiple of the page, or would make too many extents.
    """
    if wanted_bytes == 0:
        fair = -(-size_bytes // MAX_EXTENTS)
        wanted_bytes = max(_DEFAULT_EXTENT_BYTES, -(-fair // PAGE) * PAGE)
    if wanted_bytes % PAGE:
        raise ValueError(f"extents of {wanted_bytes} bytes are no multiple of {PAGE}")
    if -(-size_bytes // wanted_bytes) > MAX_EXTENTS:
        raise ValueError(f"memory has at most {MAX_EXTENTS} extents: ask for longer ones")
    return wanted_bytes


def allocate(length: int, mappings: int = 2) -> tuple[int, bool]:
    """Make an unsealed memfd whose pages all exist; blocks for as long as zeroing takes. For any thread.

    Only the broker's user may open it again through ``/proc``.

    Args:
        length: In bytes, page aligned.
        mappings: How many processes will map all of it, about: huge pages are made for as long as it would
            take those to map small ones.

    Returns:
        The descriptor, the caller's, and whether its pages are huge ones, as many as fit.

    Raises:
        OSError: The kernel refused, ENOMEM or ENOSPC when memory is short; nothing is left behind.
    """
    descriptor = os.memfd_create("quire-lease", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, length)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        huge = _make_huge(descriptor, length, mappings * (length >> 20) * _MAP_MIB_MS)
        os.posix_fallocate(descriptor, 0, length)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, huge


def _make_huge(descriptor: int, length: int, patience_ms: float) -> bool:
    """Fill an empty memfd with huge pages, as many as fit; whether that was done."""
    if not HUGE_BYTES or length < HUGE_BYTES:
        return False
    for offset in range(0, length - HUGE_BYTES + 1, HUGE_BYTES):
        os.pwrite(descriptor, b"\0", offset)
    area = Area(length)
    area.map(0, length, descriptor, 0, True)
    return collapse(area.address, length, patience_ms)


def copy_extent(source: int, length: int, mappings: int) -> tuple[int, bool]:
    """Make a memfd with the same content as another; for any thread.

    Args:
        source: Borrowed. Others may write to it and cut it short meanwhile.
        length: In bytes, page aligned.
        mappings: As for `allocate`.

    Returns:
        As `allocate`.

    Raises:
        OSError: The kernel refused, or the source has become shorter.
    """
    descriptor, huge = allocate(length, mappings)
    try:
        area = Area(length)
        area.map(0, length, descriptor, 0, True)
        # Read, not loaded: a touch of what its maker has truncated would be SIGBUS.
        with area.view(0, length, True) as view:
            done = 0
            while done < length:
                with view[done : done + _COPY_BYTES] as part:
                    copied = os.preadv(source, [part], done)
                if not copied:
                    raise OSError(errno.EIO, "preadv: the memory was cut short while it was copied")
                done += copied
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, huge


def seal_extent(descriptor: int, more: int) -> None:
    """Fix the seals of a memfd that is lent: GROW, SEAL and ``more``.

    Raises:
        NotImmutable: It has others.
    """
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == fcntl.F_SEAL_GROW:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, more | fcntl.F_SEAL_SEAL)
    found = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if found != fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | more:
        raise NotImmutable(f"memory has the seals {found:#x}: who made it has added some, so it is not lent")


class Extent:
    """A part of a memory object: one memfd, the unit in which access is given and taken away.

    It is sealed GROW, so it can never hold more than is charged for it; and FUTURE_WRITE and SEAL once its
    object is.
    """

    def __init__(self, memory: Memory, index: int, serial: int, descriptor: int) -> None:
        """Take a memfd over.

        Args:
            memory: What it is a part of.
            index: Which part.
            serial: Names it in the protocol; it keeps it when it is moved.
            descriptor: Belongs to the extent from now on; open for reading and writing.
        """
        self.memory = memory
        self.index = index
        self.serial = serial
        self.descriptor = descriptor
        self.generation = 0
        # Whether it is known to consist of huge pages; after a restart it is not.
        self.huge = False
        # In the order in which they were made.
        self.leases: dict[Lease, None] = {}
        # The sessions that were given a descriptor of it as it is now, by number; see given.py.
        self.given: dict[int, Session | None] = {}

    @property
    def start(self) -> int:
        """Offset within the memory, in bytes."""
        return self.index * self.memory.extent_bytes

    @property
    def length(self) -> int:
        """In bytes, a multiple of the page."""
        return min(self.memory.extent_bytes, self.memory.padded_bytes - self.start)

    @property
    def cost(self) -> Amount:
        """What its payer is charged."""
        return Amount(self.length, 0, 1)

    @property
    def key(self) -> str:
        """What it is called where descriptors are kept."""
        return f"x{self.serial}.{self.generation}"

    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino

    def open_for(self, write: bool) -> int:
        """Open it once more; the caller owns the descriptor.

        Raises:
            OSError: There are too many open descriptors.
        """
        access = os.O_RDWR if write else os.O_RDONLY
        return os.open(f"/proc/self/fd/{self.descriptor}", access | os.O_CLOEXEC)

    def seal(self) -> None:
        """Let nobody make a writable mapping any more; those that exist stay.

        Raises:
            NotImmutable: Its maker has added seals of his own: it could not be taken back any more.
        """
        seal_extent(self.descriptor, F_SEAL_FUTURE_WRITE)


class Memory(Held):
    """Memory that is lent. Its bank pays for all of its pages from the start."""

    kind = "memory"

    def __init__(
        self, number: int, bank: Bank, size_bytes: int, extent_bytes: int, *, shared: bool, maker: int
    ) -> None:
        """Describe it; the extents are added when they are allocated.

        Args:
            number: Names it in the journal.
            bank: Pays for it, and has been charged.
            size_bytes: As asked for.
            extent_bytes: A multiple of the page.
            shared: Whether every holder of WRITE may map it writable.
            maker: The number of the session that may do so otherwise, until it is sealed.
        """
        super().__init__(number, bank)
        self.shared = shared
        self.maker = maker
        self.size_bytes = size_bytes
        self.extent_bytes = extent_bytes
        self.sealed = False
        self.extents: list[Extent] = []
        # In the order in which they were made.
        self.leases: dict[Lease, None] = {}

    @property
    def padded_bytes(self) -> int:
        """Size up to the next page."""
        return -(-self.size_bytes // PAGE) * PAGE

    @property
    def extent_count(self) -> int:
        """How many extents it has, or will have."""
        return -(-self.size_bytes // self.extent_bytes)

    @property
    def cost(self) -> Amount:
        """What its bank is charged."""
        return Amount(self.padded_bytes, 1, self.extent_count)

    def within(self, offset: int, stop: int) -> range:
        """Indices of the extents that a half-open range of bytes touches."""
        return range(offset // self.extent_bytes, -(-stop // self.extent_bytes))


class Layer:
    """A sealed memfd that snapshots are made of. One bank pays for it, however many use it."""

    def __init__(self, number: int, descriptor: int, payer: Bank) -> None:
        """Take a checked layer over.

        Args:
            number: Names it in the journal.
            descriptor: Belongs to the layer from now on.
            payer: Has been charged.
        """
        self.number = number
        self.descriptor = descriptor
        self.payer = payer
        status = os.fstat(descriptor)
        self.identity = status.st_dev, status.st_ino
        self.bytes = status.st_blocks * 512
        # In the order in which they came: the first that can pay takes over when the payer goes.
        self.holders: dict[SnapshotObject, None] = {}

    @property
    def cost(self) -> Amount:
        """What its payer is charged."""
        return Amount(self.bytes, 0, 1)

    @property
    def key(self) -> str:
        """What it is called where descriptors are kept."""
        return f"y{self.number}"


def seals(descriptor: int) -> int:
    """Read the seals of a memfd.

    Raises:
        NotImmutable: It is none.
    """
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
        raise NotImmutable("a descriptor that came is no memfd") from error


def check_layer(descriptor: int) -> tuple[int, int, int]:
    """Check that a descriptor holds memory that is fixed in content and in what it costs.

    Returns:
        Device, inode, allocated bytes.

    Raises:
        NotImmutable: It is no memfd with all four seals.
        Malformed: It has holes: reading one through a mapping would allocate a page that nobody pays for.
    """
    if seals(descriptor) & IMMUTABLE != IMMUTABLE:
        raise NotImmutable("a layer is no memfd sealed against writing, shrinking, growing and unsealing")
    status = os.fstat(descriptor)
    if status.st_blocks * 512 < status.st_size:
        raise Malformed("a layer has holes; fill them with fallocate, what is kept is paid for in full")
    return status.st_dev, status.st_ino, status.st_blocks * 512


class SnapshotObject(Held):
    """An immutable snapshot that the broker keeps."""

    kind = "snapshot"

    def __init__(self, number: int, bank: Bank, layers: list[Layer], size_bytes: int) -> None:
        """Hold the layers, top layer first."""
        super().__init__(number, bank)
        self.layers = layers
        self.size_bytes = size_bytes
        for layer in layers:
            layer.holders[self] = None


class Factory(Held):
    """Makes the newest version of something available; nobody but its owner can put one in."""

    kind = "factory"

    def __init__(self, number: int, bank: Bank, version: int = 0) -> None:
        """Start empty."""
        super().__init__(number, bank)
        self.version = version
        self.current: SnapshotObject | None = None


OBJECT = Amount(0, 1)
"""What an object costs by itself."""
