"""What every object that holds memory or descriptors shares: ``with`` closes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Closing"]


class Closing:
    """A mixin for classes that have ``close()``."""

    __slots__ = ()

    if TYPE_CHECKING:

        def close(self) -> None:
            """Give up what the object holds."""

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the object.

        Raises:
            BufferError: Views of it are still exported, and no other exception is in flight. One that is in
                flight goes on instead, with a note that the object stayed open.
        """
        try:
            self.close()
        except BufferError as refusal:
            if error is None:
                raise
            error.add_note(f"the {type(self).__name__} stayed open: {refusal}")
