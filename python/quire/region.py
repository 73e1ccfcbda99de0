"""Regions: memory that is filled when it is first touched, and again after it was taken away."""

# Sources and json are imported when something is opened, recorded or pickled.
# ruff: noqa: PLC0415

from __future__ import annotations

import contextlib
import operator
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args

from quire import _native
from quire.arrays import ArrayViews
from quire.capabilities import FAULTS_OVERRIDE
from quire.closing import Closing
from quire.errors import Malformed, Unsupported
from quire.ranges import Ranges
from quire.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

    from quire.sources import Source

__all__ = ["Discard", "Faults", "Region", "RegionStats", "open"]

Discard = Literal["kernel", "pressure", "never"]
Faults = Literal["auto", "thread", "signal", "sigsegv", "eager"]

_AUTOMATIC: tuple[Faults, ...] = ("thread", "sigsegv")


@dataclass(frozen=True, slots=True)
class RegionStats:
    """What a region has done since it was made, in this process."""

    faults: int
    """Touches of missing pages that were served."""
    fills: int
    """Windows that were filled, ahead of a touch too."""
    bytes: int
    """Bytes that the source gave."""
    refills: int
    """Fills of windows that had been filled before and were taken away."""
    failures: int
    """Fills that failed."""
    evictions: int
    """Windows that were taken back under pressure or for the budget."""
    latency_us: tuple[tuple[int, int], ...]
    """How long faults took to serve: pairs of an upper bound in microseconds, exclusive, and the number of
    faults below it and not below the one before, up to the slowest fault. Faults of more than four seconds
    are in the pair of 2**23."""


class Region(ArrayViews, Closing, _native.Region):
    """Read-only memory that shows a source. Only what is touched is ever produced.

    A touch of a page that is not there, from Python, C code or (with the ``thread`` backend) inside a system
    call, waits until the page's window is filled. A fill that fails raises PageError where there is somebody
    to raise it to (``read``, ``pin``, ``prefetch``); a bare touch is stopped with SIGBUS, after a message on
    standard error that names region, range and cause. A page that was not filled is never seen as zeros, in a
    forked child neither. A failed window can be tried again after ``discard``.

    ``docs/regions.md`` tells which backend gives what.
    """

    _source: Source
    _owned: Source | None
    _executable: bool
    _budget_bytes: int | None

    def __new__(
        cls,
        source: Source | Snapshot | Buffer | str | os.PathLike[str],
        *,
        window_bytes: int = 65536,
        discard: Discard = "kernel",
        faults: Faults = "auto",
        shared: bool = False,
        executable: bool = False,
        budget_bytes: int | None = None,
    ) -> Self:
        """Make a region. Nothing of the source is read yet, except with ``faults="eager"``.

        Args:
            source: What to show: a source of ``quire.sources``; or what ``quire.open`` takes, a Snapshot or a
                bytes-like object, for which a source is made that the region owns. A source that is passed
                stays the caller's, and may be closed while the region lives.
            window_bytes: How much is filled at a touch, at least: a power of two, 4096 to 16 MiB. The
                ``sigsegv`` backend makes it larger so that there are at most 8192 windows.
            discard: Who takes filled pages away. ``kernel``: the kernel, whenever it wants memory, the
                cgroup's limit included. ``pressure``: this process, the coldest first, when memory is short
                or the budget is spent. ``never``: only ``discard()``. What the backend cannot notice becomes
                ``never``; ``discard_mode`` tells.
            faults: How touches are noticed. ``thread``: userfaultfd and threads of the pager. ``signal``:
                userfaultfd and SIGBUS, served in the toucher; system calls on missing pages fail with EFAULT.
                ``sigsegv``: no privilege needed; the same limit for system calls. ``eager``: not at all,
                everything is filled now. ``auto``: ``thread``, or where it is refused ``sigsegv``, unless the
                environment variable QUIRE_FAULTS names another.
            shared: Keep the pages in a memfd. Processes that are given the region (pickled) share one set of
                filled pages, and each can fill. They must trust each other: any can write to the file.
            executable: Code may run in it. No page is ever writable at an address where it is executable.
            budget_bytes: With ``discard="pressure"``, take windows back beyond so many bytes.

        Raises:
            ValueError: A size or a mode makes no sense.
            Unsupported: This kernel or user has no userfaultfd, and ``thread`` or ``signal`` was asked for.
            PageError: Eager filling failed.
            MemoryError, OSError: There is too little memory or address space, or the source cannot be opened.
        """
        _check_options(discard, faults, budget_bytes)
        owned, opened = _as_source(source)
        try:
            self = cls._make(opened, None, shared, window_bytes, discard, faults, executable, budget_bytes)
        except BaseException:
            if owned:
                opened.close()
            raise
        self._owned = opened if owned else None
        return self

    @classmethod
    def _make(
        cls,
        source: Source,
        shared_fd: int | None,
        shared: bool,
        window_bytes: int,
        discard: Discard,
        faults: Faults,
        executable: bool,
        budget_bytes: int | None,
    ) -> Self:
        """Make a region, by the first backend that works if any will do."""
        window_bytes = operator.index(window_bytes)
        if window_bytes < 1:
            raise ValueError(f"a window of {window_bytes} bytes")
        with contextlib.ExitStack() as stack:
            if shared and shared_fd is None:
                shared_fd = _native.region_file(source.size)
                stack.callback(os.close, shared_fd)
            chosen = _choices(faults)
            for place, backend in enumerate(chosen):
                try:
                    self = super().__new__(
                        cls,
                        source._native,
                        source.name,
                        window_bytes,
                        discard,
                        backend,
                        executable,
                        shared_fd,
                        budget_bytes,
                    )
                except Unsupported:
                    if place == len(chosen) - 1:
                        raise
                    continue
                break
        self._source, self._owned = source, None
        self._executable, self._budget_bytes = executable, budget_bytes
        return self

    @property
    def name(self) -> str:
        """The source's name, as messages show it."""
        return self._source.name

    def pin(
        self, offset: int = 0, length: int | None = None
    ) -> contextlib.AbstractContextManager[memoryview]:
        """Make a range resident, and keep it so until the end of the ``with`` block.

        Inside the block system calls work on the range with every backend, and nobody takes its pages; the
        kernel may still swap them out. Blocks while windows are filled. Pins nest and may overlap. A forked
        child does not inherit a pin.

        Args:
            offset: Start in bytes.
            length: Length in bytes; None is all from the offset on.

        Returns:
            A context manager whose value is a read-only view of the range, released at the end. The range is
            pinned when the block is entered.

        Raises:
            PageError: A window could not be filled; nothing stays pinned.
            ValueError: The range is outside the region, or the region is closed.
        """
        return self._pinned(*self._range(offset, length))

    @contextlib.contextmanager
    def _pinned(self, offset: int, length: int) -> Iterator[memoryview]:
        self.pin_native(offset, length)
        try:
            with memoryview(self) as whole, whole[offset : offset + length] as view:
                yield view
        finally:
            if not self.closed:
                self.unpin_native(offset, length)

    def prefetch(self, offset: int = 0, length: int | None = None, *, wait: bool = True) -> None:
        """Fill what is missing of a range.

        Args:
            offset: Start in bytes.
            length: Length in bytes; None is all from the offset on.
            wait: Return when all is filled. False: return at once and let other threads fill; a failure is
                then met by whoever touches the window.

        Raises:
            PageError: A window could not be filled, and ``wait`` is true.
            ValueError: The range is outside the region, or the region is closed.
        """
        self.prefetch_native(*self._range(offset, length), wait)

    def discard(self, offset: int = 0, length: int | None = None) -> int:
        """Drop the pages of all windows that lie wholly within a range and are not pinned.

        The next touch fills them again, those that had failed too. With a shared region they go for every
        process. Nothing happens to an eager region, nor to a shared one with the ``sigsegv`` backend, except
        that failures are forgotten.

        Returns:
            How many windows were dropped.

        Raises:
            ValueError: The range is outside the region, or the region is closed.
        """
        return self.discard_native(*self._range(offset, length))

    def resident(self) -> Ranges:
        """Return the ranges of bytes that are in memory now, in whole pages, ascending and merged.

        With a shared region, those that any process has filled.
        """
        return Ranges._from_native(self.resident_native())

    @property
    def stats(self) -> RegionStats:
        """What happened so far in this process."""
        faults, fills, nbytes, refills, failures, evictions, latency = self.figures()
        used = max((place for place, count in enumerate(latency) if count), default=-1) + 1
        bounds = tuple((1 << place, count) for place, count in enumerate(latency[:used]))
        return RegionStats(faults, fills, nbytes, refills, failures, evictions, bounds)

    def record(self, path: str | os.PathLike[str]) -> int:
        """Save which windows were touched while missing, in the order of first touch.

        Args:
            path: A file to be written, as JSON; replaced in one step if it exists.

        Returns:
            How many windows were recorded.
        """
        import json
        from pathlib import Path

        window = self.window_bytes
        ranges = [[at * window, min((at + 1) * window, self.size)] for at in self.touched()]
        target = Path(path)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        draft.write_text(
            json.dumps({"quire": "working set", "version": 1, "size": self.size, "ranges": ranges})
        )
        draft.replace(target)
        return len(ranges)

    def replay(self, path: str | os.PathLike[str], *, wait: bool = False) -> int:
        """Prefetch a working set that ``record`` saved, in its order.

        Args:
            path: What ``record`` wrote, for a source of the same size.
            wait: As for ``prefetch``.

        Returns:
            How many bytes were asked for.

        Raises:
            Malformed: The file is not such a record, or one of a source of another size.
            PageError: A window could not be filled, and ``wait`` is true.
        """
        total = 0
        for start, stop in _read_record(path, self.size):
            self.prefetch(start, stop - start, wait=wait)
            total += stop - start
        return total

    def _range(self, offset: int, length: int | None) -> tuple[int, int]:
        offset = operator.index(offset)
        length = self.size - offset if length is None else operator.index(length)
        if not (0 <= offset <= self.size and 0 <= length <= self.size - offset):
            raise ValueError(f"bytes {offset} to {offset}+{length} are outside a region of {self.size} bytes")
        return offset, length

    def close(self) -> None:
        """Give the memory back. Idempotent. Waits for what is being filled.

        Raises:
            BufferError: Views are still exported.
        """
        super().close()
        owned, self._owned = self._owned, None
        if owned is not None:
            owned.close()

    def __reduce_ex__(self, _protocol: object) -> tuple[Callable[..., Region], tuple[Any, ...]]:
        """Pickle for multiprocessing: the source, and for a shared region the file that holds its pages.

        A region that is not shared is made anew where it is loaded, with memory of its own.
        """
        options = (self.window_bytes, self.discard_mode, self.faults, self._executable, self._budget_bytes)
        if (fd := self.shared_fileno()) is None:
            return _unpickle, (self._source, None, *options)
        from multiprocessing.reduction import DupFd

        return _unpickle, (self._source, DupFd(fd), *options)

    def __repr__(self) -> str:
        """Show name, size and modes."""
        if self.closed:
            return "<quire.Region closed>"
        return f"<quire.Region {self.name!r} of {self.size} bytes, {self.faults}, {self.discard_mode}>"


def open(target: str | os.PathLike[str], **options: Any) -> Region:  # noqa: A001
    """Open a file, a member of an archive or a url as a region.

    Args:
        target: A path; ``archive.zip!/member`` for a member of a zip or wheel; or a url. What is compressed
            is recognised by its content and shown uncompressed.
        options: As for ``Region``.

    Returns:
        A region that owns its source.

    Raises:
        FileNotFoundError: There is no such file or member.
        Malformed: The archive or compressed file is damaged, as far as is seen when it is opened.
        Unsupported: Its compression, or the scheme of the url, is not known here.
        OSError: It cannot be opened.
    """
    return Region(target, **options)


def _as_source(source: object) -> tuple[bool, Source]:
    """Return a source, and whether it was made here."""
    from quire import sources

    if isinstance(source, sources.Source):
        return False, source
    if isinstance(source, str | os.PathLike):
        return True, sources.open_source(source)
    if isinstance(source, Snapshot):
        return True, sources.SnapshotSource(source)
    return True, sources.BytesSource(cast("Buffer", source))


def _check_options(discard: Discard, faults: Faults, budget_bytes: int | None) -> None:
    if discard not in get_args(Discard):
        raise ValueError(f"discard is one of {', '.join(get_args(Discard))}, not {discard!r}")
    if faults not in get_args(Faults):
        raise ValueError(f"faults is one of {', '.join(get_args(Faults))}, not {faults!r}")
    if budget_bytes is not None and (operator.index(budget_bytes) < 1 or discard != "pressure"):
        raise ValueError('a budget is a positive number of bytes, and goes with discard="pressure"')


def _choices(faults: Faults) -> tuple[Faults, ...]:
    """Return the backends to try, in order."""
    if faults != "auto":
        return (faults,)
    forced = os.environ.get(FAULTS_OVERRIDE)
    if forced is None:
        return _AUTOMATIC
    if forced not in get_args(Faults) or forced == "auto":
        raise ValueError(f"{FAULTS_OVERRIDE} is {forced!r}, which names no backend")
    return (forced,)  # type: ignore[return-value]


def _read_record(path: str | os.PathLike[str], size: int) -> list[tuple[int, int]]:
    """Read what ``Region.record`` wrote, and check all of it."""
    import json
    from pathlib import Path

    try:
        record = json.loads(Path(path).read_bytes())
        known = record["quire"] == "working set" and record["version"] == 1
        ranges = [(operator.index(start), operator.index(stop)) for start, stop in record["ranges"]]
        recorded_size = record["size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Malformed(f"{os.fspath(path)} is no record of a working set: {error}") from error
    if not known:
        raise Malformed(f"{os.fspath(path)} is no record of a working set of version 1")
    if recorded_size != size:
        raise Malformed(f"{os.fspath(path)} was recorded of {recorded_size} bytes, this region has {size}")
    for start, stop in ranges:
        if not 0 <= start < stop <= size:
            raise Malformed(f"{os.fspath(path)}: bytes {start} to {stop} are outside {size}")
    return ranges


def _unpickle(
    source: Source,
    descriptor: Any,
    window_bytes: int,
    discard: Discard,
    faults: Faults,
    executable: bool,
    budget_bytes: int | None,
) -> Region:
    """Make the region that ``Region.__reduce_ex__`` described; it owns its source.

    Raises:
        Malformed: The file of a shared region is not one.
    """
    fd = None if descriptor is None else descriptor.detach()
    try:
        region = Region._make(
            source, fd, fd is not None, window_bytes, discard, faults, executable, budget_bytes
        )
    except BaseException:
        source.close()
        raise
    finally:
        if fd is not None:
            os.close(fd)
    region._owned = source
    return region
