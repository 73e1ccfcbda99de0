"""Live memory: written in one place, read everywhere, protected from everybody else."""

import ctypes
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import pytest
from leaks import no_new_descriptors

import quire
from quire import ForkedError, LiveSegment, NotImmutable

SIZE = 10_000


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    # The first spawn would start it, and it stays.
    resource_tracker.ensure_running()
    with no_new_descriptors():
        yield


@pytest.fixture(params=["memfd", "sysv"])
def live(request: pytest.FixtureRequest) -> Iterator[LiveSegment]:
    segment = LiveSegment(SIZE, backend=request.param)
    yield segment
    gc.collect()
    segment.close()


def test_starts_as_zeros(live: LiveSegment) -> None:
    assert live.size == len(live) == SIZE
    assert live[:] == bytes(SIZE)


def test_is_read_only(live: LiveSegment) -> None:
    assert memoryview(live).readonly
    assert not live.array("u1").flags.writeable
    with pytest.raises(TypeError):
        live[0] = 1
    with pytest.raises(TypeError):
        live[0:2] = b"ab"


def test_writes_are_seen_at_once(live: LiveSegment) -> None:
    with live.mirror() as mirror, mirror.map() as mapping, live.unprotected() as rw:
        assert (mirror.size, mapping.size, rw.size) == (SIZE, SIZE, SIZE)
        rw[0:3] = b"abc"
        rw[-1] = 9
        rw.array("u4", offset=8)[1] = 77
        assert live[0:3] == mapping[0:3] == rw[0:3] == b"abc"
        assert live[-1] == mapping[-1] == 9
        assert live.array("u4")[3] == mapping.array("u4")[3] == 77
        assert memoryview(mapping).readonly
        assert not memoryview(rw).readonly


def test_mirror_outlives_the_segment(live: LiveSegment) -> None:
    with live.unprotected() as rw:
        rw[0:2] = b"hi"
    mirror = live.mirror()
    mapping = mirror.map()
    live.close()
    assert mapping[0:2] == b"hi"
    mirror.close()
    assert mirror.closed
    assert mapping[0:2] == b"hi"
    mirror.close()
    for misuse in (mirror.map, mirror.verify):
        with pytest.raises(ValueError, match="closed"):
            misuse()
    assert mirror.size == SIZE
    mapping.close()


def test_verify() -> None:
    with LiveSegment(SIZE) as live, live.mirror() as mirror:
        mirror.verify()
        fd = os.open(f"/proc/self/fd/{mirror._fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            for attempt in (
                lambda: os.pwrite(fd, b"y", 0),
                lambda: os.ftruncate(fd, 0),
                lambda: os.ftruncate(fd, 1 << 20),
            ):
                with pytest.raises(PermissionError):
                    attempt()
        finally:
            os.close(fd)
    with (
        LiveSegment(SIZE, "sysv") as live,
        live.mirror() as mirror,
        pytest.raises(NotImmutable, match="System V"),
    ):
        mirror.verify()


def test_addresses(live: LiveSegment) -> None:
    ro, rw = live.ro_address, live.rw_address
    assert ro != rw
    for offset in (0, 1, SIZE - 1):
        assert live.to_ro(rw + offset) == ro + offset
        assert live.to_rw(ro + offset) == rw + offset
        assert live.to_ro(ro + offset) == ro + offset
        assert live.to_rw(rw + offset) == rw + offset
        assert live.to_rw(live.to_ro(rw + offset)) == rw + offset
    for outside in (ro - 1, ro + SIZE, rw - 1, rw + SIZE, 0, -1, 1 << 64):
        for convert in (live.to_ro, live.to_rw):
            with pytest.raises(ValueError, match="neither"):
                convert(outside)
    with pytest.raises(TypeError):
        live.to_ro(1.5)  # type: ignore[arg-type]
    assert live.array("u1").ctypes.data == ro
    with live.unprotected() as writable:
        assert writable.address == rw
        ctypes.memset(live.to_rw(ro + 5), 3, 2)
        assert live[4:8] == b"\0\3\3\0"


@pytest.mark.parametrize("backend", ["memfd", "sysv"])
def test_a_stray_write_faults(backend: Any) -> None:
    live = LiveSegment(SIZE, backend)
    mirror = live.mirror()
    mapping = mirror.map()
    for address in (live.ro_address, mapping.address):
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            ctypes.memset(address, 1, 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
    assert live[0] == 0
    for closing in (mapping, mirror, live):
        closing.close()


def test_views_at_the_end_of_the_block(live: LiveSegment) -> None:
    with pytest.raises(BufferError), live.unprotected() as rw:
        view = rw.array("u1")
    # The lock is free all the same.
    with live.unprotected() as again:
        again[0] = 5
    view[1] = 6
    assert live[0:2] == b"\5\6"
    with pytest.raises(BufferError):
        live.close()
    del view
    gc.collect()
    rw.close()
    with pytest.raises(ValueError, match="closed"):
        memoryview(rw)


def test_an_exception_in_the_block_goes_first(live: LiveSegment) -> None:
    with pytest.raises(KeyError) as caught, live.unprotected() as rw:  # noqa: PT012 - see the name
        view = rw.array("u1")
        raise KeyError
    assert any("stayed open" in note for note in caught.value.__notes__)
    del view, caught
    gc.collect()
    with live.unprotected():
        pass


def test_the_view_ends_with_the_block(live: LiveSegment) -> None:
    with live.unprotected() as rw:
        pass
    for misuse in (lambda: rw[0], lambda: rw.array("u1"), lambda: memoryview(rw), lambda: rw.address):
        with pytest.raises(ValueError, match="closed"):
            misuse()


def test_one_thread_cannot_nest(live: LiveSegment) -> None:
    with live.unprotected() as rw:
        with pytest.raises(RuntimeError, match="already"), live.unprotected():
            pass
        rw[0] = 1
    with live.unprotected() as rw:
        rw[0] = 2


def test_other_threads_wait(live: LiveSegment) -> None:
    def add() -> None:
        for _ in range(200):
            with live.unprotected() as rw:
                rw[0:4] = (int.from_bytes(rw[0:4], "little") + 1).to_bytes(4, "little")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int.from_bytes(live[0:4], "little") == 800


def test_snapshot(live: LiveSegment) -> None:
    with live.unprotected() as rw:
        rw[SIZE - 3 :] = b"one"
        inside = live.snapshot()
        rw[SIZE - 3 :] = b"two"
    after = live.snapshot()
    with live.unprotected() as rw:
        rw[SIZE - 3 :] = b"end"
    for snapshot, wanted in ((inside, b"one"), (after, b"two")):
        snapshot.verify()
        assert snapshot.size == SIZE
        with snapshot.map() as mapping:
            assert mapping[:] == bytes(SIZE - 3) + wanted
    assert inside.diff(after) == [(8192, 12288)]


def test_a_snapshot_waits_for_writers(live: LiveSegment) -> None:
    inside, leave = threading.Event(), threading.Event()
    taken: list[bytes] = []

    def write() -> None:
        with live.unprotected() as rw:
            rw[0] = 1
            inside.set()
            leave.wait()
            rw[1] = 1

    def take() -> None:
        with live.snapshot() as snapshot, snapshot.map() as mapping:
            taken.append(mapping[0:2])

    threads = [threading.Thread(target=write), threading.Thread(target=take)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    threads[1].join(0.1)
    assert not taken
    leave.set()
    for thread in threads:
        thread.join()
    assert taken == [b"\1\1"]


def test_a_forked_child_cannot_write(live: LiveSegment) -> None:
    with live.unprotected() as rw:
        rw[0] = 7
        # Forked inside the block: the child's lock is free, its writable alias is not there.
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with pytest.raises(ForkedError), live.unprotected():
                    pass
                assert live[0] == 7
                code = 0
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with live.unprotected() as rw:
        rw[0] = 8


def test_closing(live: LiveSegment) -> None:
    view = memoryview(live)
    with pytest.raises(BufferError):
        live.close()
    view.release()
    with live.unprotected(), pytest.raises(BufferError):
        live.close()
    live.close()
    live.close()
    assert live.closed
    for misuse in (
        live.mirror,
        live.snapshot,
        lambda: live.to_ro(1),
        lambda: live[0],
        lambda: live.ro_address,
    ):
        with pytest.raises(ValueError, match="closed"):
            misuse()
    with pytest.raises(ValueError, match="closed"), live.unprotected():
        pass
    assert "closed" in repr(live)


def test_backends() -> None:
    with pytest.raises(ValueError, match="backend"):
        LiveSegment(10, backend="file")  # type: ignore[arg-type]


def test_system_v_memory_goes_away_with_its_last_user() -> None:
    def segments() -> set[str]:
        with open("/proc/sysvipc/shm", encoding="ascii") as lines:
            return {line.split()[1] for line in lines}

    before = segments()
    live = LiveSegment(SIZE, "sysv")
    assert live.shmid >= 0
    mirror = live.mirror()
    mapping = mirror.map()
    live.close()
    assert mapping[0] == 0
    mapping.close()
    assert segments() == before
    with pytest.raises((OSError, quire.QuireError)):
        mirror.map()


def watch(mirror: quire.Mirror, connection: Any) -> None:
    with mirror, mirror.map() as mapping:
        while (offset := connection.recv()) is not None:
            connection.send(mapping[offset])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_sees_writes_at_once(live: LiveSegment, method: str) -> None:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    with live.mirror() as mirror, ours, theirs:
        child = context.Process(target=watch, args=(mirror, theirs))
        child.start()
        for offset in (0, 4096, SIZE - 1):
            with live.unprotected() as rw:
                rw[offset] = offset % 255 + 1
            ours.send(offset)
            assert ours.recv() == offset % 255 + 1
        ours.send(None)
        child.join()
        assert child.exitcode == 0
        child.close()
