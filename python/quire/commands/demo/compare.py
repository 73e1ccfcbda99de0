"""The same versions made with other means, on the same data. Run as a program of its own by the command.

``python -m quire.commands.demo.compare PATH`` receives the last version and which pages changed in the
versions before. Each means in turn stores one byte into each of those pages and takes a version, again and
again.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Any

import numpy as np

from quire import PAGE_SIZE, Channel, Snapshot
from quire.commands.demo.talk import announce, ask, recv_json, send_json

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__ = ["compare"]


class Timings:
    """Collects what one means costs, and tells the command.

    Attributes:
        name: Of the means.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._version_ns: list[int] = []
        self._store_ns: list[int] = []
        announce("step", text=f"comparing: {name}")

    def version(self, call: Callable[[], Any]) -> Any:
        """Time the taking of a version."""
        started = time.perf_counter_ns()
        result = call()
        self._version_ns.append(time.perf_counter_ns() - started)
        return result

    def store(self, memory: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]) -> None:
        """Time the storing of one byte into each page."""
        started = time.perf_counter_ns()
        memory[places] += np.uint8(1)
        self._store_ns.append(time.perf_counter_ns() - started)

    def tell(self) -> None:
        """Report, while the last version is still held: the command looks at the memory now."""
        ask("compared", name=self.name, version_ns=self._version_ns, store_ns=self._store_ns)


def compare(path: str) -> None:
    """Receive the data, run every means, report each.

    Raises:
        OSError, MemoryError: There is too little memory.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    with Channel(sock, timeout=60.0) as channel:
        replay = [np.array(pages, np.int64) * PAGE_SIZE for pages in recv_json(sock)["replay"]]
        snapshot = channel.recv()
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"the writer sent a {type(snapshot).__name__}")
        send_json(sock, {})
    ask("received")
    memory = mmap.mmap(-1, snapshot.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    data = np.frombuffer(memory, np.uint8)
    with_quire(snapshot, data, replay)
    snapshot.close()
    ask("base")
    with_fork(data, replay)
    with_copy(data, replay)
    with_shared_memory(data, replay)


def with_quire(snapshot: Snapshot, copy: npt.NDArray[np.uint8], replay: list[npt.NDArray[np.int64]]) -> None:
    """Take snapshots; on the way, give the other means a copy of the data as ordinary memory."""
    with snapshot.fork() as segment:
        data = segment.array(np.uint8)
        np.copyto(copy, data)
        timings = Timings("quire")
        last = segment.snapshot()
        for places in replay:
            timings.store(data, places)
            new = timings.version(segment.snapshot)
            last.close()
            last = new
        timings.tell()
        last.close()
        del data


def with_fork(data: npt.NDArray[np.uint8], replay: list[npt.NDArray[np.int64]]) -> None:
    """Fork a child that keeps the version; the parent's stores then copy pages."""
    timings = Timings("fork")
    child = None
    for places in replay:
        if child is not None:
            child.end()
        child = timings.version(Child)
        timings.store(data, places)
    timings.tell()
    if child is not None:
        child.end()


class Child:
    """A forked process that does nothing but keep its memory, until told or orphaned."""

    def __init__(self) -> None:
        waiting, self._alive = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._alive)
            os.read(waiting, 1)
            os._exit(0)
        os.close(waiting)

    def end(self) -> None:
        """Let it end, and wait for that."""
        os.close(self._alive)
        os.waitpid(self._pid, 0)


def with_copy(data: npt.NDArray[np.uint8], replay: list[npt.NDArray[np.int64]]) -> None:
    """Copy everything into an array that is used again for each version."""
    timings = Timings("np.copyto")
    with mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        kept = np.frombuffer(memory, np.uint8)
        _copy_versions(timings, data, kept, replay)
        timings.tell()
        del kept


def with_shared_memory(data: npt.NDArray[np.uint8], replay: list[npt.NDArray[np.int64]]) -> None:
    """Copy everything into a shared memory block that is used again for each version."""
    timings = Timings("shared_memory")
    block = SharedMemory(f"quire-demo-{os.getpid()}", create=True, size=len(data))
    # Its name is not needed, so that nothing is left whatever happens.
    block.unlink()
    assert block.buf is not None  # until it is closed
    kept = np.frombuffer(block.buf, np.uint8, len(data))
    _copy_versions(timings, data, kept, replay)
    timings.tell()
    del kept
    block.close()


def _copy_versions(
    timings: Timings,
    data: npt.NDArray[np.uint8],
    kept: npt.NDArray[np.uint8],
    replay: list[npt.NDArray[np.int64]],
) -> None:
    for places in replay:
        # Not timed: the fork before has left pages protected, which is no cost of copying.
        data[places] += np.uint8(1)
    for places in replay:
        timings.store(data, places)
        timings.version(lambda: np.copyto(kept, data))


def main() -> int:
    """Run as a program; the socket's path is the only argument."""
    try:
        compare(sys.argv[1])
    except (BrokenPipeError, EOFError):
        # The command is gone, so nobody is left to tell.
        return 1
    except (OSError, MemoryError) as error:
        announce("failed", text=f"the comparison cannot go on: {type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
