"""The peer of versions: fork, from a small process of its own so that nothing but the pages is forked."""

import mmap
import os
import signal
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self

import numpy as np

from benches.common import MIB, PAGE, Places, Words, fill, store, warm_for_version


class Forked(NamedTuple):
    """What one fork cost, in seconds.

    Attributes:
        call: The fork itself.
        writes: The stores after it.
        writes_again: The same stores, to pages that have been copied.
        drop: Killing the child and waiting for its end, which gives the version back.
        huge_bytes: Of the memory, before the fork, in huge pages.
    """

    call: float
    writes: float
    writes_again: float
    drop: float
    huge_bytes: int

    @property
    def version(self) -> float:
        """All that the version cost the writer."""
        return self.call + self.writes - self.writes_again


class Forker:
    """A process that holds memory and forks when told."""

    def __init__(self, size_bytes: int, *, huge: bool) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, size_bytes, huge), daemon=True)
        self._process.start()
        theirs.close()

    def version(self, where: Places, value: int) -> Forked:
        """Fork a child that waits, store, and end the child."""
        self._pipe.send((where, value))
        answer: Forked = self._pipe.recv()
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: "Connection[Any, Any]", size_bytes: int, huge: bool) -> None:
    words, memory = _make(size_bytes, huge)
    while True:
        try:
            where, value = pipe.recv()
        except EOFError:
            return
        if huge:
            # Copies on write split huge pages, so a second fork would find small ones: give it new memory.
            del words
            memory.close()
            words, memory = _make(size_bytes, huge)
        huge_bytes = _huge_bytes()
        warm_for_version(len(where))
        pipe.send(_version(words, where, value, huge_bytes))


def _make(size_bytes: int, huge: bool) -> tuple[Words, mmap.mmap]:
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    words = np.frombuffer(memory, "u8")
    fill(words)
    return words, memory


def _huge_bytes() -> int:
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("AnonHugePages:"):
                return int(line.split()[1]) * 1024
    return 0


def _version(words: Words, where: Places, value: int, huge_bytes: int) -> Forked:
    waiting, wake = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(wake)
        os.read(waiting, 1)
        os._exit(0)
    call = time.perf_counter() - start
    writes = store(words, where, value)
    writes_again = store(words, where, value + 1)
    start = time.perf_counter()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    drop = time.perf_counter() - start
    os.close(waiting)
    os.close(wake)
    return Forked(call, writes, writes_again, drop, huge_bytes)


def huge_pages_possible() -> bool:
    """Whether memory of this process can be in huge pages."""
    probe = 64 * MIB
    with mmap.mmap(-1, probe, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        before = _huge_bytes()
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            return False
        for offset in range(0, probe, PAGE):
            memory[offset] = 1
        return _huge_bytes() - before >= probe // 2
