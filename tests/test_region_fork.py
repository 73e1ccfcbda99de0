"""Regions and new processes: forks from anywhere, started programs, a clone that nobody prepares."""

import ctypes
import gzip
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import zstdfiles
from support import PAGE, expect_signal, fork, pattern, run_forked, wait

import quire
from quire import sources

WINDOW = 65536
SIZE = 20 * WINDOW
DATA = pattern(SIZE, 31).tobytes()
MAPPED = ["thread", "signal", "sigsegv"]


@pytest.fixture(params=MAPPED)
def faults(request: pytest.FixtureRequest) -> str:
    return request.param


def whole(region: quire.Region) -> None:
    assert bytes(region) == DATA


@pytest.mark.parametrize("shared", [False, True])
def test_a_child_and_its_child_read_what_is_filled_and_what_is_not(faults: str, shared: bool) -> None:
    with quire.Region(DATA, faults=faults, shared=shared) as region:
        assert region[:WINDOW] == DATA[:WINDOW]

        def child() -> None:
            assert region[3 * WINDOW] == DATA[3 * WINDOW]
            run_forked(lambda: whole(region))
            region.discard()
            whole(region)
            assert region.stats.fills > 0
            region.close()

        run_forked(child)
        whole(region)


@pytest.mark.parametrize("shared", [False, True])
def test_forking_while_others_touch_read_pin_and_discard(faults: str, shared: bool) -> None:
    done = threading.Event()
    failures: list[BaseException] = []
    with quire.Region(DATA, faults=faults, shared=shared) as region:

        def guarded(work) -> threading.Thread:
            def run() -> None:
                try:
                    while not done.is_set():
                        work()
                except BaseException as error:  # noqa: BLE001 - raised by the main thread
                    failures.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        def pin() -> None:
            with region.pin(5 * WINDOW, 3 * WINDOW) as view:
                assert view == DATA[5 * WINDOW : 8 * WINDOW]

        def read() -> None:
            assert region.read(7, SIZE - 9) == DATA[7:-2]

        workers = [guarded(work) for work in (lambda: whole(region), region.discard, read, pin)]
        for _ in range(15):
            assert wait(fork(lambda: whole(region))) == 0
        done.set()
        for worker in workers:
            worker.join()
        assert not failures, failures


def test_a_thread_may_fork(faults: str) -> None:
    codes = []
    with quire.Region(DATA, faults=faults) as region:
        thread = threading.Thread(target=lambda: codes.append(wait(fork(lambda: whole(region)))))
        thread.start()
        thread.join()
    assert codes == [0]


def report(region: quire.Region, results) -> None:
    results.put(bytes(region) == DATA)


def test_multiprocessing_by_fork(faults: str) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with quire.Region(DATA, faults=faults) as region:
        children = [context.Process(target=report, args=(region, results)) for _ in range(3)]
        for child in children:
            child.start()
        assert [results.get(timeout=60) for _ in children] == [True] * 3
        for child in children:
            child.join()
            assert child.exitcode == 0


def test_programs_are_started_as_ever(faults: str) -> None:
    """By vfork, posix_spawn, or exec after a fork; no descriptor of a region travels."""
    listing = "import os; os.system(f'ls -l /proc/{os.getpid()}/fd')"
    with quire.Region(DATA, faults=faults, shared=True) as region:
        assert region[0] == DATA[0]
        for options in ({}, {"close_fds": False}, {"preexec_fn": lambda: None, "close_fds": False}):
            done = subprocess.run(
                [sys.executable, "-c", listing],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
                **options,
            )
            assert "userfaultfd" not in done.stdout
            assert "quire-region" not in done.stdout
        pid = os.posix_spawn("/bin/true", ["true"], os.environ)
        assert wait(pid) == 0
        pid = fork(lambda: os.execv("/bin/true", ["true"]))
        assert wait(pid) == 0
        whole(region)


@pytest.mark.parametrize("filled", [False, True])
def test_a_child_that_nobody_prepares_dies_rather_than_reads_zeros(faults: str, filled: bool) -> None:
    number = {"x86_64": 56, "aarch64": 220}.get(platform.machine())
    if number is None:
        pytest.skip(f"the number of clone is not known on {platform.machine()}")
    libc = ctypes.PyDLL(None)
    with quire.Region(DATA, faults=faults, discard="never") as region:
        if filled:
            whole(region)

        def touch() -> None:
            # In a child of the child, so that signals are as they are by default there.
            pid = libc.syscall(number, int(signal.SIGCHLD), 0, 0, 0, 0)
            if pid == 0:
                ctypes.string_at(region.address + 5 * WINDOW, PAGE)
                os._exit(0)
            code = wait(pid)
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
            os._exit(99)

        expect_signal(touch, signal.SIGSEGV)
        whole(region)


def test_a_child_closes_what_it_inherited(faults: str) -> None:
    with quire.Region(DATA, faults=faults) as region:
        whole(region)

        def child() -> None:
            region.close()
            with quire.Region(DATA, faults=faults) as other:
                whole(other)

        run_forked(child)
        whole(region)


@pytest.mark.parametrize("kind", ["gzip", "zstandard", "deflated"])
def test_a_child_may_use_a_source_that_others_were_reading(
    faults: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder has locks, which nobody would give back in the child if the fork came in the middle."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "packed"
    target = path
    if kind == "deflated":
        target = f"{path}!/m"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("m", DATA)
    else:
        path.write_bytes(gzip.compress(DATA, 1) if kind == "gzip" else zstdfiles.frame(DATA))
    source = sources.open_source(target)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            source.read(WINDOW, PAGE)
            with quire.Region(source, faults="eager") as eager:
                assert eager[0] == DATA[0]

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    with quire.Region(source, faults=faults) as region:
        for _ in range(12):
            assert wait(fork(lambda: whole(region))) == 0
    done.set()
    for reader in readers:
        reader.join()
    source.close()
