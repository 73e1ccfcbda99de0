"""diff and watch against processes that change on demand."""

import subprocess
import sys

import pytest
from leaks import no_new_descriptors
from processes import PRELUDE, child

import quire
from quire.process import Maps, diff, watch
from quire.process.changes import _pause_s

PAGE = quire.PAGE_SIZE

STEPS = """
a = map_memory(16 * PAGE, flags=0x4022); libc.madvise(a, 16 * PAGE, 15)
guard = map_memory(PAGE, prot=0)
b = map_memory(8 * PAGE, prot=1)
gone = map_memory(8 * PAGE, prot=4)
ready(a, b, gone)
sys.stdin.readline()
touch(a, 5)
libc.mprotect(b, 8 * PAGE, 3)
libc.munmap(gone, 8 * PAGE)
memfd = os.memfd_create("new"); os.ftruncate(memfd, PAGE)
new = map_memory(PAGE, flags=1, fd=memfd)
ready(new)
sys.stdin.readline()
libc.munmap(a + 8 * PAGE, 8 * PAGE)
ready("x")
"""


def test_what_changed() -> None:
    with child(STEPS) as (process, words):
        a, b, gone = map(int, words)
        assert process.stdin
        assert process.stdout
        one = quire.maps(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        new = int(process.stdout.readline())
        two = quire.maps(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        three = quire.maps(process.pid)
    first = diff(one, two)
    assert not first.is_other_process
    assert any(vma.start <= new < vma.end and b"memfd:new" in vma.name for vma in first.added)
    assert any(vma.start <= gone < vma.end for vma in first.removed)
    protected = [change for change in first.changed if change.before.start <= b < change.before.end]
    assert [change.after.protection for change in protected] == ["rw-p"]
    assert protected[0].has_new_protection
    touched = [change for change in first.changed if change.after.start <= a < change.after.end]
    assert [change.resident for change in touched] == [5 * PAGE]
    assert [change.grown for change in touched] == [0]
    assert first.resident is not None
    assert first.resident >= 5 * PAGE
    second = diff(two, three)
    shrunk = [change for change in second.changed if change.after.start <= a < change.after.end]
    assert [change.grown for change in shrunk] == [-8 * PAGE]
    assert second.virtual <= -8 * PAGE


def test_nothing_changed() -> None:
    found = quire.maps()
    same = diff(found, found)
    assert same == ((), (), (), 0, 0, False)


def test_every_vma_is_told_once() -> None:
    """Of two random readings of one process the parts add up to the whole."""
    with child(STEPS) as (process, _):
        one = quire.maps(process.pid)
    two = quire.maps()
    found = diff(one, two)
    assert found.is_other_process
    after = [*found.added, *(change.after for change in found.changed)]
    assert len(after) == len(set(after))
    assert len(two) - len(one) == len(found.added) - len(found.removed)
    assert found.virtual == sum(vma.size for vma in two) - sum(vma.size for vma in one)


def test_watch_ends_with_the_process() -> None:
    """Without an interval it would go on for ever; with a long one, waiting is cut short by the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + "ready('x'); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdin
    process.stdout.readline()
    try:
        with no_new_descriptors():
            samples: list[Maps] = []
            for sample in watch(process.pid, 3600.0):
                samples.append(sample)
                process.kill()
            assert len(samples) == 1
            for sample in watch(process.pid, 0):
                assert len(sample) == 0, "a zombie has no memory"
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()
    with pytest.raises(ProcessLookupError):
        next(watch(process.pid, 1))


def test_watch_does_not_drift() -> None:
    """Readings begin at multiples of the interval; those that a slow reader misses are left out."""
    for now, wait in ((100.0, 10.0), (103.0, 7.0), (110.0, 10.0), (119.5, 0.5), (143.0, 7.0)):
        assert _pause_s(100.0, 10.0, now) == pytest.approx(wait)
    assert _pause_s(100.0, 0.0, 103.0) == 0.0


def test_watch_left_early_leaves_nothing_open() -> None:
    with child("ready('x')") as (process, _), no_new_descriptors():
        for _ in watch(process.pid, 0):
            break
        assert len(list(watch(process.pid, 0, samples=3))) == 3


def test_watch_misuse() -> None:
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="interval"):
            watch(1, wrong)


def test_watch_is_interrupted_by_signals() -> None:
    """Waiting is in the kernel, and Ctrl-C reaches it."""
    code = """
import os, signal
from quire.process import watch
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    for _ in watch(os.getppid(), 3600.0, detail="maps"): pass
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "interrupted\n"
