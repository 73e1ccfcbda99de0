"""Python functions as sources of regions, run in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import pickle
from typing import TYPE_CHECKING, Any

from quire import _native
from quire.sources import Source

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

__all__ = ["FunctionSource", "program_source"]

DEFAULT_TIMEOUT = 60.0


class FunctionSource(Source):
    """Bytes that a Python function produces when they are first needed.

    The function runs in a helper process, never in this one: whoever touches a page may hold the GIL. What it
    changes there is not seen here. The helper is started when the source is first read, again whenever it
    dies, and ends with the last of the source and the regions that use it. How the function gets there, the
    first that is possible:

    - importable (or of a script's ``__main__``): by name, into a fresh interpreter. A script is imported
      there as ``multiprocessing`` does it under "spawn", so its top level needs
      ``if __name__ == "__main__":``;
    - with cloudpickle installed (``quire[functions]``): by value;
    - else this process is forked now, as it is, and the fork runs the function. Open files come along,
      sockets and pipes do not, nor do threads, and a lock that another thread holds now stays locked there.
    """

    def __init__(
        self,
        fill: Callable[[int, int], Buffer],
        size: int,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        parallel: int = 1,
    ) -> None:
        """Note the function; it is not called yet.

        Args:
            fill: ``fill(offset, length)`` returns exactly ``length`` bytes, at most 4 MiB, in any contiguous
                bytes-like object. The same bytes whenever it is called: pages are filled more than once.
            size: Length in bytes of all it can produce.
            timeout: In seconds, until a reader gets a PageError; a function that is still running then is
                killed.
            parallel: How many threads call it at once, 1 to 64.

        Raises:
            TypeError: ``fill`` is not callable.
            ValueError: An argument is out of its range.
            RuntimeError: A helper is importing this program's main module, which made a source at its top
                level.
        """
        if not callable(fill):
            raise TypeError(f"fill must be callable, not {type(fill).__name__}")
        _refuse_in_helper()
        name = getattr(fill, "__qualname__", type(fill).__qualname__)
        if size < 0:
            raise ValueError(f"size is {size}, it must not be negative")
        if not 1 <= parallel <= 64:
            raise ValueError(f"parallel is {parallel}, it must be 1 to 64")
        pickled, main = _pickled(fill)
        if pickled is not None:
            native = program_source(pickled, size, timeout=timeout, parallel=parallel, main=main)
        else:
            from quire.helper import zygote  # noqa: PLC0415 - rarely needed

            with zygote.start(fill, parallel) as control:
                native = _native.zygote_source(
                    control.fileno(), size=size, parallel=parallel, timeout=timeout, fetches=False
                )
        super().__init__(native, name)
        self._made_of = fill, size, timeout, parallel

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as what makes it anew: the function must pickle."""
        return _anew, self._made_of


def _anew(fill: Callable[[int, int], Buffer], size: int, timeout: float, parallel: int) -> FunctionSource:
    return FunctionSource(fill, size, timeout=timeout, parallel=parallel)


def program_source(
    pickled: bytes, size: int, *, timeout: float, parallel: int, main: bool = False, fetches: bool = False
) -> _native.Source:
    """Make a source of a pickled function.

    Args:
        pickled: The function.
        size: Of all it can produce, in bytes.
        timeout: In seconds.
        parallel: How many threads call it at once.
        main: Whether it needs this program's main module.
        fetches: Whether failures are said to be of fetching, not of a function.
    """
    from quire.helper import program  # noqa: PLC0415 - rarely needed

    environment = [key + b"=" + value for key, value in os.environb.items()]
    return _native.program_source(
        program.command(),
        environment,
        program.payload(pickled, parallel, main=main),
        size=size,
        parallel=parallel,
        timeout=timeout,
        fetches=fetches,
    )


def _pickled(fill: Callable[[int, int], Any]) -> tuple[bytes | None, bool]:
    """The function for another process, and whether it needs the main module; None if that cannot be."""
    try:
        pickled = pickle.dumps(fill)
    except Exception:  # noqa: BLE001 - whatever __reduce__ raises, it means that pickle cannot
        pickled = None
    if pickled is not None:
        main = b"__main__" in pickled
        if not main or _main_can_be_imported():
            return pickled, main
    if importlib.util.find_spec("cloudpickle") is not None:
        import cloudpickle  # noqa: PLC0415 - an extra

        try:
            return cloudpickle.dumps(fill), False
        except Exception:  # noqa: BLE001 - as above; what is left is to fork
            return None, False
    return None, False


def _main_can_be_imported() -> bool:
    import __main__  # noqa: PLC0415 - it may change

    if getattr(__main__, "__spec__", None) is not None:
        return True
    path = getattr(__main__, "__file__", None)
    return path is not None and os.path.exists(path)


def _refuse_in_helper() -> None:
    from quire.helper import program  # noqa: PLC0415 - rarely needed

    if program.in_helper():
        raise RuntimeError(
            "the main module makes a source while a helper process imports it; "
            'put what the program does under if __name__ == "__main__":'
        )
