"""``maps``: the address space of a process, read from ``/proc``."""

from __future__ import annotations

import bisect
import errno
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from quire.process import owned, parsing
from quire.process.kinds import Kind, Total, classify
from quire.process.pages import read_pages
from quire.process.procfs import Folder
from quire.process.vma import VMA

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from quire.process.finding import Found
    from quire.process.pages import Pages
    from quire.process.parsing import Columns
    from quire.process.procfs import Identity

__all__ = ["Detail", "Maps", "Process", "maps"]

Detail = Literal["maps", "smaps"]
_Table = tuple[tuple[str, ...], "NDArray[np.int64]", "NDArray[np.uint64]"]
"""Names of figures, places of VMAs, and a row of figures for each."""

_STACK_GUARD_BYTES = 256 * os.sysconf("SC_PAGESIZE")
"""What the kernel keeps free below a stack, unless it was started with another ``stack_guard_gap``."""
_ATTEMPTS = 3


class Process(NamedTuple):
    """Which process was read, and when.

    Attributes:
        pid: Its number.
        command: Its name, at most 15 bytes, as it gave it to itself.
        start_ticks: When it started, in clock ticks since boot.
        threads: How many threads it had.
        time: When reading began, in seconds as ``time.time`` tells it.
        monotonic: The same as ``time.monotonic`` tells it.
    """

    pid: int
    command: bytes
    start_ticks: int
    threads: int
    time: float
    monotonic: float


class Maps(Sequence[VMA]):
    """The VMAs of a process, ascending, none overlapping another, as they were when they were read.

    It is a sequence of `VMA`. It does not change; read again for the present state.

    Attributes:
        process: Which process, and when.
        detail: What was read: ``maps`` or ``smaps``.
        partial: Why something may be missing, in words; empty if nothing is.
        page_table_bytes: Memory that the kernel holds for the process's page tables; None if it was not told.
    """

    __slots__ = ("_figures", "_starts", "_vmas", "detail", "page_table_bytes", "partial", "process")

    def __init__(
        self,
        process: Process,
        detail: Detail,
        vmas: Iterable[VMA],
        partial: Iterable[str] = (),
        page_table_bytes: int | None = None,
    ) -> None:
        self.process = process
        self.detail = detail
        self.partial = tuple(partial)
        self.page_table_bytes = page_table_bytes
        self._vmas = tuple(vmas)
        self._starts = [vma.start for vma in self._vmas]
        self._figures: list[_Table] | None = None

    @property
    def pid(self) -> int:
        """The process's number."""
        return self.process.pid

    def __len__(self) -> int:
        return len(self._vmas)

    @overload
    def __getitem__(self, index: int) -> VMA: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[VMA, ...]: ...
    def __getitem__(self, index: int | slice) -> VMA | tuple[VMA, ...]:
        return self._vmas[index]

    def at(self, address: int) -> VMA | None:
        """Return the VMA that holds an address; None if none does."""
        place = bisect.bisect_right(self._starts, address) - 1
        if place >= 0 and address < self._vmas[place].end:
            return self._vmas[place]
        return None

    def overlapping(self, start: int, end: int) -> tuple[VMA, ...]:
        """Return the VMAs that hold some address from ``start`` to ``end``, exclusive."""
        first = max(bisect.bisect_right(self._starts, start) - 1, 0)
        last = bisect.bisect_left(self._starts, end)
        return tuple(vma for vma in self._vmas[first:last] if vma.end > start)

    def column(self, key: str) -> NDArray[np.int64]:
        """Return one figure of ``smaps`` of all VMAs, by the kernel's name, such as ``Rss``.

        Returns:
            An array with a number for each VMA, sizes in bytes; -1 where it was not told.
        """
        values = np.full(len(self._vmas), -1, np.int64)
        for keys, places, figures in self._tables():
            if key in keys:
                values[places] = figures[:, keys.index(key)]
        return values

    def _tables(self) -> list[_Table]:
        """Put the figures of VMAs that have the same ones in one table; nearly always there is one."""
        if self._figures is None:
            places: dict[tuple[str, ...], list[int]] = {}
            for place, vma in enumerate(self._vmas):
                places.setdefault(vma.keys, []).append(place)
            self._figures = [
                (
                    keys,
                    np.array(own, np.int64),
                    np.frombuffer(b"".join([self._vmas[place].figures for place in own]), np.uint64).reshape(
                        len(own), len(keys)
                    ),
                )
                for keys, own in places.items()
            ]
        return self._figures

    def pages(self, which: VMA | tuple[int, int]) -> Pages:
        """Read which pages of a range are in memory or swapped out, at this moment.

        Blocks; the kernel's part runs without the GIL. What is not there costs nothing.

        Args:
            which: A VMA, or the range from an address to another, exclusive, both multiples of the page size.

        Raises:
            ProcessLookupError: The process has ended, or its number is another's now.
            PermissionError: This user may not look at it.
            ValueError: The range is none of whole pages.
        """
        start, end = which[:2]
        with self._folder() as folder:
            return read_pages(folder, start, end)

    def pages_of_all(self) -> Iterator[tuple[VMA, Pages]]:
        """Read the pages of all VMAs, one after the other. Blocks, and raises, as ``pages`` does.

        Yields:
            A VMA and its pages.
        """
        with self._folder() as folder:
            for vma in self._vmas:
                yield vma, read_pages(folder, vma.start, vma.end)

    def find(self, address: int) -> Found:
        """Tell all there is to know of an address, at this moment; ``str`` of it is text for people.

        Reads the file that is mapped there, and in the own process looks for quire's objects among all that
        the interpreter has: it is for people who look at one address, not for loops.

        Args:
            address: Any, mapped or not.

        Raises:
            ProcessLookupError: The process has ended, or its number is another's now.
            PermissionError: This user may not look at it.
            ValueError: The address is negative or has more than 64 bits.
        """
        from quire.process.finding import find  # noqa: PLC0415 - it reads program files

        with self._folder() as folder:
            return find(self, folder, address)

    def _folder(self) -> Folder:
        """Open the process again, if it is still the same."""
        folder = Folder(self.process.pid)
        try:
            if folder.identity().start_ticks != self.process.start_ticks:
                raise ProcessLookupError(
                    errno.ESRCH, f"process {self.pid} has ended; its number is another process's now"
                )
        except BaseException:
            folder.close()
            raise
        return folder

    def totals(self) -> dict[Kind, Total]:
        """Return the sums of each kind that there is, in the order of `Kind`.

        Page tables and the gaps below stacks are no VMAs and have a count of 0; they are in no other sum.
        """
        sums: dict[Kind, list[int]] = {}
        for vma in self._vmas:
            row = sums.setdefault(vma.kind, [0, 0, 0, 0, 0])
            row[0] += 1
            row[1] += vma.size
            row[2] += vma.committed
            row[3] += vma.resident or 0
            row[4] += vma.proportional or 0
        told = self.detail != "maps"
        found = {
            kind: Total(count, virtual, committed, resident if told else None, proportional if told else None)
            for kind, (count, virtual, committed, resident, proportional) in sums.items()
        }
        if self.page_table_bytes:
            size = self.page_table_bytes
            found[Kind.PAGE_TABLES] = Total(0, 0, size, size, size)
        if gap := self._guard_gap_bytes():
            found[Kind.UNUSABLE] = Total(0, gap, 0, 0, 0)
        return {kind: found[kind] for kind in Kind if kind in found}

    def _guard_gap_bytes(self) -> int:
        """Sum up the addresses that nothing may be mapped at because a stack grows towards them."""
        gap = 0
        before = 0
        for vma in self._vmas:
            if "gd" in vma.flags or vma.name == b"[stack]":
                gap += min(_STACK_GUARD_BYTES, vma.start - before)
            before = vma.end
        return gap

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain numbers, strings, lists and dicts, for JSON."""
        return {
            "pid": self.process.pid,
            "command": self.process.command.decode("utf-8", "backslashreplace"),
            "start_ticks": self.process.start_ticks,
            "threads": self.process.threads,
            "time": self.process.time,
            "detail": self.detail,
            "partial": list(self.partial),
            "page_table_bytes": self.page_table_bytes,
            "vmas": [vma.as_dict() for vma in self._vmas],
            "totals": {str(kind): total._asdict() for kind, total in self.totals().items()},
        }

    def _repr_html_(self) -> str:
        """Show the page of docs/maps.md in a notebook."""
        from quire.process.picture import framed  # noqa: PLC0415 - drawing is for those who look

        return framed(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """Offer a notebook the page, a still picture for where scripts do not run, and a line of text."""
        from quire.process.picture import bundle  # noqa: PLC0415

        return bundle(self)

    def __repr__(self) -> str:
        """Show process and number of VMAs."""
        command = self.process.command.decode("utf-8", "backslashreplace")
        partial = ", partial" if self.partial else ""
        return f"<quire.maps of process {self.pid} ({command}): {len(self)} VMAs{partial}>"


def maps(pid: int | Literal["self"] = "self", *, detail: Detail = "smaps") -> Maps:
    """Read the address space of a process.

    The kernel walks the page tables for ``smaps``, which takes time in proportion to the process's VMAs and
    resident pages, and holds its map lock for reading meanwhile; ``maps`` does not and is about ten times as
    fast. Blocks, without the GIL while the kernel works.

    Reading is no snapshot: a process that goes on changes its memory meanwhile. A VMA that is there all the
    time is never missing. One that was read twice because it changed is given once, as it was read last.

    Args:
        pid: The process's number; that of one of its threads will do. ``self`` is the calling process.
        detail: ``smaps`` for everything; ``maps`` for addresses, protection, file and name only.

    Returns:
        The VMAs. ``partial`` says why something may be missing: the process ended or called execve in the
        middle, it is a kernel thread, a zombie, lines were not understood.

    Raises:
        ProcessLookupError: There is no such process, or it ended before anything was read.
        PermissionError: This user may not look at it.
        TypeError, ValueError: An argument is neither of these.
    """
    if detail not in ("maps", "smaps"):
        raise ValueError(f"detail is 'maps' or 'smaps', not {detail!r}")
    with Folder(pid) as folder:
        for attempt in range(_ATTEMPTS):
            found = _read(folder, detail, last=attempt == _ATTEMPTS - 1)
            if found is not None:
                return found
    raise AssertionError("the last attempt gives what it has")


def _read(folder: Folder, detail: Detail, last: bool) -> Maps | None:
    """Read once; None if the process became another program meanwhile and there is time to try again."""
    problems: list[str] = []
    before = folder.identity()
    process = Process(
        before.pid, before.command, before.start_ticks, before.threads, time.time(), time.monotonic()
    )
    with folder.opened(detail) as fd:
        columns = parsing.read(fd, problems)
    page_tables, pointers = None, []
    try:
        page_tables = folder.status_bytes().get("VmPTE")
        if before.threads > 1:
            pointers = _stack_pointers(folder, problems)
        after: Identity | None = folder.identity()
    except ProcessLookupError:
        after = None
    if not columns.start:
        problems.append(_why_empty(before.pid, before, after))
    elif after is None or after.state in "ZX":
        problems.append(f"process {before.pid} ended while it was read")
    elif after.program != before.program:
        if not last:
            return None
        problems.append(f"process {before.pid} called execve while it was read")
    columns = parsing.without_repeats(columns, problems)
    for place, name in enumerate(columns.name):
        if b"\\012" in name:
            columns.name[place] = _exact_name(folder, columns, place, problems)
    kinds = classify(columns, pointers, before.threads)
    if before.pid == os.getpid():
        _mark_own(columns, kinds)
    vmas = map(VMA._make, zip(*columns, kinds, strict=True))
    return Maps(process, detail, vmas, problems, page_tables)


def _why_empty(pid: int, before: Identity, after: Identity | None) -> str:
    """Say why a process has no VMAs; raise if it is gone."""
    if before.is_kernel_thread:
        return f"process {pid} is a kernel thread: it has no address space of its own"
    if after is None:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} ended before anything was read")
    if after.state in "ZX":
        return f"process {pid} has ended and is not waited for (a zombie): its memory is gone"
    return f"process {pid} shows no VMA: it is starting, ending, or calling execve"


def _stack_pointers(folder: Folder, problems: list[str]) -> list[int]:
    """Find where threads that wait in the kernel have their stacks; running ones do not tell."""
    found = []
    for thread in folder.threads():
        try:
            words = folder.read(f"task/{thread}/syscall").split()
        except (FileNotFoundError, ProcessLookupError):
            # The thread has ended, or this kernel does not tell of any.
            continue
        except PermissionError as error:
            problems.append(f"stacks of threads are not told: {error.strerror}")
            break
        if len(words) >= 3:
            found.append(int(words[-2], 16))
    return found


def _mark_own(columns: Columns, kinds: list[Kind]) -> None:
    """Mark the private memory of this library's objects, which has no name that tells it."""
    for start, end in owned.ranges():
        first, last = bisect.bisect_left(columns.start, start), bisect.bisect_left(columns.start, end)
        for place in range(first, last):
            if columns.end[place] <= end:
                kinds[place] = Kind.QUIRE


def _exact_name(folder: Folder, columns: Columns, place: int, problems: list[str]) -> bytes:
    """Undo the kernel's escape of newlines, which looks the same as a name that holds a backslash and 012."""
    try:
        return folder.readlink(f"map_files/{columns.start[place]:x}-{columns.end[place]:x}")
    except OSError as error:
        problems.append(f"a name is as the kernel writes it, with newlines as \\012, because {error}")
        return columns.name[place]
