"""Regions among threads: the GIL, signals, small stacks, and the end of the interpreter."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import PAGE, TESTS, compiled, nothing_left, pattern, vma_count

import quire

WINDOW = 65536
SIZE = 40 * WINDOW
DATA = pattern(SIZE, 41).tobytes()
MAPPED = ["thread", "signal", "sigsegv"]
Make = Callable[[], quire.Region]


@pytest.fixture(params=MAPPED)
def faults(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["quick", "slow"])
def make(
    request: pytest.FixtureRequest, faults: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Make:
    """Make a region whose source the toucher itself can ask, or not."""
    if request.param == "quick":
        return lambda: quire.Region(DATA, faults=faults)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m", DATA)
    return lambda: quire.open(f"{path}!/m", faults=faults)


@pytest.fixture
def spinning() -> Iterator[None]:
    """Threads that want the GIL all the time."""
    done = threading.Event()

    def spin() -> None:
        while not done.is_set():
            sum(range(100))

    threads = [threading.Thread(target=spin) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    done.set()
    for thread in threads:
        thread.join()


def holding_the_gil(region: quire.Region) -> None:
    """Touch with the GIL held: ctypes.PyDLL does not let go of it."""
    memchr = ctypes.PyDLL(None).memchr
    memchr.restype = ctypes.c_void_p
    memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    for at in range(0, SIZE, WINDOW):
        assert memchr(region.address + at, DATA[at], 1) == region.address + at
    assert memchr(region.address, 0, SIZE) is None


@pytest.mark.usefixtures("spinning")
def test_a_thread_that_holds_the_gil_may_touch(make: Make) -> None:
    with make() as region:
        holding_the_gil(region)
        region.discard()
        others = [threading.Thread(target=holding_the_gil, args=(region,)) for _ in range(3)]
        for other in others:
            other.start()
        for other in others:
            other.join()
        assert bytes(region) == DATA


def test_regions_end_while_others_are_touched(faults: str) -> None:
    """What a source holds is given back by whoever uses it last, who may not wait for the GIL."""
    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            with quire.Region(DATA[: 3 * WINDOW], faults=faults, window_bytes=PAGE) as region:
                region.prefetch(wait=False)
                assert region[WINDOW] == DATA[WINDOW]

    threads = [threading.Thread(target=come_and_go) for _ in range(2)]
    for thread in threads:
        thread.start()
    with quire.Region(DATA, faults=faults) as region:
        for _ in range(10):
            holding_the_gil(region)
            region.discard()
    done.set()
    for thread in threads:
        thread.join()


def test_one_page_may_be_touched_any_number_of_times(make: Make) -> None:
    with make() as region:
        for _ in range(1500):
            assert region[5] == DATA[5]
            region.discard(0, WINDOW)


def test_a_store_ends_the_process_though_others_touch(faults: str) -> None:
    script = f"""
import ctypes, faulthandler, threading, quire
faulthandler.disable()
data = bytes(range(1, 101)) * 10000
region = quire.Region(data, faults={faults!r})
def touch():
    while True:
        region.discard()
        bytes(region)
threading.Thread(target=touch, daemon=True).start()
store = ctypes.c_char.from_address(region.address + 500000)
print("storing", flush=True)
store.value = b"x"
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60, cwd=TESTS
    )
    assert done.stdout == "storing\n"
    assert done.returncode == -signal.SIGSEGV, done.stderr


def test_signals_arrive_while_pages_are_filled(make: Make) -> None:
    ticks = []
    before = signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with make() as region:
            while len(ticks) < 20:
                holding_the_gil(region)
                assert region.read(0, SIZE) == DATA
                region.discard()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_interrupts_end_loops_of_touches(faults: str) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def loop(region: quire.Region) -> None:
        while True:
            region.discard()
            for at in range(0, SIZE, WINDOW):
                assert region[at] == DATA[at]

    with quire.Region(DATA, faults=faults) as region:
        assert region[0] == DATA[0]
        timer = threading.Timer(0.05, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            loop(region)
        timer.join()


def test_a_signal_that_the_program_waits_for_is_not_taken_by_threads_of_regions(faults: str) -> None:
    """Blocked after the threads were started, it ends the process if one of them would take it."""
    script = f"""
import os, signal, quire
region = quire.Region(b"x" * 100000, faults={faults!r}, discard="pressure")
assert region[0] == ord("x")
region.prefetch(wait=False)
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR1, signal.SIGTERM}})
for number in (signal.SIGUSR1, signal.SIGTERM):
    os.kill(os.getpid(), number)
    assert signal.sigwait({{number}}) == number
print("waited")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60, cwd=TESTS
    )
    assert (done.returncode, done.stdout) == (0, "waited\n"), done.stderr


C = r"""
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>

struct job { const unsigned char *at; size_t len, step; unsigned long sum; int errno_kept; };

static void *touch(void *arg) {
    struct job *job = arg;
    errno = 4321;
    for (size_t i = 0; i < job->len; i += job->step)
        job->sum += job->at[i];
    job->errno_kept = errno == 4321;
    return 0;
}

static void *touch_with_alternate_stack(void *arg) {
    stack_t stack = { .ss_sp = malloc(32768), .ss_size = 32768 };
    sigaltstack(&stack, 0);
    touch(arg);
    stack_t none = { .ss_flags = SS_DISABLE };
    sigaltstack(&none, 0);
    free(stack.ss_sp);
    return 0;
}

static struct job *current;
static void in_handler(int number) { (void)number; touch(current); }

/* In a handler that runs on an alternate stack. */
static void *touch_in_handler(void *arg) {
    stack_t stack = { .ss_sp = malloc(65536), .ss_size = 65536 };
    sigaltstack(&stack, 0);
    struct sigaction action = { .sa_handler = in_handler, .sa_flags = SA_ONSTACK }, old;
    sigaction(SIGUSR2, &action, &old);
    current = arg;
    pthread_kill(pthread_self(), SIGUSR2);
    sigaction(SIGUSR2, &old, 0);
    return 0;
}

/* The sum of every step-th byte, in a thread with a small stack; -1 if errno was changed. */
long sum_in_thread(const unsigned char *at, size_t len, size_t step, size_t stack_bytes, int how) {
    void *(*const ways[])(void *) = { touch, touch_with_alternate_stack, touch_in_handler };
    struct job job = { at, len, step, 0, 0 };
    pthread_attr_t attr;
    pthread_t thread;
    pthread_attr_init(&attr);
    if (pthread_attr_setstacksize(&attr, stack_bytes) || pthread_create(&thread, &attr, ways[how], &job))
        return -2;
    pthread_join(thread, 0);
    return job.errno_kept ? (long)job.sum : -1;
}
"""


@pytest.mark.parametrize("way", [0, 1, 2])
def test_small_and_alternate_stacks_suffice_and_errno_is_kept(make: Make, tmp_path: Path, way: int) -> None:
    library = compiled(tmp_path, C)
    call = library.sum_in_thread
    call.restype = ctypes.c_long
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    with make() as region:
        assert call(region.address, SIZE, 997, 65536, way) == sum(DATA[::997])


def test_the_interpreter_ends_with_regions_open_and_readahead_under_way(faults: str) -> None:
    script = f"""
import threading, quire
data = bytes(range(1, 101)) * 100000
regions = [quire.Region(data, faults={faults!r}) for _ in range(5)]
arrays = [region.array("u1") for region in regions]
def touch(region):
    while True:
        region.discard()
        bytes(region)
for region in regions[:3]:
    assert region[0] == 1
    region.prefetch(wait=False)
    threading.Thread(target=touch, args=(region,), daemon=True).start()
print("ends")
"""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60, cwd=TESTS
        )
        assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr


def test_nothing_is_left_of_closed_regions(make: Make) -> None:
    for _ in range(2):
        with make() as region:
            assert bytes(region) == DATA
    mappings = vma_count()
    with nothing_left():
        for _ in range(30):
            with make() as region:
                assert region[WINDOW] == DATA[WINDOW]
    # The allocator may have made one for itself.
    assert vma_count() <= mappings + 3
