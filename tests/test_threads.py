"""Threads that write while snapshots are taken: no store is lost, and no version goes back."""

import contextlib
import ctypes
import errno
import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from support import MIB, PAGE, compiled, nothing_left, pattern, run_again_with_comparison, view

import quire

SOURCE = """
#include <stdint.h>
/* Add one to each counter in turn; the number of rounds. One counter a page, so every round dirties all. */
uint64_t count(volatile uint64_t *at, long stride, long places, volatile int *stop) {
    uint64_t rounds = 0;
    do {
        for (long i = 0; i < places; i++)
            at[i * stride] += 1;
        rounds++;
    } while (!*stop);
    return rounds;
}
/* The same, each counter by itself in a scattered order. */
uint64_t scatter(volatile uint64_t *at, long stride, long places, volatile int *stop) {
    uint64_t state = 88172645463325252ull, stores = 0;
    do {
        state ^= state << 13; state ^= state >> 7; state ^= state << 17;
        at[(long)(state % places) * stride] += 1;
        stores++;
    } while (!*stop);
    return stores;
}
/* Two threads add to the same words. */
uint64_t add(uint64_t *at, long stride, long places, volatile int *stop) {
    uint64_t stores = 0;
    do {
        __atomic_fetch_add(&at[(long)(stores % places) * stride], 1, __ATOMIC_SEQ_CST);
        stores++;
    } while (!*stop);
    return stores;
}
"""
WORDS = PAGE // 8


@pytest.fixture(scope="module")
def writers(tmp_path_factory) -> ctypes.CDLL:
    library = compiled(tmp_path_factory.mktemp("writers"), SOURCE)
    for name in ("count", "scatter", "add"):
        getattr(library, name).restype = ctypes.c_uint64
    return library


@pytest.fixture(autouse=True)
def _nothing_leaks():
    with nothing_left():
        yield


class Counting:
    """Threads inside C, and how much each of them did."""

    def __init__(self) -> None:
        self.stop = ctypes.c_int(0)
        self.threads: list[threading.Thread] = []
        self.done: list[int] = []

    def start(self, function, address: int, places: int) -> None:
        number = len(self.done)
        self.done.append(0)

        def run() -> None:
            self.done[number] = function(
                ctypes.c_void_p(address), ctypes.c_long(WORDS), ctypes.c_long(places), ctypes.byref(self.stop)
            )

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def join(self) -> None:
        self.stop.value = 1
        for thread in self.threads:
            thread.join()


@contextlib.contextmanager
def counting() -> Iterator[Counting]:
    running = Counting()
    try:
        yield running
    finally:
        running.join()


def counters(memory: quire.Segment | quire.Mapping, places: int) -> np.ndarray:
    return memory.array(np.uint64, places * WORDS)[::WORDS].copy()


@pytest.mark.parametrize("kind", ["count", "scatter"])
@pytest.mark.parametrize("pages", [40, 3000])
def test_no_increment_is_lost(writers: ctypes.CDLL, kind: str, pages: int) -> None:
    """Each thread has its own pages and counts what it did."""
    half = pages // 2
    with quire.Segment(pages * PAGE) as segment:
        with counting() as running:
            for first in (0, half):
                running.start(getattr(writers, kind), segment.address + first * PAGE, half)
            before = np.zeros(pages, np.uint64)
            for number in range(100):
                with segment.snapshot() as snapshot, snapshot.map() as mapping:
                    now = counters(mapping, pages)
                    assert (now >= before).all(), f"counters went back in version {number}"
                    if number % 10 == 0:
                        snapshot._core.check_invariants()
                    before = now
        last = counters(segment, pages)
        assert (last >= before).all()
        for first, done in zip((0, half), running.done, strict=True):
            if kind == "count":
                assert (last[first : first + half] == done).all(), "increments were lost"
            else:
                assert int(last[first : first + half].sum()) == done, "increments were lost"
        with segment.snapshot() as snapshot, snapshot.map() as mapping:
            assert (counters(mapping, pages) == last).all()
        segment.check_invariants()


def test_threads_that_share_pages(writers: ctypes.CDLL) -> None:
    pages = 300
    with quire.Segment(pages * PAGE) as segment:
        with counting() as running:
            for _ in range(3):
                running.start(writers.add, segment.address, pages)
            for _ in range(150):
                segment.snapshot().close()
        assert int(counters(segment, pages).sum()) == sum(running.done), "increments were lost"


def test_no_increment_is_lost_while_a_segment_is_severed(writers: ctypes.CDLL) -> None:
    """What a version took is no longer in the segment, and everything is in one of them."""
    pages = 200
    with quire.Segment(pages * PAGE) as segment:
        taken = 0
        with counting() as running:
            for _ in range(2):
                running.start(writers.add, segment.address, pages)
            for number in range(40):
                version = segment.sever() if number % 4 == 3 else segment.snapshot()
                if number % 4 == 3:
                    with version.map() as mapping:
                        taken += int(counters(mapping, pages).sum())
                version.close()
        assert taken + int(counters(segment, pages).sum()) == sum(running.done), "increments were lost"


def test_snapshots_from_many_threads(writers: ctypes.CDLL) -> None:
    pages = 500
    failures: list[BaseException] = []
    with quire.Segment(pages * PAGE) as segment:

        def take() -> None:
            try:
                before = np.zeros(pages, np.uint64)
                for _ in range(30):
                    with segment.snapshot() as snapshot, snapshot.map() as mapping:
                        now = counters(mapping, pages)
                    assert (now >= before).all()
                    before = now
            except BaseException as error:  # noqa: BLE001 - shown by the assertion below
                failures.append(error)

        with counting() as running:
            running.start(writers.count, segment.address, pages)
            takers = [threading.Thread(target=take) for _ in range(4)]
            for taker in takers:
                taker.start()
            for taker in takers:
                taker.join()
        assert not failures, failures
        assert (counters(segment, pages) == running.done[0]).all()


def test_writing_blocks_are_never_torn() -> None:
    with quire.Segment(64 * PAGE) as segment:
        stop = threading.Event()

        def write() -> None:
            number = 0
            array = segment.array(np.uint64)
            while not stop.is_set():
                number += 1
                with segment.writing():
                    array[:] = number

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(200):
                with segment.snapshot() as snapshot, snapshot.map() as mapping:
                    seen = mapping.array(np.uint64)
                    assert seen.min() == seen.max(), "a version holds half of a writing() block"
                    del seen
        finally:
            stop.set()
            writer.join()


def test_growth_while_threads_write(writers: ctypes.CDLL) -> None:
    with quire.Segment(100 * PAGE) as segment:
        address = segment.address
        with counting() as running:
            running.start(writers.count, address, 100)
            for number in range(100, 200):
                segment.grow(number * PAGE + 1)
                with segment.snapshot() as snapshot:
                    assert snapshot.size == number * PAGE + 1
        assert segment.address == address
        assert (counters(segment, 100) == running.done[0]).all()


def test_system_calls_that_store_into_the_segment(tmp_path) -> None:
    """readv and recv_into may fail with EFAULT while pages are rearranged; none may lie about what it did."""
    size = MIB
    source = tmp_path / "source"
    blocks = [pattern(size, seed).tobytes() for seed in range(3)]
    source.write_bytes(b"".join(blocks))
    with quire.Segment(size) as segment, source.open("rb") as file:
        segment.snapshot().close()
        stop = threading.Event()

        def take() -> None:
            while not stop.is_set():
                segment.snapshot().close()

        taker = threading.Thread(target=take)
        taker.start()
        refused = 0
        try:
            with memoryview(segment) as shown:
                for number in range(150):
                    try:
                        got = os.preadv(file.fileno(), [shown], number % 3 * size)
                    except OSError as error:
                        if error.errno != errno.EFAULT:
                            raise
                        refused += 1
                        continue
                    assert got > 0
                    # What the call says it stored is there; it may have stopped early.
                    assert shown[:got] == blocks[number % 3][:got]
        finally:
            stop.set()
            taker.join()
        print(f"{refused} of 150 calls were refused with EFAULT")
        assert refused < 150
        expected = segment[:]
        with segment.snapshot() as snapshot, snapshot.map() as mapping:
            assert mapping[:] == expected


def test_a_socket_that_stores_into_the_segment() -> None:
    size = MIB
    data = pattern(size, 4).tobytes()
    with quire.Segment(size) as segment:
        stop = threading.Event()
        here, there = socket.socketpair()

        def take() -> None:
            while not stop.is_set():
                segment.snapshot().close()

        def feed() -> None:
            for _ in range(20):
                here.sendall(data)

        threads = [threading.Thread(target=take), threading.Thread(target=feed)]
        for thread in threads:
            thread.start()
        try:
            with here, there, memoryview(segment) as shown:
                for _ in range(20):
                    got = 0
                    while got < size:
                        try:
                            got += there.recv_into(shown[got:])
                        except OSError as error:
                            if error.errno != errno.EFAULT:
                                raise
                    assert np.array_equal(view(segment), np.frombuffer(data, np.uint8))
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_the_same_with_comparison() -> None:
    run_again_with_comparison(__file__)
