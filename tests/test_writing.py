"""Threads that write, threads that take snapshots, and the gate between them."""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from quire import ForkedError, Segment
from quire.locks import WriterLock, WritingGate


@pytest.fixture
def segment() -> Iterator[Segment]:
    with Segment(1 << 20) as made:
        yield made


def run(*work: Callable[[], None]) -> None:
    """Run functions in threads and raise what one of them raised."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def still_waits(thread: threading.Thread) -> bool:
    """Whether a thread goes on waiting; a wrong answer needs a thread that stalls for a tenth of a second."""
    thread.join(0.1)
    return thread.is_alive()


def test_snapshots_are_exact_for_those_who_use_it(segment: Segment) -> None:
    """Two far places are written together; no snapshot may have one without the other."""
    stop = threading.Event()
    last = segment.size // 8 - 1

    def write(column: int) -> None:
        view = segment.array("u8")
        number = 0
        while not stop.is_set():
            number += 1
            with segment.writing():
                view[column] = number
                view[last - column] = number

    def take() -> None:
        try:
            for _ in range(300):
                with segment.snapshot() as snapshot, snapshot.map() as mapping:
                    seen = np.frombuffer(mapping[:64] + mapping[-64:], "u8")
                    assert seen[:4].tolist() == seen[-4:][::-1].tolist()
        finally:
            stop.set()

    run(*[lambda column=column: write(column) for column in range(4)], take)
    with segment.snapshot() as snapshot, snapshot.map() as mapping:
        assert all(mapping.array("u8")[:4] > 0)


def test_a_snapshot_waits_until_nobody_is_inside(segment: Segment) -> None:
    taker = threading.Thread(target=lambda: segment.snapshot().close())
    with segment.writing():
        with segment.writing():
            taker.start()
            assert still_waits(taker)
        assert still_waits(taker)
    taker.join()


def test_sever_waits_too(segment: Segment) -> None:
    taker = threading.Thread(target=lambda: segment.sever().close())
    with segment.writing():
        taker.start()
        assert still_waits(taker)
        segment[0] = 1
    taker.join()
    assert segment[0] == 0


def test_many_may_be_inside(segment: Segment) -> None:
    together = threading.Barrier(5, timeout=60)

    def write() -> None:
        with segment.writing():
            together.wait()

    run(*[write] * 5)


@pytest.mark.parametrize("call", [Segment.snapshot, Segment.sever])
def test_inside_one_cannot_take_a_snapshot(segment: Segment, call: Callable[[Segment], object]) -> None:
    with segment.writing(), segment.writing(), pytest.raises(RuntimeError, match="writing"):
        call(segment)
    segment.snapshot().close()


def test_an_exception_leaves_the_gate(segment: Segment) -> None:
    with pytest.raises(KeyError), segment.writing():
        raise KeyError
    segment.snapshot().close()


def test_a_failed_snapshot_leaves_the_gate() -> None:
    segment = Segment(100)
    segment.close()
    for _ in range(2):
        with pytest.raises(ValueError, match="closed"):
            segment.snapshot()
    with segment.writing():
        pass


def test_writers_cannot_starve_a_snapshot() -> None:
    gate = WritingGate()
    entered, release = threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        with gate.writing():
            entered.set()
            release.wait()

    def snapshot() -> None:
        with gate.exclusive():
            order.append("snapshot")

    def late() -> None:
        with gate.writing():
            order.append("late")

    one, two, three = (threading.Thread(target=work) for work in (first, snapshot, late))
    one.start()
    entered.wait()
    two.start()
    while not gate._state.waiting_snapshots:
        os.sched_yield()
    # It could go in if only those inside counted, but a snapshot waits.
    three.start()
    assert still_waits(three)
    release.set()
    for thread in (one, two, three):
        thread.join()
    assert order == ["snapshot", "late"]


def test_snapshots_cannot_starve_a_writer() -> None:
    gate = WritingGate()
    running, release = threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        with gate.exclusive():
            running.set()
            release.wait()

    def write() -> None:
        with gate.writing():
            order.append("writer")

    def second() -> None:
        with gate.exclusive():
            order.append("snapshot")

    one, two, three = (threading.Thread(target=work) for work in (first, write, second))
    one.start()
    running.wait()
    two.start()
    while not gate._state.waiting_writers:
        os.sched_yield()
    three.start()
    while not gate._state.waiting_snapshots:
        os.sched_yield()
    release.set()
    for thread in (one, two, three):
        thread.join()
    assert order == ["writer", "snapshot"]


def test_who_is_inside_may_nest_while_a_snapshot_waits(segment: Segment) -> None:
    taker = threading.Thread(target=lambda: segment.snapshot().close())
    with segment.writing():
        taker.start()
        while not segment._gate._state.waiting_snapshots:
            os.sched_yield()
        with segment.writing():
            segment[0] = 1
    taker.join()


def test_everything_at_once() -> None:
    gate = WritingGate()
    inside = 0
    running = False
    lock = threading.Lock()

    def write() -> None:
        nonlocal inside
        for number in range(300):
            with gate.writing():
                with lock:
                    assert not running
                    inside += 1
                if number % 3 == 0:
                    with gate.writing():
                        assert not running
                with lock:
                    inside -= 1

    def snapshot() -> None:
        nonlocal running
        for _ in range(300):
            with gate.exclusive():
                with lock:
                    assert not running
                    assert not inside
                    running = True
                with lock:
                    running = False

    run(*[write] * 4, *[snapshot] * 3)
    state = gate._state
    assert not any((state.inside, state.running, state.waiting_snapshots, state.waiting_writers))


class _InterruptionError(Exception):
    """What the handler of a signal raises."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", ["snapshot", "writing"])
def test_an_exception_out_of_a_signal_handler_leaves_the_gate(segment: Segment, what: str) -> None:
    """Raised between any two instructions, it leaves a gate that others can use."""

    def handler(*_: object) -> None:
        raise _InterruptionError

    def use() -> None:
        if what == "snapshot":
            segment.snapshot().close()
        else:
            with segment.writing(), segment.writing():
                segment[0] = 1

    chance = random.Random(5)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 5e-4))
                # Not until it comes: one that falls into a finalizer is printed and gone.
                for _ in range(100):
                    use()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except _InterruptionError:
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with segment.writing():
        segment[1] = 2
    run(lambda: segment.snapshot().close())
    segment.snapshot().close()
    assert not segment._gate._state.inside


def in_child(work: Callable[[], None]) -> int:
    """Fork, run a function in the child; return its exit code, 0 if it did not raise."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_gets_a_fresh_gate(segment: Segment) -> None:
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        with segment.writing():
            entered.set()
            release.wait()

    def in_the_child() -> None:
        # The parent's thread that was inside does not exist here.
        with segment.writing():
            segment[0] = 3
        with pytest.raises(ForkedError):
            segment.snapshot()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    try:
        assert in_child(in_the_child) == 0
    finally:
        release.set()
        thread.join()
    assert segment[0] == 0


def test_a_fork_inside_the_block(segment: Segment) -> None:
    code = None
    with segment.writing():
        pid = os.fork()
    if not pid:
        code = 1
        try:
            with segment.writing(), segment.writing():
                pass
            assert not segment._gate._state.inside
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    segment.snapshot().close()


def test_a_fork_while_the_writer_lock_is_held() -> None:
    lock = WriterLock()

    def take() -> None:
        with lock.hold():
            assert lock.mine

    with lock.hold():
        assert in_child(take) == 0
        with pytest.raises(RuntimeError), lock.hold():
            pass
    take()
