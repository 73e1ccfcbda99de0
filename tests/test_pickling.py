"""Snapshots and mirrors through everything that multiprocessing offers, in both directions."""

import concurrent.futures
import copy
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.pool
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from leaks import no_new_descriptors

import quire
from quire import LiveSegment, Malformed, Mirror, NotImmutable, Segment, Snapshot

# Python 3.12 and later warn of a fork with threads; that is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

METHODS = ["fork", "spawn", "forkserver"]
SIZE = 10_000


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    return multiprocessing.get_context(request.param)


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    with Segment.from_buffer(b"parent" + bytes(SIZE - 6)) as segment:
        segment.snapshot()
        segment[SIZE - 1] = 7
        with segment.snapshot() as taken:
            assert taken.layers == 2
            yield taken


def made_here(text: bytes) -> Snapshot:
    with Segment.from_buffer(text + bytes(SIZE - len(text))) as segment:
        return segment.snapshot()


def is_from(snapshot: Snapshot, text: bytes) -> bool:
    snapshot.verify()
    with snapshot.map() as mapping:
        return snapshot.size == SIZE and mapping[: len(text)] == text


def answer(snapshot: Snapshot) -> Snapshot:
    assert is_from(snapshot, b"parent")
    assert snapshot.layers == 2
    return made_here(b"child")


# What the child does.


def by_argument(snapshot: Snapshot, results: Any) -> None:
    results.put(answer(snapshot))


def by_connection(connection: multiprocessing.connection.Connection) -> None:
    with connection:
        for snapshot in iter(connection.recv, None):
            connection.send(answer(snapshot))


def by_queue(work: Any, results: Any) -> None:
    for snapshot in iter(work.get, None):
        results.put(answer(snapshot))


def putting_only(results: Any, count: int) -> None:
    for number in range(count):
        results.put(made_here(b"child %d" % number))


def nested(pair: dict[str, list[Snapshot]]) -> tuple[bool, Snapshot]:
    first, second = pair["both"]
    return first is second, answer(first)


def mirrored(mirror: Mirror) -> bytes:
    mirror.verify()
    with mirror.map() as mapping:
        return mapping[:5]


def mapped(mirror: Mirror) -> bytes:
    with mirror, mirror.map() as mapping:
        return mapping[:5]


# The tests.


def test_process_arguments_and_queue(context: Any, snapshot: Snapshot) -> None:
    results = context.Queue()
    child = context.Process(target=by_argument, args=(snapshot, results))
    child.start()
    assert is_from(results.get(), b"child")
    child.join()
    assert child.exitcode == 0
    results.close()
    results.join_thread()


def test_many_processes_with_one_snapshot(context: Any, snapshot: Snapshot) -> None:
    results = context.SimpleQueue()
    children = [context.Process(target=by_argument, args=(snapshot, results)) for _ in range(4)]
    for child in children:
        child.start()
    for _ in children:
        assert is_from(results.get(), b"child")
    for child in children:
        child.join()
    results.close()


def test_arguments_may_be_forgotten_at_once(context: Any) -> None:
    results = context.SimpleQueue()
    taken = made_here(b"parent")
    with Segment.from_buffer(taken.map()) as segment:
        segment.snapshot()
        segment[SIZE - 1] = 7
        child = context.Process(target=by_argument, args=(segment.snapshot(), results))
        child.start()
    gc.collect()
    assert is_from(results.get(), b"child")
    child.join()
    results.close()


@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue", "JoinableQueue"])
def test_queues(context: Any, snapshot: Snapshot, kind: str) -> None:
    work, results = getattr(context, kind)(), getattr(context, kind)()
    child = context.Process(target=by_queue, args=(work, results))
    child.start()
    for _ in range(5):
        work.put(snapshot)
    for _ in range(5):
        assert is_from(results.get(), b"child")
    work.put(None)
    child.join()
    assert child.exitcode == 0
    for queue in (work, results):
        queue.close()


def test_pipe(context: Any, snapshot: Snapshot) -> None:
    ours, theirs = context.Pipe()
    child = context.Process(target=by_connection, args=(theirs,))
    child.start()
    theirs.close()
    for _ in range(5):
        ours.send(snapshot)
        assert is_from(ours.recv(), b"child")
    ours.send(None)
    child.join()
    ours.close()
    assert child.exitcode == 0


def test_pool(context: Any, snapshot: Snapshot) -> None:
    with context.Pool(2) as pool:
        assert is_from(pool.apply(answer, (snapshot,)), b"child")
        assert all(is_from(got, b"child") for got in pool.map(answer, [snapshot] * 20))
        assert all(is_from(got, b"child") for got in pool.imap_unordered(answer, [snapshot] * 20))
        pool.close()
        pool.join()


_inherited: list[Snapshot] = []


def initialize(snapshot: Snapshot) -> None:
    _inherited.append(snapshot)


def answer_inherited(_number: int) -> Snapshot:
    return answer(_inherited[0])


def test_initializer_of_a_pool(context: Any, snapshot: Snapshot) -> None:
    with context.Pool(2, initialize, (snapshot,)) as pool:
        assert all(is_from(got, b"child") for got in pool.map(answer_inherited, range(4)))
        pool.close()
        pool.join()


def test_executor(context: Any, snapshot: Snapshot) -> None:
    with concurrent.futures.ProcessPoolExecutor(2, context, initialize, (snapshot,)) as executor:
        assert all(is_from(got, b"child") for got in executor.map(answer, [snapshot] * 10))
        assert all(is_from(got, b"child") for got in executor.map(answer_inherited, range(4)))
        assert is_from(executor.submit(answer, snapshot).result(), b"child")
        same, got = executor.submit(nested, {"both": [snapshot, snapshot]}).result()
        assert same
        assert is_from(got, b"child")


def test_a_child_may_end_right_after_it_has_put(context: Any) -> None:
    results = context.Queue()
    child = context.Process(target=putting_only, args=(results, 5))
    child.start()
    for number in range(5):
        assert is_from(results.get(), b"child %d" % number)
    child.join()
    assert child.exitcode == 0
    results.close()
    results.join_thread()


def test_what_is_on_its_way_costs_no_descriptor(snapshot: Snapshot) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send(snapshot)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            ours.send(snapshot)
        assert len(os.listdir("/proc/self/fd")) == before
        for _ in range(101):
            assert is_from(theirs.recv(), b"parent")


def test_closing_after_pickling(snapshot: Snapshot) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send(snapshot)
        snapshot.close()
        assert is_from(theirs.recv(), b"parent")
        with pytest.raises(ValueError, match="closed"):
            ours.send(snapshot)


def test_nothing_is_left_when_all_was_fetched(snapshot: Snapshot) -> None:
    import threading

    with no_new_descriptors():
        threads = set(threading.enumerate())
        ours, theirs = multiprocessing.Pipe()
        with ours, theirs:
            for _ in range(3):
                ours.send(snapshot)
            for _ in range(3):
                theirs.recv().close()
        for thread in set(threading.enumerate()) - threads:
            thread.join()


def test_launching_leaves_nothing(context: Any, snapshot: Snapshot) -> None:
    def launch() -> None:
        results = context.SimpleQueue()
        for _ in range(3):
            child = context.Process(target=by_argument, args=(snapshot, results))
            child.start()
            results.get().close()
            child.join()
            child.close()
        results.close()

    # The first time starts the fork server or the resource tracker, which stay.
    launch()
    snapshot._tickets.close() if snapshot._tickets else None
    with no_new_descriptors():
        launch()
        snapshot._tickets.close() if snapshot._tickets else None


def test_a_pickle_can_be_loaded_once(snapshot: Snapshot) -> None:
    from multiprocessing.reduction import ForkingPickler

    pickled = bytes(ForkingPickler.dumps(snapshot))
    assert is_from(pickle.loads(pickled), b"parent")
    with pytest.raises((Malformed, ConnectionRefusedError)):
        pickle.loads(pickled)


def test_a_pickle_of_a_process_that_has_ended() -> None:
    script = """
import sys, quire
from multiprocessing.reduction import ForkingPickler
sys.stdout.buffer.write(bytes(ForkingPickler.dumps(quire.Segment(10).snapshot())))
"""
    pickled = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout
    with pytest.raises(ConnectionRefusedError, match="ended"):
        pickle.loads(pickled)


def test_a_wrong_token_gets_nothing(snapshot: Snapshot) -> None:
    from multiprocessing.reduction import ForkingPickler

    from quire.snapshot import _unpickle

    first, second = bytes(ForkingPickler.dumps(snapshot)), bytes(ForkingPickler.dumps(snapshot))
    _, (address, token) = snapshot.__class__.__reduce__, second_of(second)
    with pytest.raises(Malformed, match="once"):
        _unpickle(address, bytes(16))
    assert token != second_of(first)[1]
    for pickled in (first, second):
        assert is_from(pickle.loads(pickled), b"parent")


def second_of(pickled: bytes) -> tuple[bytes, bytes]:
    """Address and token in a pickle."""

    class Reader(pickle.Unpickler):
        def find_class(self, _module: str, _name: str) -> Any:
            return lambda *where: where

    import io

    address, token = Reader(io.BytesIO(pickled)).load()
    return address, token


def test_plain_pickling_is_refused(snapshot: Snapshot) -> None:
    with LiveSegment(10) as live, live.mirror() as mirror:
        for obj in (snapshot, mirror, [snapshot]):
            with pytest.raises(TypeError, match="multiprocessing"):
                pickle.dumps(obj)


def test_a_file_cannot_be_pickled(snapshot: Snapshot, tmp_path: Any) -> None:
    snapshot.save(tmp_path / "saved")
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        with pytest.raises(NotImmutable, match="copy=True"):
            ours.send(quire.load(tmp_path / "saved"))
        ours.send(quire.load(tmp_path / "saved", copy=True))
        assert is_from(theirs.recv(), b"parent")


def test_what_stays_in_its_process(snapshot: Snapshot) -> None:
    from multiprocessing.reduction import ForkingPickler

    with LiveSegment(10) as live, live.mirror() as mirror:
        for obj in (Segment(10), live, snapshot.map(), mirror.map()):
            for work in (pickle.dumps, ForkingPickler.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="pickle"):
                    work(obj)


def test_copies_are_the_same(snapshot: Snapshot) -> None:
    assert copy.copy(snapshot) is snapshot
    assert copy.deepcopy({"deep": snapshot})["deep"] is snapshot
    assert snapshot == snapshot  # noqa: PLR0124
    assert snapshot != made_here(b"parent")
    assert len({snapshot, snapshot}) == 1


@pytest.mark.parametrize("backend", ["memfd", "sysv"])
def test_mirrors(context: Any, backend: Any) -> None:
    with LiveSegment(SIZE, backend) as live, live.mirror() as mirror:
        with live.unprotected() as rw:
            rw[:5] = b"hello"
        with context.Pool(1) as pool:
            assert pool.apply(mapped, (mirror,)) == b"hello"
            if backend == "memfd":
                assert pool.apply(mirrored, (mirror,)) == b"hello"
            else:
                with pytest.raises(NotImmutable):
                    pool.apply(mirrored, (mirror,))
            pool.close()
            pool.join()
        child = context.Process(target=mapped, args=(mirror,))
        child.start()
        child.join()
        assert child.exitcode == 0
