"""Address space of a client: a reservation into which leased memory is mapped, and out of which it is taken.

The reservation stays until the last view of it has gone, so an address never comes to show other data.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import TYPE_CHECKING, Any

from quire import _native
from quire.broker.hugepages import HUGE_BYTES, advise, fill_page_table

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Area"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_FAILED = ctypes.c_void_p(-1).value
_MADV_DONTFORK = 10


def _raise(call: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {os.strerror(number)}")


def _mmap(address: int | None, length: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    got = _libc.mmap(address, length, protection, flags, descriptor, offset)
    if got == _FAILED:
        _raise("mmap")
    return int(got or 0)


def _reserve(length: int, offset: int) -> int:
    """Reserve addresses, aligned to huge pages as ``offset`` is; return the first."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    if length < HUGE_BYTES or not HUGE_BYTES:
        return _mmap(None, length, _PROT_NONE, flags, -1, 0)
    got = _mmap(None, length + HUGE_BYTES, _PROT_NONE, flags, -1, 0)
    before = (offset - got) % HUGE_BYTES
    if before:
        _libc.munmap(got, before)
    _libc.munmap(got + before + length, HUGE_BYTES - before)
    return got + before


class Area:
    """A reserved range of addresses. Every method that maps blocks for as long as the kernel takes."""

    def __init__(self, length: int, offset: int = 0) -> None:
        """Reserve.

        Args:
            length: In bytes, a multiple of the page.
            offset: Of its first byte in the file that it will show: huge pages can be mapped where address
                and offset are aligned alike.

        Raises:
            OSError: There is too little address space.
        """
        self.length = length
        self.address = _reserve(length, offset)
        self._lent: _native.Lent | None = None
        self._process = os.getpid()

    def announce(self, number: int, at: int, size: int) -> None:
        """Have a touch that fails explained on standard error, before it goes where it would go otherwise.

        Args:
            number: Of the lease, for people.
            at: Where its first byte lies, in bytes from the start of the area.
            size: Of the lease, in bytes.

        Raises:
            OSError: No signal handler can be installed.
        """
        self._lent = _native.Lent(self.address, self.length, self.address + at, size, number)

    def given_back(self) -> None:
        """Have it explained from now on by saying that the lease was given back."""
        if self._lent is not None:
            self._lent.close()

    def map(self, at: int, length: int, descriptor: int, offset: int, write: bool) -> None:
        """Map a range of a file.

        Args:
            at: Where, in bytes from the start of the area; page aligned, as the next two.
            length: How much.
            descriptor: Borrowed for the call.
            offset: Within the file.
            write: Whether it may be written through the mapping.

        Raises:
            OSError: The kernel refused; what was there is there still.
        """
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        _mmap(self.address + at, length, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, offset)
        # A child that is forked has no part in the lease, and must not keep the memory.
        self._dont_fork(self.address + at, length)

    def move(
        self, at: int, length: int, descriptor: int, offset: int, write: bool, huge: bool = False
    ) -> None:
        """Replace what is mapped by another file with the same content.

        The pages are mapped at another address first and then moved, so a thread that touches them finds them
        in the page table: it sees no fault but, at worst, waits for the move.

        Args:
            at: As for `map`, as the next four.
            length: How much.
            descriptor: Borrowed for the call.
            offset: Within the file.
            write: Whether it may be written through the mapping.
            huge: The file consists of huge pages.

        Raises:
            OSError: The kernel refused; what was there is there still.
        """
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        # Aligned as where it goes, so that a huge page stays one when it is moved.
        fresh = _reserve(length, self.address + at)
        try:
            _mmap(fresh, length, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, offset)
            self._dont_fork(fresh, length)
            fill_page_table(fresh, length, huge)
            flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
            if _libc.mremap(fresh, length, length, flags, self.address + at) == _FAILED:
                _raise("mremap")
        except BaseException:
            _libc.munmap(fresh, length)
            raise

    def cut(self, at: int, length: int) -> None:
        """Take what is mapped away; a touch is SIGBUS from then on.

        Does nothing in a forked child, where nothing is mapped and the addresses may be somebody else's.

        Raises:
            OSError: The kernel refused.
        """
        if os.getpid() != self._process:
            return
        # Behind the end of an empty file every touch is SIGBUS; the seal keeps it empty.
        descriptor = os.memfd_create("quire-revoked", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            _mmap(self.address + at, length, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        finally:
            os.close(descriptor)

    @staticmethod
    def _dont_fork(address: int, length: int) -> None:
        advise(address, length, _MADV_DONTFORK)

    def view(self, at: int, length: int, write: bool) -> memoryview:
        """Show a range as bytes; the area lives as long as any view of it."""
        buffer = _Window(self, at, length)
        view = memoryview(buffer.bytes).cast("B")
        return view if write else view.toreadonly()

    def __del__(self, munmap: Any = _libc.munmap, getpid: Callable[[], int] = os.getpid) -> None:
        """Give the addresses back; not in a forked child, where somebody else may have them by now."""
        address = getattr(self, "address", 0)
        # First, because somebody else may be given the addresses as soon as they are free.
        self._lent = None
        if address and getattr(self, "_process", 0) == getpid():
            munmap(address, self.length)


class _Window:
    """Makes an exporter of memory at an address, which holds the area."""

    def __init__(self, area: Area, at: int, length: int) -> None:
        window: Any = type("Window", (ctypes.c_ubyte * length,), {})
        self.bytes = window.from_address(area.address + at)
        self.bytes._area = area
