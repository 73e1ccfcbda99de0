"""``run``: what it takes, and what it hands to a new sandbox."""

from __future__ import annotations

import math
import os
import pickle
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.errors import Unsupported
from quire.sandbox import doors, syscalls
from quire.sandbox.starting import Started
from quire.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from quire.sandbox.results import Result

    Given = Snapshot | tuple[Snapshot, npt.DTypeLike, Sequence[int] | int]

__all__ = ["run"]

DEFAULT_LIMIT_BYTES = 256 << 20
DEFAULT_TIMEOUT = 60.0
_MIN_LIMIT_BYTES = 1 << 20


def run(
    code: Callable[..., Any] | str | os.PathLike[str],
    inputs: Mapping[str, Given] | None = None,
    *,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    timeout: float = DEFAULT_TIMEOUT,
    cpu_seconds: int | None = None,
    threads: int = 4,
    imports: Sequence[str] = (),
    exact: bool = False,
) -> Result:
    """Run code that is not trusted on snapshots, in a process that can reach nothing else.

    The process has no files, no network, no other processes, no capabilities, and system calls for its own
    memory and threads only. It gets each input as a read-only array, without a copy. Modules that the code
    needs are imported before the doors are shut, with the rights of this process: name them in ``imports``,
    and name only modules that are trusted. A function is loaded before too (by cloudpickle, so what it refers
    to in modules is imported); a script is only compiled behind shut doors.

    Blocks until the code has ended. Nothing of it is left then, also if this raises, or if the calling thread
    or process dies meanwhile.

    Args:
        code: A function, called with the inputs as keyword arguments, which returns None, a number, an array,
            a Segment or a Snapshot; or the source text of a script; or the path of one. A script finds the
            inputs under their names and leaves what it returns under the name ``result``.
        inputs: A snapshot, seen as bytes, or a tuple of snapshot, dtype and shape, for each name.
        limit_bytes: Memory that the code may take beyond what the interpreter and the imports take, and also
            the most that it may return; at least 1 MiB. What it may touch of the inputs is not counted.
        timeout: In seconds, from shut doors on.
        cpu_seconds: For all its threads together, to the second; None is no limit but the timeout.
        threads: The most that it may have, 1 to 64.
        imports: Names of modules to import before.
        exact: Refuse to run where no cgroup can limit the memory. Without one the limit holds for private
            memory and for each memfd by itself, of which there may be dozens.

    Returns:
        What was returned, with what it cost.

    Raises:
        SandboxError: The code did not return, or what it returned is refused; ``reason`` says why.
        Unsupported: This machine or its settings lack something; the message says which.
        NotImmutable: An input is a snapshot of a file.
        TypeError, ValueError: An argument is wrong.
        OSError: The kernel refused to start the process.
    """
    shown = _inputs(inputs or {})
    _check(limit_bytes, timeout, cpu_seconds, threads, imports)
    source, function = _loaded(code)
    limits = doors.Limits(limit_bytes, threads, cpu_seconds)
    payload = pickle.dumps(
        {
            "source": source,
            "function": function,
            "inputs": [(name, dtype, shape) for name, _, dtype, shape in shown],
            "imports": list(imports),
            "limits": limits,
            "exact": exact,
            "group": f"quire-sandbox-{os.getpid()}-{secrets.token_hex(4)}",
            "filter": syscalls.program(),
        }
    )
    with Started(payload) as started:
        return started.result([snapshot for _, snapshot, _, _ in shown], limits, timeout)


def _inputs(inputs: Mapping[str, Given]) -> list[tuple[str, Snapshot, str, tuple[int, ...]]]:
    shown = []
    for name, given in inputs.items():
        if not name.isidentifier():
            raise ValueError(f"the input {name!r} is no name that Python code could use")
        snapshot, dtype, shape = given if isinstance(given, tuple) else (given, "u1", None)
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"the input {name} is a {type(snapshot).__name__}, it must be a Snapshot")
        snapshot.verify()
        kind = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else (snapshot.size,) if shape is None else tuple(shape)
        if kind.hasobject or min(shape, default=0) < 0 or kind.itemsize * math.prod(shape) > snapshot.size:
            raise ValueError(f"the input {name}: {shape} of {kind} is not in {snapshot.size} bytes")
        shown.append((name, snapshot, kind.str, shape))
    return shown


def _check(
    limit_bytes: int, timeout: float, cpu_seconds: int | None, threads: int, imports: Sequence[str]
) -> None:
    if not _MIN_LIMIT_BYTES <= limit_bytes < 1 << 47:
        raise ValueError(f"limit_bytes is {limit_bytes}, it must be 1 MiB to 128 TiB")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout is {timeout}, it must be a positive number of seconds")
    if cpu_seconds is not None and cpu_seconds < 1:
        raise ValueError(f"cpu_seconds is {cpu_seconds}, it must be at least 1")
    if not 1 <= threads <= 64:
        raise ValueError(f"threads is {threads}, it must be 1 to 64")
    if isinstance(imports, str):
        raise TypeError(f"imports must be names of modules, not one string: ({imports!r},)")


def _loaded(code: Callable[..., Any] | str | os.PathLike[str]) -> tuple[str | None, bytes | None]:
    """The source text of a script, or a function for another process."""
    if isinstance(code, str):
        return code, None
    if isinstance(code, os.PathLike):
        with open(code, encoding="utf-8") as file:
            return file.read(), None
    if not callable(code):
        raise TypeError(f"a function, source text or a path is needed, not {type(code).__name__}")
    try:
        import cloudpickle  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise Unsupported(
            "functions need cloudpickle, of the extra quire[sandbox]; or pass a script"
        ) from error
    pickled: bytes = cloudpickle.dumps(code)
    return None, pickled
