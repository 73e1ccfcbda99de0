"""The helper as a program of its own: how it is started, and what it does first."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from quire.helper import worker

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["command", "in_helper", "main", "payload"]

# Where the one who starts us puts its descriptors.
SOCKET, MEMORY, LIFELINE, PAYLOAD = 3, 4, 5, 6

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from quire.helper.program import main; main()"

_importing_main = False


def in_helper() -> bool:
    """Whether this process is a helper that is importing its asker's main module."""
    return _importing_main


def command() -> list[bytes]:
    """The command that starts a helper with the interpreter of this process.

    Raises:
        RuntimeError: There is no interpreter, as in a program that embeds Python.
    """
    if not sys.executable:
        raise RuntimeError("sys.executable is empty, so no helper process can be started")
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return [os.fsencode(word) for word in (sys.executable, "-I", "-c", _BOOT, home)]


def payload(pickled: bytes, parallel: int, *, main: bool) -> bytes:
    """All that a helper has to know.

    Args:
        pickled: The function.
        parallel: How many threads call it.
        main: Whether it needs this program's main module.
    """
    from multiprocessing import spawn  # noqa: PLC0415 - takes a while, and most programs have no helper

    preparation: dict[str, Any] = spawn.get_preparation_data("quire helper")
    # It may not be pickled, and nothing here asks for it.
    preparation.pop("authkey", None)
    if not main:
        preparation.pop("init_main_from_name", None)
        preparation.pop("init_main_from_path", None)
    return pickle.dumps({"preparation": preparation, "function": pickled, "parallel": parallel})


def main() -> NoReturn:
    """Run a helper: read the payload, make ready what the function needs, answer requests."""
    worker.die_with(LIFELINE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for fd in (SOCKET, MEMORY, LIFELINE, PAYLOAD):
        os.set_inheritable(fd, False)
    connection = worker.Connection(socket.socket(fileno=SOCKET), MEMORY)
    try:
        with open(PAYLOAD, "rb") as file:
            # The descriptor is of our own, its position is not.
            given = pickle.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
        function = _prepared(given["preparation"], given["function"])
    except BaseException as error:  # noqa: BLE001 - the importing of user's modules may raise anything
        connection.failed(0, error)
        os._exit(1)
    connection.ready()
    worker.serve(connection, function, given["parallel"])


def _prepared(preparation: dict[str, Any], pickled: bytes) -> Callable[[int, int], Any]:
    global _importing_main  # noqa: PLW0603 - a state of the process
    from multiprocessing import spawn  # noqa: PLC0415 - as above

    _importing_main = True
    try:
        spawn.prepare(preparation)
    finally:
        _importing_main = False
    function: Callable[[int, int], Any] = pickle.loads(pickled)
    return function
