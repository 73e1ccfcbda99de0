"""Where commands draw: on a console, and to files."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from quire.errors import Unsupported
from quire.output import whole_file

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "write"]

_PIPE_WIDTH = 140


def console() -> Console:
    """Return a console of rich on stdout.

    Raises:
        Unsupported: rich is not installed.
    """
    try:
        from rich.console import Console  # noqa: PLC0415 - an extra: only drawing in a terminal needs it
    except ImportError as error:
        raise Unsupported(
            f"drawing in a terminal needs rich: pip install 'quire[tools]' ({error})"
        ) from error
    # What is no terminal has no width; lines for files and pipes have room for all columns.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def write(path: str, document: str, *, force: bool) -> None:
    """Write a document as UTF-8, whole or not at all.

    Raises:
        FileExistsError: It exists, and there is no ``force``.
        OSError: It cannot be written.
    """
    with whole_file(path, force=force) as file:
        file.write(document.encode("utf-8"))
