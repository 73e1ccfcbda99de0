"""The Windows side: memory is reserved first and committed afterwards, in steps of 64 KiB.

Outcomes are the documented ones. There is no Windows here to compare with: what the documentation leaves open
is decided as this module's docstrings say.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final, NamedTuple

from quire.errors import QuireError

PAGE_BYTES: Final = 4096
GRANULARITY_BYTES: Final = 1 << 16
LOWEST: Final = 0x10000
HIGHEST: Final = 0x7FFF_FFFF_0000

MEM_COMMIT: Final = 0x1000
MEM_RESERVE: Final = 0x2000
MEM_DECOMMIT: Final = 0x4000
MEM_RELEASE: Final = 0x8000
MEM_FREE: Final = 0x10000
MEM_TOP_DOWN: Final = 0x100000

PAGE_NOACCESS: Final = 0x01
PAGE_READONLY: Final = 0x02
PAGE_READWRITE: Final = 0x04
PAGE_EXECUTE: Final = 0x10
PAGE_EXECUTE_READ: Final = 0x20
PAGE_EXECUTE_READWRITE: Final = 0x40
PAGE_GUARD: Final = 0x100

PROCESS_VM_OPERATION: Final = 0x08
PROCESS_VM_READ: Final = 0x10
PROCESS_VM_WRITE: Final = 0x20

ERRORS: Final = {
    5: "ERROR_ACCESS_DENIED",
    87: "ERROR_INVALID_PARAMETER",
    487: "ERROR_INVALID_ADDRESS",
    8: "ERROR_NOT_ENOUGH_MEMORY",
    1455: "ERROR_COMMITMENT_LIMIT",
}
ACCESS_DENIED, INVALID_PARAMETER, INVALID_ADDRESS, NOT_ENOUGH_MEMORY, COMMITMENT_LIMIT = ERRORS

STATUS_ACCESS_VIOLATION: Final = 0xC000_0005
STATUS_GUARD_PAGE_VIOLATION: Final = 0x8000_0001

_READABLE = {
    PAGE_READONLY,
    PAGE_READWRITE,
    PAGE_EXECUTE_READ,
    PAGE_EXECUTE_READWRITE,
    PAGE_EXECUTE,
}
_WRITABLE = {PAGE_READWRITE, PAGE_EXECUTE_READWRITE}
_KINDS = {PAGE_NOACCESS, *_READABLE}


def _up(value: int, unit: int) -> int:
    return (value + unit - 1) & -unit


class Win32Error(QuireError):
    """A call failed as on Windows, with what ``GetLastError`` returns there.

    Attributes:
        code: The number, such as 487.
        name: Its name, such as ``ERROR_INVALID_ADDRESS``.
    """

    def __init__(self, code: int, call: str, why: str) -> None:
        self.code = code
        self.name = ERRORS[code]
        super().__init__(f"{call}: {why} ({self.name}, {code})")


class Information(NamedTuple):
    """A run of pages that are alike, as ``VirtualQuery`` describes one.

    Attributes:
        base: First address of the run.
        allocation_base: First address of the reservation, or 0 if free.
        allocation_protect: What it was reserved with, or 0 if free.
        size_bytes: Length of the run.
        state: MEM_COMMIT, MEM_RESERVE or MEM_FREE.
        protect: Of committed pages, else 0.
    """

    base: int
    allocation_base: int
    allocation_protect: int
    size_bytes: int
    state: int
    protect: int


class _Reservation:
    """What one call reserved: runs of pages, each committed with a protection or only reserved (0).

    Invariant: ``starts`` is ascending and begins with ``base``; neighbouring runs differ.
    """

    __slots__ = ("base", "end", "protect", "starts", "values")

    def __init__(self, base: int, end: int, protect: int) -> None:
        self.base = base
        self.end = end
        self.protect = protect
        self.starts = [base]
        self.values = [0]

    def runs(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return (start, end, protection) of the runs in a range, clipped to it."""
        found = []
        index = bisect_right(self.starts, start) - 1
        while index < len(self.starts) and self.starts[index] < end:
            stop = self.starts[index + 1] if index + 1 < len(self.starts) else self.end
            found.append((max(start, self.starts[index]), min(end, stop), self.values[index]))
            index += 1
        return found

    def put(self, start: int, end: int, value: int) -> None:
        """Give a range one protection, or 0."""
        runs = [*self.runs(self.base, start)] if start > self.base else []
        runs.append((start, end, value))
        if end < self.end:
            runs += self.runs(end, self.end)
        self.starts, self.values = [], []
        for run_start, _, run_value in runs:
            if not self.values or self.values[-1] != run_value:
                self.starts.append(run_start)
                self.values.append(run_value)

    def committed_bytes(self, start: int, end: int) -> int:
        """Return how much of a range is committed."""
        return sum(stop - first for first, stop, value in self.runs(start, end) if value)


class WindowsSpace:
    """A model of the memory of one Windows process.

    Args:
        commit_limit_bytes: How much may be committed; None for any amount.

    Addresses and sizes are in bytes. Every misuse raises `Win32Error` and changes nothing.
    """

    def __init__(self, commit_limit_bytes: int | None = None) -> None:
        self.commit_limit_bytes = commit_limit_bytes
        self.committed_bytes = 0
        self._bases: list[int] = []
        self._reservations: list[_Reservation] = []

    def virtual_alloc(self, address: int, size: int, allocation_type: int, protect: int) -> int:
        """Reserve pages, commit reserved ones, or both.

        Args:
            address: Where, or 0 for anywhere. Rounded down to 64 KiB to reserve, to a page to commit.
            size: In bytes; all pages with a byte of ``[address, address + size)`` are meant.
            allocation_type: MEM_RESERVE, MEM_COMMIT or both, and MEM_TOP_DOWN. MEM_COMMIT without an address
                reserves, too.
            protect: A PAGE_… constant, PAGE_GUARD in addition if wanted. Pages that are committed already get
                it.

        Returns:
            The first address of the pages.

        Raises:
            Win32Error: ERROR_INVALID_PARAMETER for a size of 0 or flags that do not exist;
                ERROR_INVALID_ADDRESS for reserving what is not free, for committing what is not all in one
                reservation, and outside of the space; ERROR_COMMITMENT_LIMIT; ERROR_NOT_ENOUGH_MEMORY if no
                free range is left.
        """
        call = "VirtualAlloc"
        kinds = allocation_type & ~MEM_TOP_DOWN
        if not size or kinds not in (MEM_RESERVE, MEM_COMMIT, MEM_RESERVE | MEM_COMMIT):
            raise Win32Error(INVALID_PARAMETER, call, f"size {size:#x}, type {allocation_type:#x}")
        self._check_protection(call, protect)
        if address:
            if address < LOWEST or size < 0 or address + size > HIGHEST:
                raise Win32Error(INVALID_ADDRESS, call, f"{address:#x} + {size:#x} is outside of the space")
            end = _up(address + size, PAGE_BYTES)
        if not address or kinds & MEM_RESERVE:
            return self._reserve(call, address, size, allocation_type, protect)
        start = address & -PAGE_BYTES
        there = self._holding(call, start, end)
        self._charge(call, end - start - there.committed_bytes(start, end))
        there.put(start, end, protect)
        return start

    def virtual_free(self, address: int, size: int, free_type: int) -> None:
        """Decommit pages, or release a whole reservation.

        Args:
            address: To decommit, anywhere in a reservation; to release, what reserving returned.
            size: In bytes; 0 to release. To decommit, 0 means all of the reservation that begins at
                ``address``.
            free_type: MEM_DECOMMIT or MEM_RELEASE.

        Raises:
            Win32Error: ERROR_INVALID_PARAMETER for any other type, for releasing with a size, and for a range
                beyond the reservation; ERROR_INVALID_ADDRESS for what is not reserved, and for a size of 0 at
                another address than that of a reservation. Decommitting what is not committed is no error.
        """
        call = "VirtualFree"
        if free_type not in (MEM_DECOMMIT, MEM_RELEASE):
            raise Win32Error(INVALID_PARAMETER, call, f"type {free_type:#x}")
        if free_type == MEM_RELEASE and size:
            raise Win32Error(INVALID_PARAMETER, call, "a reservation is released as a whole: size must be 0")
        there = self._at(address)
        if there is None:
            raise Win32Error(INVALID_ADDRESS, call, f"{address:#x} is not reserved")
        if not size and address != there.base:
            raise Win32Error(INVALID_ADDRESS, call, f"{address:#x} is not where the reservation begins")
        start = address & -PAGE_BYTES
        end = _up(address + size, PAGE_BYTES) if size else there.end
        if end > there.end:
            raise Win32Error(
                INVALID_PARAMETER, call, f"{end:#x} is beyond the reservation's end {there.end:#x}"
            )
        self.committed_bytes -= there.committed_bytes(start, end)
        if free_type == MEM_DECOMMIT:
            there.put(start, end, 0)
        else:
            index = bisect_right(self._bases, there.base) - 1
            del self._bases[index], self._reservations[index]

    def virtual_protect(self, address: int, size: int, protect: int) -> int:
        """Change the protection of committed pages.

        Args:
            address: In a reservation.
            size: In bytes; all pages with a byte of the range are meant.
            protect: A PAGE_… constant, PAGE_GUARD in addition if wanted.

        Returns:
            The protection that the first page had.

        Raises:
            Win32Error: ERROR_INVALID_PARAMETER for a protection that does not exist; ERROR_INVALID_ADDRESS
                for a size of 0 and for a range that is not committed as a whole in one reservation.
        """
        call = "VirtualProtect"
        self._check_protection(call, protect)
        if size <= 0:
            raise Win32Error(INVALID_ADDRESS, call, "an empty range")
        start, end = address & -PAGE_BYTES, _up(address + size, PAGE_BYTES)
        there = self._holding(call, start, end)
        runs = there.runs(start, end)
        for first, _, value in runs:
            if not value:
                raise Win32Error(INVALID_ADDRESS, call, f"{first:#x} is reserved, but not committed")
        there.put(start, end, protect)
        return runs[0][2]

    def virtual_query(self, address: int) -> Information:
        """Describe the run of like pages that begins with the page of an address.

        Raises:
            Win32Error: ERROR_INVALID_PARAMETER for an address outside of the space.
        """
        if not 0 <= address < HIGHEST:
            raise Win32Error(INVALID_PARAMETER, "VirtualQuery", f"{address:#x} is outside of the space")
        start = address & -PAGE_BYTES
        there = self._at(start)
        if there is None:
            index = bisect_right(self._bases, start)
            end = self._bases[index] if index < len(self._bases) else HIGHEST
            return Information(start, 0, 0, end - start, MEM_FREE, 0)
        _, end, value = there.runs(start, there.end)[0]
        return Information(
            start, there.base, there.protect, end - start, MEM_COMMIT if value else MEM_RESERVE, value
        )

    def touch(self, address: int, write: bool = False) -> int:
        """Read or write one byte.

        Returns:
            0, or the status of the exception: STATUS_ACCESS_VIOLATION, or STATUS_GUARD_PAGE_VIOLATION, after
            which the page is none that guards.
        """
        page = address & -PAGE_BYTES
        there = self._at(address)
        value = there.runs(page, page + PAGE_BYTES)[0][2] if there is not None else 0
        if there is not None and value & PAGE_GUARD:
            there.put(page, page + PAGE_BYTES, value & ~PAGE_GUARD)
            return STATUS_GUARD_PAGE_VIOLATION
        return 0 if value in (_WRITABLE if write else _READABLE) else STATUS_ACCESS_VIOLATION

    def open(self, access: int) -> Handle:
        """Return a handle with which another process works on this space, as ``OpenProcess`` does."""
        return Handle(self, access)

    def _reserve(self, call: str, address: int, size: int, allocation_type: int, protect: int) -> int:
        if address:
            base, end = address & -GRANULARITY_BYTES, _up(address + size, PAGE_BYTES)
            index = bisect_right(self._bases, base)
            before = self._reservations[index - 1].end if index else 0
            after = self._bases[index] if index < len(self._bases) else HIGHEST
            if before > base or after < end:
                raise Win32Error(INVALID_ADDRESS, call, f"{base:#x}-{end:#x} is not free")
        else:
            size = _up(size, PAGE_BYTES)
            found = self._find(size, top_down=bool(allocation_type & MEM_TOP_DOWN))
            if found is None:
                raise Win32Error(NOT_ENOUGH_MEMORY, call, f"no free range of {size:#x} bytes")
            base, end = found, found + size
        reservation = _Reservation(base, end, protect)
        if allocation_type & MEM_COMMIT:
            self._charge(call, end - base)
            reservation.put(base, end, protect)
        index = bisect_right(self._bases, base)
        self._bases.insert(index, base)
        self._reservations.insert(index, reservation)
        return base

    def _find(self, size: int, *, top_down: bool) -> int | None:
        """Return the lowest free address for a size, or the highest, a multiple of 64 KiB."""
        ends = [LOWEST, *(reservation.end for reservation in self._reservations)]
        starts = [*self._bases, HIGHEST]
        gaps = list(zip(ends, starts, strict=True))
        for low, high in reversed(gaps) if top_down else gaps:
            base = (high - size) & -GRANULARITY_BYTES if top_down else _up(low, GRANULARITY_BYTES)
            if base >= low and base + size <= high:
                return base
        return None

    def _at(self, address: int) -> _Reservation | None:
        index = bisect_right(self._bases, address) - 1
        if index < 0 or self._reservations[index].end <= address:
            return None
        return self._reservations[index]

    def _holding(self, call: str, start: int, end: int) -> _Reservation:
        there = self._at(start)
        if there is None or end > there.end:
            raise Win32Error(INVALID_ADDRESS, call, f"{start:#x}-{end:#x} is not within one reservation")
        return there

    def _charge(self, call: str, size: int) -> None:
        if self.commit_limit_bytes is not None and self.committed_bytes + size > self.commit_limit_bytes:
            raise Win32Error(COMMITMENT_LIMIT, call, f"{size:#x} bytes more than may be committed")
        self.committed_bytes += size

    @staticmethod
    def _check_protection(call: str, protect: int) -> None:
        kind = protect & ~PAGE_GUARD
        if kind not in _KINDS or protect == PAGE_NOACCESS | PAGE_GUARD:
            raise Win32Error(INVALID_PARAMETER, call, f"protection {protect:#x}")


class Handle:
    """A process that another one has opened: ``VirtualAllocEx`` and its like, as far as the handle allows.

    Args:
        space: Of the process that was opened.
        access: PROCESS_VM_OPERATION to change it, PROCESS_VM_READ and PROCESS_VM_WRITE for its bytes.
    """

    def __init__(self, space: WindowsSpace, access: int) -> None:
        self._space = space
        self._access = access

    def virtual_alloc_ex(self, address: int, size: int, allocation_type: int, protect: int) -> int:
        """As `WindowsSpace.virtual_alloc`; ERROR_ACCESS_DENIED without PROCESS_VM_OPERATION."""
        self._check("VirtualAllocEx", PROCESS_VM_OPERATION)
        return self._space.virtual_alloc(address, size, allocation_type, protect)

    def virtual_free_ex(self, address: int, size: int, free_type: int) -> None:
        """As `WindowsSpace.virtual_free`; ERROR_ACCESS_DENIED without PROCESS_VM_OPERATION."""
        self._check("VirtualFreeEx", PROCESS_VM_OPERATION)
        self._space.virtual_free(address, size, free_type)

    def virtual_protect_ex(self, address: int, size: int, protect: int) -> int:
        """As `WindowsSpace.virtual_protect`; ERROR_ACCESS_DENIED without PROCESS_VM_OPERATION."""
        self._check("VirtualProtectEx", PROCESS_VM_OPERATION)
        return self._space.virtual_protect(address, size, protect)

    def _check(self, call: str, needed: int) -> None:
        if self._access & needed != needed:
            raise Win32Error(ACCESS_DENIED, call, f"the handle has access {self._access:#x}, not {needed:#x}")
