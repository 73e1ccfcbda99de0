"""Loops over every public operation: no descriptor, thread, VMA or memory is left behind."""

import multiprocessing
import socket
from collections.abc import Callable

import numpy as np
import pytest
from leaks import descriptors
from support import (
    MIB,
    PAGE,
    content,
    kept_for_ever,
    nothing_left,
    pattern,
    run_forked,
    settle,
    shmem_names,
    status_bytes,
    vma_count,
)

import quire

SIZE = MIB + 3


def segments() -> None:
    segment = quire.Segment(SIZE)
    segment[5] = 5
    segment.close()
    segment.close()


def dropped_segments() -> None:
    quire.Segment.from_buffer(pattern(SIZE, 1)).array(np.uint8)[0] = 1


def snapshots() -> None:
    with quire.Segment.from_buffer(pattern(SIZE, 1)) as segment:
        for number in range(3):
            segment[number * PAGE] = number
            segment.snapshot()


def severing() -> None:
    with quire.Segment.from_buffer(pattern(SIZE, 1)) as segment:
        segment.sever().close()
        segment[0] = 1
        segment.sever()


def growth() -> None:
    with quire.Segment(SIZE) as segment:
        segment.grow(SIZE * 2)
        segment.snapshot().close()
        segment.grow(SIZE * 3)
        # Past the reservation, so that it moves.
        segment.grow(SIZE * 40)
        segment[SIZE * 40 - 1] = 1
        segment.snapshot().close()


def mappings() -> None:
    with quire.Segment.from_buffer(pattern(SIZE, 1)) as segment:
        first = segment.snapshot()
        segment.array(np.uint8)[:: 3 * PAGE] = 1
        second = segment.snapshot()
        mapping = first.map()
        mapping.advance(second)
        mapping.advance(first)
        private = second.map(private=True)
        private[:5] = b"12345"
        mapping.close()
        with pytest.raises(BufferError), memoryview(private):
            private.close()


def diffs_and_checks() -> None:
    with quire.Segment.from_buffer(pattern(SIZE, 1)) as segment, segment.snapshot() as first:
        segment[0] ^= 1
        with segment.snapshot() as second:
            assert first.diff(second) == [(0, PAGE)]
            second.verify()


def forks() -> None:
    with quire.Segment.from_buffer(pattern(SIZE, 1)) as segment, segment.snapshot() as snapshot:
        child = snapshot.fork()
        child[0] ^= 1
        child.snapshot().fork()


def files(tmp_path) -> None:
    with quire.Segment.from_buffer(pattern(PAGE * 3, 1)) as segment, segment.snapshot() as snapshot:
        snapshot.save(tmp_path / "saved")
    quire.load(tmp_path / "saved").map()
    quire.load(tmp_path / "saved", copy=True).fork().snapshot()
    (tmp_path / "short").write_bytes((tmp_path / "saved").read_bytes()[:-1])
    with pytest.raises(quire.Malformed):
        quire.load(tmp_path / "short", copy=True)


def sockets() -> None:
    here, there = socket.socketpair()
    with here, there, quire.Segment.from_buffer(pattern(SIZE, 1)) as segment:
        quire.send(here, segment.snapshot())
        received = quire.recv(there)
        assert content(received)[:9] == segment[:9]


def channels() -> None:
    here, there = socket.socketpair()
    with (
        quire.Channel(here) as sender,
        quire.Channel(there) as receiver,
        quire.Segment.from_buffer(pattern(SIZE, 1)) as segment,
    ):
        for number in range(4):
            segment[number] = 0
            sender.send(segment.snapshot())
            assert content(receiver.recv()) == segment[:]


def live_segments() -> None:
    with quire.LiveSegment(SIZE) as live:
        with live.unprotected() as rw:
            rw[:4] = b"live"
        mirror = live.mirror()
        assert mirror.map()[:4] == b"live"
        assert content(live.snapshot())[:4] == b"live"


def shared_live_segments() -> None:
    with quire.LiveSegment(SIZE, backend="sysv") as live:
        with live.unprotected() as rw:
            rw[:4] = b"live"
        with live.mirror() as mirror, mirror.map() as shown:
            assert shown[:4] == b"live"


def refusals() -> None:
    for size in (0, -1, 1 << 63):
        with pytest.raises(ValueError, match="size"):
            quire.Segment(size)
    with quire.Segment(SIZE) as segment, pytest.raises(ValueError, match="shrink"):
        segment.grow(1)
    with pytest.raises(ValueError, match="closed"):
        segment.snapshot()


def forked_children() -> None:
    with quire.Segment.from_buffer(pattern(SIZE, 1)) as segment:
        segment.snapshot()
        run_forked(lambda: segment.__setitem__(0, 1))


OPERATIONS = [
    segments,
    dropped_segments,
    snapshots,
    severing,
    growth,
    mappings,
    diffs_and_checks,
    forks,
    sockets,
    channels,
    live_segments,
    shared_live_segments,
    refusals,
    forked_children,
]


def loop(operation: Callable[[], None], rounds: int) -> None:
    for _ in range(5):
        operation()
    settle()
    names = shmem_names()
    with nothing_left():
        before = vma_count(), status_bytes("RssShmem"), status_bytes("RssAnon")
        for _ in range(rounds):
            operation()
        settle()
        after = vma_count(), status_bytes("RssShmem"), status_bytes("RssAnon")
    # The allocator may take an arena more; a VMA or a page for each round would show.
    assert after[0] - before[0] < rounds / 3, f"{after[0] - before[0]} VMAs more after {rounds} rounds"
    assert after[1] - before[1] < rounds * PAGE / 3, f"{after[1] - before[1]} bytes of shared memory more"
    assert after[2] - before[2] < 4 * MIB, f"{after[2] - before[2]} bytes of private memory more"
    assert not {name for name in shmem_names() - names if "quire" in name}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_nothing_is_left(operation: Callable[[], None]) -> None:
    loop(operation, 60)


def test_nothing_is_left_of_files(tmp_path) -> None:
    loop(lambda: files(tmp_path), 20)


def test_a_segment_left_open_holds_what_it_needs() -> None:
    """Two hundred versions of one segment that nobody keeps: the memory of one."""
    with quire.Segment.from_buffer(pattern(SIZE, 1)) as segment:
        segment.snapshot()
        start = status_bytes("RssShmem") + status_bytes("RssAnon")
        for number in range(200):
            segment.array(np.uint8)[:] = number
            segment.snapshot()
        assert status_bytes("RssShmem") + status_bytes("RssAnon") - start < 4 * SIZE


def test_what_the_process_keeps_does_not_grow() -> None:
    """A few descriptors are opened once, on first use, whatever is done afterwards."""

    def kept() -> list[str]:
        return sorted(filter(kept_for_ever, descriptors().values()))

    for operation in OPERATIONS:
        operation()
    before = kept()
    assert len(before) <= 6, before
    for _ in range(20):
        for operation in (snapshots, forks, severing, growth):
            operation()
    assert kept() == before


def echo(snapshot: quire.Snapshot, results) -> None:
    results.put(snapshot)
    results.close()
    results.join_thread()


def test_nothing_is_left_of_processes() -> None:
    context = multiprocessing.get_context("fork")

    def operation() -> None:
        results = context.Queue()
        with quire.Segment.from_buffer(pattern(SIZE, 1)) as segment, segment.snapshot() as snapshot:
            process = context.Process(target=echo, args=(snapshot, results))
            process.start()
            with results.get(timeout=60) as back:
                assert back.diff(snapshot) == []
            process.join()
            assert process.exitcode == 0
            process.close()
        results.close()
        results.join_thread()

    for _ in range(3):
        operation()
    with nothing_left():
        for _ in range(10):
            operation()
