"""quire.maps against what the kernel shows of real processes."""

import os
import subprocess
import sys
import threading

import psutil
import pytest
from processes import child, proc_maps

import quire
import quire.process
from quire.process import Kind, Maps

PAGE = quire.PAGE_SIZE


def line_of(vma: quire.process.VMA) -> bytes:
    """The line of maps that a VMA was read from, if its name has no newline."""
    where = f"{vma.start:08x}-{vma.end:08x} {vma.protection} {vma.offset:08x}"
    head = f"{where} {vma.major:02x}:{vma.minor:02x} {vma.inode} "
    return (head.encode().ljust(73) + vma.name).rstrip() if vma.name else head.encode().rstrip()


@pytest.mark.parametrize("detail", ["maps", "smaps"])
def test_every_line_of_the_kernel_is_there_and_no_other(detail: quire.process.Detail) -> None:
    with child("ready('x')") as (process, _):
        found = quire.maps(process.pid, detail=detail)
        assert [line_of(vma) for vma in found] == [line.rstrip() for line in proc_maps(process.pid)]
        assert found.partial == ()
        assert found.pid == process.pid
        assert found.process.command


def test_figures_are_those_of_another_reader() -> None:
    with child("a = map_memory(64 * PAGE); touch(a, 10); ready(a)") as (process, _):
        ours = quire.maps(process.pid)
        theirs = psutil.Process(process.pid).memory_maps(grouped=False)
    assert len(ours) == len(theirs)
    for vma, row in zip(ours, theirs, strict=True):
        start, _, end = row.addr.partition("-")
        assert (vma.start, vma.end) == (int(start, 16), int(end, 16))
        assert (vma.resident, vma.proportional, vma.swapped) == (row.rss, row.pss, row.swap)
        assert (vma.referenced, vma.anonymous) == (row.referenced, row.anonymous)
        assert vma.unique == row.private_clean + row.private_dirty
        assert vma.dirty == row.shared_dirty + row.private_dirty


def test_all_keys_of_the_kernel_are_kept() -> None:
    with child("ready('x')") as (process, _):
        found = quire.maps(process.pid)
        with open(f"/proc/{process.pid}/smaps", "rb") as file:
            first = file.read().split(b"\n")
    keys = [line.partition(b":")[0].decode() for line in first[1:] if line[:1].isupper()]
    count = len(found[0].counters) + len(found[0].texts)
    assert keys[:count] == [*found[0].keys, *dict(found[0].texts)]
    assert found[0].flags[:1] == ("rd",)


def test_what_one_allocation_shows() -> None:
    body = "a = map_memory(64 * PAGE, flags=0x4022); libc.madvise(a, 64 * PAGE, 15); touch(a, 10); ready(a)"
    with child(body) as (process, words):
        found = quire.maps(process.pid)
    vma = found.at(int(words[0]))
    assert vma is not None
    assert vma.kind is Kind.PRIVATE
    assert vma.anonymous is not None
    assert vma.anonymous >= 10 * PAGE
    assert vma.name == b""
    assert vma.path is None
    assert vma.is_private


def test_kinds() -> None:
    body = """
import tempfile
memfd = os.memfd_create("thing"); os.ftruncate(memfd, PAGE)
file = tempfile.TemporaryFile(dir="/tmp"); file.truncate(PAGE)
ready(map_memory(PAGE, flags=1, fd=memfd), map_memory(PAGE, prot=0), map_memory(PAGE, flags=0x21),
      map_memory(PAGE, prot=1, flags=2, fd=file.fileno()), map_memory(PAGE, 3))
"""
    with child(body) as (process, words):
        found = quire.maps(process.pid)
    kinds = [vma.kind for word in words if (vma := found.at(int(word)))]
    assert kinds == [Kind.SHAREABLE, Kind.RESERVED, Kind.SHAREABLE, Kind.MAPPED_FILE, Kind.PRIVATE]
    by_name = {vma.name: vma.kind for vma in found}
    assert by_name[b"[stack]"] is Kind.STACK
    assert by_name[b"[heap]"] is Kind.HEAP
    assert by_name[b"[vdso]"] is Kind.KERNEL
    images = {vma.name for vma in found if vma.kind is Kind.IMAGE}
    assert any(b"libc.so" in name for name in images)
    # All parts of a library, not its code alone.
    assert {vma.protection for vma in found if b"libc.so" in vma.name} >= {"r--p", "r-xp", "rw-p"}
    totals = found.totals()
    assert sum(total.vmas for total in totals.values()) == len(found)
    assert totals[Kind.RESERVED].committed == 0
    assert totals[Kind.PAGE_TABLES].resident


def test_own_memory_is_named() -> None:
    with quire.Segment(1 << 20) as segment:
        memoryview(segment)[:4] = b"data"
        vma = quire.maps().at(segment.address)
        assert vma is not None
        assert vma.kind is Kind.QUIRE
        assert vma.name == b"/memfd:quire-segment (deleted)"
        assert vma.is_deleted
        assert vma.path == "/memfd:quire-segment"


def test_stacks_of_threads() -> None:
    body = """
pointers = []
def wait():
    here = ctypes.c_int()
    libc.pthread_self.restype = ctypes.c_void_p
    pointers.append(libc.pthread_self())
    gate.wait(); ended.wait()
gate = threading.Barrier(4); ended = threading.Event()
for _ in range(3): threading.Thread(target=wait, daemon=True).start()
gate.wait()
ready(*pointers)
"""
    with child(body) as (process, words):
        found = quire.maps(process.pid)
    assert len(words) == 3
    for word in words:
        # glibc has a thread's descriptor at the top of its stack.
        vma = found.at(int(word))
        assert vma is not None
        assert vma.kind is Kind.STACK
    assert found.process.threads == 4


def test_the_number_of_a_thread_gives_its_process() -> None:
    gate = threading.Event()
    numbers: list[int] = []
    ready = threading.Event()

    def wait() -> None:
        numbers.append(threading.get_native_id())
        ready.set()
        gate.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    try:
        assert numbers[0] != os.getpid()
        assert quire.maps(numbers[0], detail="maps").pid == os.getpid()
    finally:
        gate.set()
        thread.join()


@pytest.mark.parametrize("wrong", [0, -1, "1", None, 1.5, True])
def test_misuse(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        quire.maps(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="detail"):
        quire.maps(detail="all")  # type: ignore[arg-type]


def test_nothing_there() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(ProcessLookupError, match=f"no process {process.pid}"):
        quire.maps(process.pid)


def test_lookup() -> None:
    found = quire.maps(detail="maps")
    assert isinstance(found, Maps)
    for vma in found:
        assert found.at(vma.start) is vma
        assert found.at(vma.end - 1) is vma
        assert found.overlapping(vma.start, vma.end) == (vma,)
    assert found.at(0) is None
    assert found.at(2**64 - 1) is None
    assert found.overlapping(0, 2**64) == tuple(found)
    assert found[0].resident is None
    assert found[0].flags == ()
