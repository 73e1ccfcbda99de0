"""Messages that name the file."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from quire.errors import Malformed, PageError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["named"]


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the file's name before what is said of its fields, once."""
    try:
        yield
    except (Malformed, PageError) as error:
        text = str(error)
        if text.startswith(f"{name}: "):
            raise
        raise type(error)(f"{name}: {text}") from None
