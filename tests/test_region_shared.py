"""Regions that processes share: all may fill and discard, none is hurt when another dies."""

import ctypes
import multiprocessing
import os
import random
import signal
from collections.abc import Callable

import pytest
from support import PAGE, descriptor_count, fork, pattern, wait

import quire
from quire import region as regions

WINDOW = 65536
SIZE = 30 * WINDOW
DATA = pattern(SIZE, 61).tobytes()
# Sharing, the sigsegv backend does not notice when pages are taken away, so it does not take any.
NOTICING = ["thread", "signal"]
F_ADD_SEALS, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 1033, 1, 2, 4, 8
FIXED = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW


def busy(region: quire.Region, seed: int, steps: int) -> None:
    """Touch, read and discard at random; every byte must be right."""
    rng = random.Random(seed)
    for _ in range(steps):
        at = rng.randrange(SIZE - 3 * WINDOW)
        assert region[at : at + 2 * WINDOW] == DATA[at : at + 2 * WINDOW]
        assert region.read(at, 100) == DATA[at : at + 100]
        if rng.random() < 0.3:
            region.discard(at, 3 * WINDOW)


def busy_until_killed(region: quire.Region, started) -> None:
    started.set()
    while True:
        busy(region, os.getpid(), 100)


@pytest.mark.parametrize("faults", ["thread", "signal", "sigsegv"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_all_fill_and_discard_at_once(faults: str, method: str) -> None:
    context = multiprocessing.get_context(method)
    with quire.Region(DATA, shared=True, faults=faults, window_bytes=4 * PAGE) as region:
        children = [context.Process(target=busy, args=(region, seed, 150)) for seed in range(3)]
        for child in children:
            child.start()
        busy(region, 99, 150)
        for child in children:
            child.join()
            assert child.exitcode == 0


@pytest.mark.parametrize("faults", NOTICING)
def test_a_process_that_is_killed_hurts_no_other(faults: str) -> None:
    context = multiprocessing.get_context("fork")
    rng = random.Random(1)
    with quire.Region(DATA, shared=True, faults=faults, window_bytes=4 * PAGE) as region:
        for turn in range(12):
            started = context.Event()
            victim = context.Process(target=busy_until_killed, args=(region, started))
            victim.start()
            started.wait(60)
            busy(region, turn, rng.randrange(20))
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            assert victim.exitcode == -signal.SIGKILL
            busy(region, turn, 10)
        assert bytes(region) == DATA


def test_the_pages_are_there_once() -> None:
    """What one process has filled, another finds, and nobody's own memory grows by it."""
    with quire.Region(DATA, shared=True, faults="thread") as region:
        assert bytes(region) == DATA

        def child() -> None:
            assert bytes(region) == DATA
            assert region.stats.fills == 0
            assert os.fstat(region.shared_fileno()).st_blocks * 512 == SIZE

        assert wait(fork(child)) == 0


def memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("wrong", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    libc = ctypes.CDLL(None, use_errno=True)
    if seals:
        assert libc.fcntl(fd, F_ADD_SEALS, seals) == 0
    return fd


WRONG: dict[str, Callable[[], int]] = {
    "too short": lambda: memfd(SIZE - PAGE, FIXED),
    "too long": lambda: memfd(SIZE + PAGE, FIXED),
    "may shrink": lambda: memfd(SIZE, FIXED & ~F_SEAL_SHRINK),
    "may grow": lambda: memfd(SIZE, FIXED & ~F_SEAL_GROW),
    "may be sealed": lambda: memfd(SIZE, FIXED & ~F_SEAL_SEAL),
    "no seals": lambda: memfd(SIZE, 0),
    "cannot be filled": lambda: memfd(SIZE, FIXED | F_SEAL_WRITE),
    "a file": lambda: os.open(__file__, os.O_RDONLY | os.O_CLOEXEC),
    "a device": lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC),
    "a pipe": lambda: os.pipe()[0],
}


class Descriptor:
    """What a hostile peer would send in place of the file of a region."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> int:
        return self.fd


@pytest.mark.parametrize("faults", ["thread", "signal", "sigsegv", "eager"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_refused_and_closed(wrong: str, faults: str) -> None:
    # So that a pipe's other end, which the test itself leaves open, is not counted.
    made = WRONG[wrong]()
    before = descriptor_count()
    with quire.BytesSource(DATA) as source, pytest.raises(quire.Malformed, match="shared region"):
        regions._unpickle(source, Descriptor(made), WINDOW, "never", faults, False, None)
    assert descriptor_count() == before - 1
