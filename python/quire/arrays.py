"""Numpy views and plain byte access for everything that exports a buffer."""

# numpy is imported when an array is first asked for.
# ruff: noqa: PLC0415

from __future__ import annotations

import operator
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias, cast, overload

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer

    # Before Python 3.12 a type checker cannot see that an array exports a buffer.
    Exporter: TypeAlias = Buffer | npt.NDArray[Any]

__all__ = ["ArrayViews", "checked_size", "raw_view"]


def checked_size(size_bytes: int) -> int:
    """Return a size as an integer.

    Raises:
        ValueError: It is not 1 to 2**63 - 1.
        TypeError: It is not an integer.
    """
    size_bytes = operator.index(size_bytes)
    if not 0 < size_bytes < 1 << 63:
        raise ValueError(f"a size of {size_bytes} bytes is not 1 to 2**63 - 1")
    return size_bytes


def raw_view(data: Exporter) -> memoryview:
    """Show the memory of any C-contiguous buffer as bytes, without a copy.

    ``memoryview.cast`` refuses item formats that it does not know, such as numpy's structured ones; this does
    not.

    Returns:
        A one-dimensional view of format ``B``. Releasing it is the caller's duty.

    Raises:
        TypeError: The object exports no buffer.
        ValueError: Its memory is not C-contiguous.
    """
    from pickle import PickleBuffer

    buffer = cast("Buffer", data)
    with memoryview(buffer) as view:
        if not view.c_contiguous:
            raise ValueError(
                "the buffer is not C-contiguous: pass a copy that is, numpy.ascontiguousarray makes one"
            )
    return PickleBuffer(buffer).raw()


class ArrayViews:
    """A mixin that adds views to a class whose instances export a one-dimensional buffer of bytes.

    Every view holds an export, so the memory cannot go away under it: closing the object raises BufferError
    until the last view is gone. An array kept in an attribute of the object that it shows is a cycle that the
    garbage collector cannot see, because numpy takes no part in it: keep arrays elsewhere, or delete them.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def size(self) -> int:
            """Length in bytes."""

        def __buffer__(self, flags: int, /) -> memoryview:
            """Export the memory; the native class does."""

    def _exported(self) -> memoryview:
        """The memory; for a class that is not native, which cannot export a buffer before Python 3.12."""
        return memoryview(self)

    def array(
        self, dtype: npt.DTypeLike, shape: int | Sequence[int] | None = None, offset: int = 0
    ) -> npt.NDArray[Any]:
        """Return a numpy view of the memory, with no copy.

        Args:
            dtype: Type of the items; anything that ``numpy.dtype`` takes, structured types included, but no
                types that hold Python objects.
            shape: Number of items, or one number for each dimension; one of them may be -1 for as many as
                fit. None is as many whole items as fit, in one dimension.
            offset: Where the first item starts, in bytes from the start of the memory; 0 to the size,
                inclusive. It need not be aligned.

        Returns:
            A C-ordered array, read-only if the memory is. It keeps the memory from being closed.

        Raises:
            ValueError: The view would not lie within the memory, or the dtype has no size or holds objects.
            TypeError: The offset or the shape is not made of integers.
        """
        import numpy as np

        item = np.dtype(dtype)
        if item.hasobject:
            raise ValueError(f"dtype {item} holds Python objects, which cannot live in shared memory")
        if item.itemsize == 0:
            raise ValueError(f"dtype {item} has items of no size")
        offset = operator.index(offset)
        if not 0 <= offset <= self.size:
            raise ValueError(f"offset {offset} is outside 0 to {self.size}")
        extents = _fit(shape, (self.size - offset) // item.itemsize)
        count = prod(extents)
        if count * item.itemsize > self.size - offset:
            raise ValueError(
                f"shape {extents} of {item} needs {count * item.itemsize} bytes from offset {offset}; "
                f"the memory ends at {self.size}"
            )
        # frombuffer keeps the memoryview, and so the export, alive for as long as any view of a view lives;
        # ndarray(buffer=...) would not.
        flat: npt.NDArray[Any] = np.frombuffer(self._exported(), item, count, offset)
        return _reshaped(flat, extents, item)

    def __len__(self) -> int:
        """Length in bytes."""
        return self.size

    def __bool__(self) -> bool:
        """Always true: memory exists, whatever its length."""
        return True

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: int | slice) -> int | bytes:
        """Return one byte as an integer, or a copy of a slice as bytes.

        Raises:
            IndexError: The byte is outside the memory.
        """
        with self._exported() as view:
            if isinstance(key, slice):
                with view[key] as part:
                    return part.tobytes()
            value: int = view[key]
            return value

    def __setitem__(self, key: int | slice, value: int | Exporter) -> None:
        """Store one byte, or a buffer of exactly the slice's length in bytes.

        Raises:
            TypeError: The memory is read-only.
            IndexError: The byte is outside the memory.
            ValueError: The lengths differ, or the byte is not 0 to 255.
        """
        with self._exported() as view:
            if isinstance(key, slice):
                if view.readonly:
                    raise TypeError(f"{type(self).__name__} is read-only")
                with raw_view(value) as data:  # type: ignore[arg-type]
                    view[key] = data
            else:
                if view.readonly:
                    raise TypeError(f"{type(self).__name__} is read-only")
                view[key] = operator.index(value)  # type: ignore[arg-type]


def _fit(shape: int | Sequence[int] | None, items: int) -> tuple[int, ...]:
    """Resolve None and -1 in a shape, given how many whole items there is room for."""
    if shape is None:
        return (items,)
    extents: tuple[int, ...]
    if hasattr(shape, "__index__"):
        extents = (operator.index(shape),)
    else:
        extents = tuple(operator.index(extent) for extent in shape)
    unknown = extents.count(-1)
    if unknown > 1 or any(extent < -1 for extent in extents):
        raise ValueError(f"shape {extents} may hold one -1 and no other negative number")
    if unknown:
        known = -prod(extents)
        if known == 0:
            raise ValueError(f"shape {extents} leaves -1 open: another extent is 0")
        extents = tuple(items // known if extent == -1 else extent for extent in extents)
    return extents


def _reshaped(flat: npt.NDArray[Any], extents: tuple[int, ...], item: np.dtype[Any]) -> npt.NDArray[Any]:
    """Give a flat view its shape; a dtype that is an array itself adds its own extents."""
    inner = () if item.subdtype is None else item.subdtype[1]
    return flat.reshape(extents + inner)
