"""fork in every stage of a segment: parent and child go on with what they had, and never meet."""

import ctypes
import multiprocessing
import os
import pathlib
import threading

import numpy as np
import pytest
from support import (
    MIB,
    PAGE,
    compiled,
    content,
    fork,
    nothing_left,
    pattern,
    run_forked,
    status_bytes,
    view,
    wait,
)

import quire

SIZE = 2 * MIB + 100


def fresh(segment: quire.Segment) -> list[quire.Snapshot]:
    """Never snapshotted."""
    assert segment.size == SIZE
    return []


def snapshotted(segment: quire.Segment) -> list[quire.Snapshot]:
    return [segment.snapshot()]


def dirty(segment: quire.Segment) -> list[quire.Snapshot]:
    """Snapshotted, with pages written since."""
    taken = [segment.snapshot()]
    segment.array(np.uint8)[:: 3 * PAGE] = 77
    return taken


def many_versions(segment: quire.Segment) -> list[quire.Snapshot]:
    taken = []
    for number in range(70):
        segment[number * PAGE] = number
        taken.append(segment.snapshot())
    return taken


def severed(segment: quire.Segment) -> list[quire.Snapshot]:
    taken = [segment.sever()]
    segment[:PAGE] = b"s" * PAGE
    return taken


def grown(segment: quire.Segment) -> list[quire.Snapshot]:
    taken = [segment.snapshot()]
    segment.grow(SIZE + 5 * PAGE)
    segment[SIZE : SIZE + 3] = b"end"
    return taken


every_stage = pytest.mark.parametrize("stage", [fresh, snapshotted, dirty, many_versions, severed, grown])


@pytest.fixture(autouse=True)
def _nothing_leaks():
    with nothing_left():
        yield


@pytest.fixture
def segment():
    with quire.Segment.from_buffer(pattern(SIZE, 1)) as made:
        yield made


def refused(segment: quire.Segment) -> None:
    """What only the maker can do raises, and changes nothing."""
    before = segment[:]
    for call in (segment.snapshot, segment.sever, lambda: segment.grow(segment.size + PAGE)):
        with pytest.raises(quire.ForkedError):
            call()
    assert segment[:] == before


@every_stage
def test_parent_and_child_never_see_each_other(segment: quire.Segment, stage) -> None:
    versions = stage(segment)
    expected = segment[:]
    to_child, to_parent = os.pipe(), os.pipe()

    def work() -> None:
        assert segment[:] == expected
        segment.array(np.uint8)[1::PAGE] = 201
        os.write(to_parent[1], b"c")
        assert os.read(to_child[0], 1) == b"p"
        mine = np.frombuffer(expected, np.uint8).copy()
        mine[1::PAGE] = 201
        assert np.array_equal(view(segment), mine)
        refused(segment)

    child = fork(work)
    try:
        assert os.read(to_parent[0], 1) == b"c"
        assert segment[:] == expected
        segment.array(np.uint8)[2::PAGE] = 202
        mine = np.frombuffer(expected, np.uint8).copy()
        mine[2::PAGE] = 202
    finally:
        os.write(to_child[1], b"p")
        code = wait(child)
        for end in (*to_child, *to_parent):
            os.close(end)
    assert code == 0
    assert np.array_equal(view(segment), mine)
    assert content(segment.snapshot()) == mine.tobytes()
    for version in versions:
        version._core.check_invariants()
    segment.check_invariants()


@every_stage
def test_snapshots_and_mappings_work_in_the_child(segment: quire.Segment, stage) -> None:
    versions = stage(segment) or [segment.snapshot()]
    expected = [content(version) for version in versions[-3:]]
    mapping = versions[-1].map()
    private = versions[-1].map(private=True)

    def work() -> None:
        assert [content(version) for version in versions[-3:]] == expected
        assert mapping[:] == expected[-1]
        private[:5] = b"child"
        with versions[-1].fork() as mine:
            mine[:4] = b"mine"
            assert content(mine.snapshot())[:4] == b"mine"
        mapping.advance(versions[0])
        assert mapping[:] == content(versions[0])
        for version in versions:
            version.verify()
            version.close()
        mapping.close()

    run_forked(work)
    assert [content(version) for version in versions[-3:]] == expected
    assert mapping[:] == private[:] == expected[-1]
    mapping.close()
    private.close()


@every_stage
def test_snapshots_go_on_after_children_ended(segment: quire.Segment, stage) -> None:
    stage(segment)
    for number in range(6):
        segment[number * 3 * PAGE] = number
        run_forked(lambda: segment.__setitem__(0, 99))
        expected = segment[:]
        assert content(segment.snapshot()) == expected


@every_stage
def test_grandchildren(segment: quire.Segment, stage) -> None:
    stage(segment)
    expected = segment[:]

    def grandchild() -> None:
        assert segment[:1] == b"c"
        assert segment[1:] == expected[1:]
        segment[1:2] = b"g"
        refused(segment)

    def child() -> None:
        segment[:1] = b"c"
        run_forked(grandchild)
        assert segment[:2] == b"c" + expected[1:2]

    run_forked(child)
    assert segment[:] == expected
    assert content(segment.snapshot()) == expected


@every_stage
def test_closing_in_the_child(segment: quire.Segment, stage) -> None:
    versions = stage(segment)
    expected = segment[:]

    def work() -> None:
        segment.close()
        for version in versions:
            version.close()

    run_forked(work)
    assert segment[:] == expected
    assert content(segment.snapshot()) == expected


def test_a_segment_that_the_child_made(segment: quire.Segment) -> None:
    segment.snapshot()

    def grandchild(own: quire.Segment) -> None:
        assert own[:4] == b"own!"
        own[:1] = b"x"
        refused(own)

    def work() -> None:
        own = quire.Segment(3 * MIB)
        own[:3] = b"own"
        first = own.snapshot()
        own[3:4] = b"!"
        second = own.snapshot()
        assert second.diff(first) == [(0, PAGE)]
        run_forked(lambda: grandchild(own))
        assert content(second)[:4] == own[:4] == b"own!"
        own.grow(4 * MIB)
        assert content(own.snapshot())[:4] == b"own!"
        own.close()

    run_forked(work)


@pytest.fixture(scope="module")
def writers(tmp_path_factory) -> ctypes.CDLL:
    return compiled(
        tmp_path_factory.mktemp("writers"),
        """
        #include <stdint.h>
        void count(volatile uint64_t *at, long stride, long places, volatile int *stop) {
            for (uint64_t round = 1; !*stop; round++)
                for (long i = 0; i < places; i++)
                    at[i * stride] = round;
        }
        """,
    )


def test_fork_while_threads_make_segments() -> None:
    """A child that lives on inherits no memory of segments half made, so these can be sealed."""
    errors: list[BaseException] = []
    stop = threading.Event()

    def make() -> None:
        try:
            while not stop.is_set():
                with quire.Segment(PAGE) as made, quire.LiveSegment(PAGE) as live:
                    made[0:3] = b"abc"
                    live.snapshot().close()
                    with made.snapshot() as snapshot:
                        assert content(snapshot)[:3] == b"abc"
        except BaseException as error:  # noqa: BLE001 - the test shows it
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(2)]
    ours, theirs = os.pipe()
    children = []
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):

            def live_on() -> None:
                os.close(theirs)
                os.read(ours, 1)

            children.append(fork(live_on))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        os.close(theirs)
        codes = [wait(child) for child in children]
        os.close(ours)
    assert not errors, errors
    assert not any(codes)


def test_fork_while_threads_write(segment: quire.Segment, writers: ctypes.CDLL) -> None:
    """No store of the parent's threads is lost, and none reaches a child."""
    stop = ctypes.c_int(0)
    stride = PAGE // 8
    places = SIZE // PAGE // 2
    array = segment.array(np.uint64, 2 * places * stride)
    array[:] = 0
    threads = [
        threading.Thread(
            target=writers.count,
            args=(
                ctypes.c_void_p(segment.address + first * places * PAGE),
                stride,
                places,
                ctypes.byref(stop),
            ),
        )
        for first in range(2)
    ]
    for thread in threads:
        thread.start()

    def work() -> None:
        before = segment[:]
        counts = np.frombuffer(before, np.uint64, 2 * places * stride)[::stride].reshape(2, places)
        # One thread writes place after place, so a fork between two stores sees at most one step.
        assert (counts.max(1) - counts.min(1) <= 1).all()
        assert segment[:] == before
        refused(segment)

    try:
        for number in range(12):
            if number % 3 == 1:
                segment.snapshot().close()
            run_forked(work)
    finally:
        stop.value = 1
        for thread in threads:
            thread.join()
    last = array[::stride].reshape(2, places)
    assert (last == last[:, :1]).all(), "a store of a thread was lost"
    assert last.min() > 0
    del array, last


def add_one(snapshot: quire.Snapshot, results) -> None:
    with snapshot.fork() as mine:
        mine.array(np.uint8)[:] += 1
        results.put(mine.snapshot())
        results.close()
        results.join_thread()


def test_multiprocessing_fork(segment: quire.Segment) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    expected = view(segment).copy()
    process = context.Process(target=add_one, args=(segment.snapshot(), results))
    process.start()
    back = results.get(timeout=60)
    process.join()
    assert process.exitcode == 0
    assert np.array_equal(np.frombuffer(content(back), np.uint8), expected + 1)
    assert np.array_equal(view(segment), expected)
    results.close()
    results.join_thread()
    process.close()


def writable_shared_at(address: int) -> list[str]:
    """Mappings of this process there that are writable and shared: none, or the writable alias."""
    found = []
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        if start <= address < stop and line.split()[1].startswith("rw") and line.split()[1].endswith("s"):
            found.append(line)
    return found


@pytest.mark.parametrize("backend", ["memfd", "sysv"])
def test_live_segments_in_the_child(backend: str) -> None:
    with quire.LiveSegment(3 * PAGE, backend=backend) as live:
        with live.unprotected() as rw:
            rw[:3] = b"one"
        assert writable_shared_at(live.rw_address)
        go, done = os.pipe(), os.pipe()

        def work() -> None:
            assert live[:3] == b"one"
            os.write(done[1], b"r")
            assert os.read(go[0], 1) == b"w"
            assert live[:3] == b"two"
            with pytest.raises(quire.ForkedError), live.unprotected():
                raise AssertionError("a child may not write")
            assert writable_shared_at(live.rw_address) == []

        child = fork(work)
        try:
            assert os.read(done[0], 1) == b"r"
            with live.unprotected() as rw:
                rw[:3] = b"two"
        finally:
            os.write(go[1], b"w")
            code = wait(child)
            for end in (*go, *done):
                os.close(end)
        assert code == 0
        assert live[:3] == b"two"


def test_children_leak_nothing(segment: quire.Segment) -> None:
    segment.snapshot().close()
    run_forked(lambda: segment.__setitem__(5, 5))
    before = status_bytes("RssShmem"), len(pathlib.Path("/proc/self/maps").read_text().splitlines())
    for _ in range(30):
        run_forked(lambda: segment.array(np.uint8).fill(3))
    after = status_bytes("RssShmem"), len(pathlib.Path("/proc/self/maps").read_text().splitlines())
    assert after[0] <= before[0] + 16 * PAGE
    assert after[1] <= before[1] + 4
