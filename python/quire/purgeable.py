"""Memory that the kernel may take when it is short, and a cache made of it.

Needs no privileges and no swap. The kernel takes pages that were unlocked instead of ending a process, in the
limit of a cgroup too; what was taken is known for certain afterwards.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Hashable, ItemsView, Iterator, MutableMapping, ValuesView
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from quire import _native
from quire.arrays import ArrayViews, checked_size, raw_view
from quire.closing import Closing
from quire.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn, ParamSpec, Self

    from quire.arrays import Exporter

    P = ParamSpec("P")

__all__ = ["Purgeable", "PurgeableCache", "PurgeableStats"]

T = TypeVar("T")


class Purgeable(ArrayViews, Closing, _native.Purgeable):
    """Zero-filled private memory that can be unlocked: then the kernel may take its pages.

    It is made locked, and behaves like any other memory. While it is unlocked it exports no buffer; views
    of it, arrays among them, have to be gone before. ``lock`` takes it back and says whether all of it
    survived.

    Pages that are all zero cannot be lost: they read the same whether they were taken or not. A forked child
    has its own copy, in the state in which its parent's was; each of the two keeps and loses its own pages.
    Every method may be called from any thread.
    """

    def __new__(cls, size_bytes: int) -> Self:
        """Reserve zero-filled memory; nothing is allocated until it is touched.

        Args:
            size_bytes: Length in bytes, at least 1; it need not be a multiple of the page.

        Raises:
            ValueError: The size is not positive or too large.
            MemoryError: There is too little address space.
            OSError: The kernel refused.
        """
        return super().__new__(cls, checked_size(size_bytes))

    def unlock(self) -> None:
        """Let the kernel take pages whenever it needs memory; does nothing if it may already.

        Reads each page that was ever touched as far as its first bytes that are not zero. The GIL is
        released.

        Raises:
            BufferError: Views of the memory are exported.
            OSError: The kernel refused, as it does for a process that called ``mlockall``; it stays locked.
            ValueError: It is closed.
        """
        super().unlock()

    def lock(self) -> bool:
        """Take the memory back, so that the kernel takes no more pages of it.

        Touches each page that held data. Those that were taken read zero, ``lost`` lists them, and they take
        no memory until they are written. The GIL is released.

        Returns:
            True if every byte is as it was when the memory was unlocked, or it was locked all the time.

        Raises:
            ValueError: It is closed.
        """
        return super().lock()

    @property
    def lost(self) -> Ranges:
        """What the last ``lock`` that took the memory back found taken.

        Half-open ranges in bytes, page aligned, so the last may end after the size. Pages of zeros are never
        among them.
        """
        return Ranges._from_native(self.lost_native())

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Return a context manager: ``with memory.locked() as survived:``.

        It locks, and unlocks again at the end if the memory was unlocked before. What was lost has to be made
        again inside the block.

        Raises:
            BufferError: At the end, views are still exported, and no other exception is in flight; one that
                is goes on instead, with a note. The memory stays locked.
        """
        unlock_again = not self.is_locked
        survived = self.lock()
        try:
            yield survived
        except BaseException as error:
            if unlock_again:
                try:
                    self.unlock()
                except BufferError as refusal:
                    error.add_note(f"the Purgeable stayed locked: {refusal}")
            raise
        if unlock_again:
            self.unlock()

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError("a Purgeable is memory of this process: pickle bytes(purgeable)")

    def __repr__(self) -> str:
        """Show size and state."""
        if self.closed:
            return "<quire.Purgeable closed>"
        return f"<quire.Purgeable of {self.size} bytes, {'locked' if self.is_locked else 'unlocked'}>"


class PurgeableStats(NamedTuple):
    """What happened in a PurgeableCache so far, and what it holds."""

    hits: int
    """Values that were read."""
    misses: int
    """Keys that were asked for and had no value, those whose value was purged not among them."""
    purged: int
    """Values that were found taken by the kernel."""
    evicted: int
    """Values dropped by the cache itself, for ``max_bytes`` or because memory was short for its index."""
    bytes_held: int
    """Length of all values, in bytes; those that were purged are among them until that is noticed."""
    page_bytes: int
    """Pages that these values lie in, in bytes."""


_FEWEST_BETWEEN_SWEEPS = 1024
# How many values are stored before memory is looked at; 256 entries of the index take about 60 KiB.
_BETWEEN_LOOKS = 256
# With less than these left, the index, which the kernel cannot take, must not grow; with half, it has to
# shrink.
_SPARE_BYTES = 8 << 20
# When a dict grows it is there twice for a moment, the new one up to six times as wide.
_SPARE_BYTES_PER_ENTRY = 256


_REQUIRED = object()


class PurgeableCache(Closing, MutableMapping[Hashable, bytes]):
    """A mapping of keys to bytes whose values the kernel may take when it needs memory.

    For what can be made again: images, responses, results. It grows into free memory. When memory is short,
    in the machine or in the cgroup, the kernel takes pages of it, and the values that lay there go missing:
    asked for, they raise KeyError. A value that is returned is complete and right.

    So that storing never ends in an out-of-memory kill, at most 512 KiB of values are held from the kernel at
    any time, and the index is kept within what is left: see ``docs/purgeable.md``.

    ``in``, ``len`` and iteration are hints: they name keys whose values may be gone. A value is copied in and
    copied out. Any thread may use it. A forked child has the values that its parent had then.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """Make an empty cache.

        Args:
            max_bytes: Most bytes of pages to use, at least one page; the least recently used values are
                dropped beyond it. None for as much as the kernel leaves.

        Raises:
            ValueError: ``max_bytes`` is less than a page.
        """
        if max_bytes is not None and checked_size(max_bytes) < _native.PAGE_SIZE:
            raise ValueError(f"max_bytes is {max_bytes}, less than a page of {_native.PAGE_SIZE} bytes")
        self._max_bytes = max_bytes
        # Every operation on these is one step for other threads, so no lock is needed, and none is there to
        # be found taken in a forked child. An entry frees its value when the last reference goes.
        self._store = _native.PurgeableStore()
        self._index: OrderedDict[Hashable, _native.PurgeableEntry] = OrderedDict()
        self._closed = False
        self._most_entries: int | None = None
        self._next_sweep = _FEWEST_BETWEEN_SWEEPS
        self._next_look = _BETWEEN_LOOKS

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the cache is closed")

    def __getitem__(self, key: Hashable) -> bytes:
        """Return a copy of a value.

        Raises:
            KeyError: The key has none, or the kernel took it.
            ValueError: The cache is closed.
        """
        self._check_open()
        entry = self._index.get(key)
        if entry is None:
            self._store.count_miss()
            raise KeyError(key)
        value = entry.read()
        if value is None:
            self._forget(key, entry)
            raise KeyError(key)
        # Another thread may have dropped it meanwhile.
        with suppress(KeyError):
            self._index.move_to_end(key)
        return value

    def __setitem__(self, key: Hashable, value: Exporter) -> None:
        """Store a copy of a value.

        Args:
            key: Anything that can be hashed.
            value: bytes, or any C-contiguous buffer. One that needs more than ``max_bytes`` is not kept.

        Raises:
            TypeError: The key cannot be hashed, or the value is no buffer.
            MemoryError, OSError: The kernel refused address space, or to let the memory be purged, as it does
                for a process that called ``mlockall``. An old value of the key is still there.
            ValueError: The cache is closed, or the buffer is not C-contiguous.
        """
        self._check_open()
        hash(key)
        if type(value) is bytes:
            self._put(key, value)
        else:
            with raw_view(value) as view:
                self._put(key, view)

    def _put(self, key: Hashable, data: bytes | memoryview) -> None:
        if self._max_bytes is not None and len(data) > self._max_bytes:
            self._index.pop(key, None)
            self._store.count_evicted(1)
            return
        entry = self._store.put(data)
        self._index[key] = entry
        with suppress(KeyError):
            self._index.move_to_end(key)
        del entry
        if self._max_bytes is not None:
            while self._store.page_bytes > self._max_bytes and self._evict():
                pass
        self._next_look -= 1
        if self._next_look <= 0:
            self._next_look = _BETWEEN_LOOKS
            self._look_at_memory()
        if self._most_entries is not None:
            while len(self._index) > self._most_entries and self._evict():
                pass
        if len(self._index) >= self._next_sweep:
            self._sweep()

    def _evict(self) -> bool:
        """Drop the least recently used value; False if there is none."""
        try:
            self._index.popitem(last=False)
        except KeyError:
            return False
        self._store.count_evicted(1)
        return True

    def _forget(self, key: Hashable, entry: _native.PurgeableEntry) -> None:
        """Drop a key, unless it has got another value. A value that comes in between may go missing too."""
        if self._index.get(key) is entry:
            self._index.pop(key, None)

    def _sweep(self) -> None:
        """Drop the keys of values that are gone, so that the index never has many more keys than values."""
        # Before the work, so that other threads do not begin it too.
        self._next_sweep = 2 * len(self._index)
        self._store.sweep()
        gone = [(key, entry) for key, entry in list(self._index.items()) if entry.lost]
        for key, entry in gone:
            self._forget(key, entry)
        self._store.count_purged(len(gone))
        self._next_sweep = max(_FEWEST_BETWEEN_SWEEPS, 2 * len(self._index))

    def _look_at_memory(self) -> None:
        """Bound the index by what memory is left: the kernel can take values, but not keys."""
        room = _native.available_bytes()
        spare = _SPARE_BYTES + _SPARE_BYTES_PER_ENTRY * len(self._index)
        if room is None or room > 2 * spare:
            self._most_entries = None
        elif room < spare and self._most_entries is None:
            self._sweep()
            self._most_entries = len(self._index)
        elif room < spare // 2:
            self._most_entries = max(_BETWEEN_LOOKS, len(self._index) * 3 // 4)

    def __delitem__(self, key: Hashable) -> None:
        """Drop a value.

        Raises:
            KeyError: The key has none. One whose value is gone unnoticed is dropped without an error.
            ValueError: The cache is closed.
        """
        self._check_open()
        del self._index[key]

    def __contains__(self, key: object) -> bool:
        """Whether the key may have a value; only asking for it tells."""
        self._check_open()
        return key in self._index

    def __len__(self) -> int:
        """How many keys may have a value."""
        return len(self._index)

    def __iter__(self) -> Iterator[Hashable]:
        """Go through the keys that were there at the start, least recently used first; some may be gone."""
        self._check_open()
        return iter(list(self._index))

    def _there(self) -> Iterator[tuple[Hashable, bytes]]:
        """Go through the keys and values that are there; this is no use of them."""
        self._check_open()
        for key, entry in list(self._index.items()):
            value = entry.read()
            if value is None:
                self._forget(key, entry)
            else:
                yield key, value

    def items(self) -> ItemsView[Hashable, bytes]:
        """Return a view that, gone through, gives the keys whose values are there, with copies of these."""
        return _Items(self)

    def values(self) -> ValuesView[bytes]:
        """Return a view that, gone through, gives copies of the values that are there."""
        return _Values(self)

    @overload
    def pop(self, key: Hashable, /) -> bytes: ...
    @overload
    def pop(self, key: Hashable, /, default: bytes | T) -> bytes | T: ...
    def pop(self, key: Hashable, /, default: Any = _REQUIRED) -> Any:
        """Drop a value and return a copy of it, or the default if it is gone or there was none.

        Raises:
            KeyError: It is gone or there was none, and no default is given.
            ValueError: The cache is closed.
        """
        self._check_open()
        entry = self._index.pop(key, None)
        value = None
        if entry is None:
            self._store.count_miss()
        else:
            value = entry.read()
        if value is not None:
            return value
        if default is _REQUIRED:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[Hashable, bytes]:
        """Drop the least recently used value that is there, and return its key and a copy of it.

        Raises:
            KeyError: There is none.
            ValueError: The cache is closed.
        """
        self._check_open()
        while self._index:
            key, entry = self._index.popitem(last=False)
            value = entry.read()
            if value is not None:
                return key, value
        raise KeyError("the cache is empty")

    def clear(self) -> None:
        """Drop all values and give their memory back."""
        self._check_open()
        self._index.clear()

    def close(self) -> None:
        """Drop all values; every later use but ``stats``, ``len`` and ``close`` raises ValueError."""
        self._closed = True
        self._index.clear()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def max_bytes(self) -> int | None:
        """The limit given when it was made."""
        return self._max_bytes

    @property
    def stats(self) -> PurgeableStats:
        """Counts since it was made and bytes held now; costs nothing."""
        return PurgeableStats(*self._store.counters, self._store.value_bytes, self._store.page_bytes)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the cache's pages that are in memory; asks the kernel, about a millisecond a gigabyte."""
        return self._store.resident_bytes

    @overload
    def memoize(self, function: Callable[P, bytes], /) -> Callable[P, bytes]: ...
    @overload
    def memoize(
        self, /, *, key: Callable[..., Hashable] | None = None
    ) -> Callable[[Callable[P, bytes]], Callable[P, bytes]]: ...
    @overload
    def memoize(
        self,
        /,
        *,
        key: Callable[..., Hashable] | None = None,
        encode: Callable[[T], Exporter],
        decode: Callable[[bytes], T],
    ) -> Callable[[Callable[P, T]], Callable[P, T]]: ...
    def memoize(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        key: Callable[..., Hashable] | None = None,
        encode: Callable[[Any], Exporter] | None = None,
        decode: Callable[[bytes], Any] | None = None,
    ) -> Callable[..., Any]:
        """Decorate a function so that its results are kept, and made again when they are gone.

        Threads that ask for the same result at once may each make it. What the function raises is not kept.

        Args:
            function: Called with hashable arguments only, unless ``key`` is given.
            key: Called with the function's arguments, returns what identifies the result. By default all
                arguments with their types do: 1, 1.0 and True are different, and so are orders of keywords.
            encode: Turns a result into a buffer. Without it the function has to return bytes.
            decode: Turns bytes back into a result; given exactly if ``encode`` is.

        Returns:
            The function, or without one a decorator. The original is its ``__wrapped__``.

        Raises:
            TypeError: Only one of ``encode`` and ``decode`` is given; from a call, the function returned
                something else than bytes without ``encode``, or the key cannot be hashed.
        """
        if (encode is None) != (decode is None):
            raise TypeError("encode and decode belong together: give both or neither")

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            # Two functions may have the same name, so an object of its own stands for each.
            identity = object()

            @functools.wraps(function)
            def memoized(*args: Any, **kwargs: Any) -> Any:
                what = _arguments(args, kwargs) if key is None else key(*args, **kwargs)
                try:
                    value = self[identity, what]
                except KeyError:
                    pass
                else:
                    return value if decode is None else decode(value)
                result = function(*args, **kwargs)
                if encode is not None:
                    self[identity, what] = encode(result)
                elif isinstance(result, bytes):
                    self[identity, what] = result
                else:
                    raise TypeError(
                        f"{function.__qualname__} returned {type(result).__name__}, not bytes: "
                        "give memoize encode= and decode="
                    )
                return result

            return memoized

        return decorate if function is None else decorate(function)

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError("a PurgeableCache is memory of this process: pickle dict(cache.items())")

    def __repr__(self) -> str:
        """Show what it holds."""
        if self._closed:
            return "<quire.PurgeableCache closed>"
        return f"<quire.PurgeableCache of at most {len(self)} values, {self._store.value_bytes} bytes>"


class _Items(ItemsView[Hashable, bytes]):
    """The pairs of a cache whose values are there."""

    _mapping: PurgeableCache

    def __iter__(self) -> Iterator[tuple[Hashable, bytes]]:
        return self._mapping._there()


class _Values(ValuesView[bytes]):
    """The values of a cache that are there."""

    _mapping: PurgeableCache

    def __contains__(self, value: object) -> bool:
        return any(value == there for there in self)

    def __iter__(self) -> Iterator[bytes]:
        return (value for _, value in self._mapping._there())


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """Make a key of arguments; equal ones of different types are different."""
    named = tuple((name, type(value), value) for name, value in kwargs.items())
    return tuple((type(value), value) for value in args), named
