"""What the process that is shut in does: before its doors are shut, prepare; afterwards, call and answer."""

from __future__ import annotations

import importlib
import pickle
import sys
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np

from quire import wire
from quire.sandbox import answers
from quire.segment import Segment
from quire.snapshot import Snapshot

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

__all__ = ["prepare", "work_and_answer"]

RESULT = "result"
"""The name under which a script leaves what it returns."""


def prepare(sock: socket.socket, given: dict[str, Any]) -> Callable[[], Any]:
    """Receive and map the inputs, import, and load the function, while there still are files.

    Returns:
        What runs the code, to be called behind shut doors.
    """
    arrays = {}
    for name, dtype, shape in given["inputs"]:
        with wire.recv(sock, timeout=None) as snapshot:
            if not isinstance(snapshot, Snapshot):
                raise TypeError(f"the input {name} is no snapshot")
            mapping = snapshot.map()
            arrays[name] = mapping.array(dtype, shape)
    for name in given["imports"]:
        importlib.import_module(name)
    if given["source"] is not None:
        source = given["source"]
        return lambda: _script(source, arrays)
    function = pickle.loads(given["function"])
    return lambda: function(**arrays)


def _script(source: str, arrays: dict[str, Any]) -> Any:
    names = {"__name__": "__main__", **arrays}
    exec(compile(source, "<sandboxed script>", "exec"), names)  # noqa: S102 - what this process is for
    return names.get(RESULT)


def work_and_answer(sock: socket.socket, work: Callable[[], Any]) -> None:
    """Run the code and send what it returned, or what it raised."""
    try:
        returned = work()
        snapshot, answer = _answer(returned)
    except BaseException as error:  # noqa: BLE001 - SystemExit too is an answer
        snapshot, answer = None, _raised(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _send_all(sock, answers.encode(answer))
    if snapshot is not None:
        wire.send(sock, snapshot, timeout=None)


def _answer(returned: Any) -> tuple[Snapshot | None, answers.Answer]:
    if returned is None:
        return None, answers.ReturnedNothing()
    if isinstance(returned, Segment):
        returned = returned.snapshot()
    if isinstance(returned, Snapshot):
        return returned, answers.Returned("|u1", [returned.size])
    array = np.asarray(returned, order="C")
    answer = answers.Returned(array.dtype.str, list(array.shape))
    answers.item_bytes(answer)  # refused here, where the message reaches whoever wrote the code
    segment = Segment(max(1, array.nbytes))
    if array.nbytes:
        segment[: array.nbytes] = array.reshape(-1).view(np.uint8)
    return segment.snapshot(), answer


def _raised(error: BaseException) -> answers.Raised:
    try:
        message = str(error)
    except Exception as second:  # noqa: BLE001 - the code's own __str__ may do anything
        message = f"(its message raised {type(second).__name__})"
    try:
        trace = "".join(traceback.format_exception(error))
    except Exception as second:  # noqa: BLE001 - as above
        trace = f"(no traceback: {type(second).__name__})"
    cut = answers.MAX_TEXT
    return answers.Raised(type(error).__qualname__[:cut], _plain(message)[:cut], _plain(trace)[-cut:])


def _plain(text: str) -> str:
    """Text that can be encoded."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _send_all(sock: socket.socket, data: bytes) -> None:
    # sendmsg, because the filter refuses sendto, which is what send and sendall are.
    rest = memoryview(data)
    while rest:
        rest = rest[sock.sendmsg([rest]) :]
