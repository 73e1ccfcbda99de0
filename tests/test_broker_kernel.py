"""What the broker relies on the kernel for. Each fails where the kernel does otherwise."""

import ctypes
import fcntl
import mmap
import os
import signal
import socket
import threading

import numpy as np
import pytest
from support import PAGE

from quire.broker import hugepages, objects
from quire.broker.area import Area

FUTURE_WRITE = 0x10
ALL = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
SIZE = 64 * PAGE


@pytest.fixture
def memfd():
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SIZE)
    yield descriptor
    os.close(descriptor)


def allocated(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def status_of_touch(address: int) -> int:
    """The wait status of a forked child that reads one byte."""
    child = os.fork()
    if child == 0:
        ctypes.string_at(address, 1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_sealed_against_growing_it_shrinks_and_never_grows_again(memfd: int) -> None:
    os.posix_fallocate(memfd, 0, SIZE)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | FUTURE_WRITE)
    with mmap.mmap(memfd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        assert mapping[5] == 0
        os.ftruncate(memfd, 0)
        assert allocated(memfd) == 0
        for grow in (lambda: os.ftruncate(memfd, PAGE), lambda: os.posix_fallocate(memfd, 0, PAGE)):
            with pytest.raises(PermissionError):
                grow()
        child = os.fork()
        if child == 0:
            mapping[5]
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS


def test_holes_of_a_sealed_memfd_can_be_filled(memfd: int) -> None:
    os.pwrite(memfd, b"x", PAGE)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, ALL)
    assert allocated(memfd) == PAGE
    os.posix_fallocate(memfd, 0, SIZE)
    assert allocated(memfd) == SIZE
    assert os.pread(memfd, 2, PAGE) == b"x\0"


def test_reading_a_hole_through_a_mapping_allocates(memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, ALL)
    with mmap.mmap(memfd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        assert mapping[0] == 0
    assert allocated(memfd) > 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_cannot_open_it_for_writing(memfd: int) -> None:
    assert os.fstat(memfd).st_mode & 0o777 == 0o777
    os.fchmod(memfd, 0o600)
    reading = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    os.close(os.open(f"/proc/self/fd/{reading}", os.O_RDWR))
    child = os.fork()
    if child == 0:
        status = 1
        os.setuid(12345)
        # After setuid /proc/self belongs to root; as in a client that was executed by its user, it must not.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        try:
            os.open(f"/proc/self/fd/{reading}", os.O_RDWR)
        except PermissionError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    os.close(reading)


def minor_faults() -> int:
    with open(f"/proc/self/task/{threading.get_native_id()}/stat") as stat:
        return int(stat.read().rsplit(")", 1)[1].split()[7])


def test_a_move_brings_the_pages_along(memfd: int) -> None:
    os.posix_fallocate(memfd, 0, SIZE)
    area = Area(SIZE)
    area.map(0, SIZE, memfd, 0, False)
    mover = threading.Thread(target=area.move, args=(0, SIZE, memfd, 0, False))
    mover.start()
    mover.join()
    view = np.frombuffer(area.view(0, SIZE, False), np.uint8)[::PAGE]
    total = np.zeros(SIZE // PAGE, np.uint8)
    # Code that runs for the first time has faults of its own.
    np.copyto(total, np.ones(SIZE, np.uint8)[::PAGE])
    minor_faults()
    before = minor_faults()
    np.copyto(total, view)
    # With none of the 64 there it would be 4, 16 with each.
    assert minor_faults() - before <= 2


def test_a_cut_range_is_sigbus_and_its_neighbours_are_there(memfd: int) -> None:
    area = Area(SIZE)
    area.map(0, SIZE, memfd, 0, False)
    area.cut(PAGE, PAGE)
    # The child does not have what is lent, but it has what took its place.
    assert os.WTERMSIG(status_of_touch(area.address + PAGE)) == signal.SIGBUS
    view = area.view(0, SIZE, False)
    assert (view[0], view[2 * PAGE]) == (0, 0)
    assert os.WTERMSIG(status_of_touch(area.address)) == signal.SIGSEGV


def test_the_addresses_stay_as_long_as_a_view(memfd: int) -> None:
    area = Area(SIZE)
    area.map(0, SIZE, memfd, 0, False)
    view, address = area.view(0, SIZE, False), area.address
    area.cut(0, SIZE)
    del area
    for _ in range(20):
        other = Area(SIZE)
        other.map(0, SIZE, memfd, 0, False)
        assert other.address != address
    assert view.nbytes == SIZE


def test_a_datagram_keeps_descriptors_when_its_sender_is_killed() -> None:
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        child = os.fork()
        if child == 0:
            mine = os.memfd_create("of the child")
            os.write(mine, b"content")
            socket.send_fds(sender, [b"kept"], [mine])
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        _, (received,), _, _ = socket.recv_fds(receiver, 10, 1)
        assert os.pread(received, 10, 0) == b"content"
        os.close(received)


def test_a_forked_child_leaves_addresses_alone_that_it_may_have_given_away(memfd: int) -> None:
    area = Area(SIZE)
    area.map(0, SIZE, memfd, 0, False)
    child = os.fork()
    if child == 0:
        # The addresses are free here, and the next mapping may well be put there.
        fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
        address = area.address
        got = libc.mmap(address, SIZE, mmap.PROT_READ, fixed, 2**64 - 1, 0)
        area.cut(0, SIZE)
        del area
        os._exit(0 if got == address and ctypes.string_at(address, 1) == b"\0" else 1)
    assert os.waitpid(child, 0)[1] == 0


HUGE = hugepages.HUGE_BYTES
needs_huge_pages = pytest.mark.skipif(not HUGE, reason="this kernel has no transparent huge pages")


def resident_by_kind(area: Area) -> dict[str, int]:
    """What /proc/self/smaps says of the mapping at the start of an area, in bytes."""
    found: dict[str, int] = {}
    with open("/proc/self/smaps", encoding="ascii") as lines:
        inside = False
        for line in lines:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                inside = first.startswith(f"{area.address:x}-")
            elif inside and first in ("Rss:", "ShmemPmdMapped:"):
                found[first] = int(line.split()[1]) << 10
    return found


@needs_huge_pages
def test_huge_pages_are_made_of_a_memfd_with_a_page_in_each_and_cost_what_they_cover() -> None:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, 2 * HUGE + PAGE)
        os.pwrite(descriptor, b"a", 5)
        os.pwrite(descriptor, b"b", HUGE)
        area = Area(2 * HUGE + PAGE)
        area.map(0, area.length, descriptor, 0, True)
        # Without a page in each there is nothing to make it of.
        os.posix_fallocate(descriptor, 2 * HUGE, PAGE)
        if not hugepages.collapse(area.address, area.length, 1000):
            pytest.skip("the kernel found no huge page: memory is in pieces, or huge pages are denied")
        assert allocated(descriptor) == 2 * HUGE + PAGE
        assert os.pread(descriptor, 8, 0) == b"\0\0\0\0\0a\0\0"
        assert os.pread(descriptor, 2, HUGE - 1) == b"\0b"
        os.ftruncate(descriptor, 0)
        assert allocated(descriptor) == 0
    finally:
        os.close(descriptor)


@needs_huge_pages
def test_huge_pages_are_entered_in_a_page_table_without_a_fault_and_moved_whole() -> None:
    length = 8 * HUGE
    descriptor, huge = objects.allocate(length, 1000)
    try:
        if not huge:
            pytest.skip("the kernel found no huge page: memory is in pieces, or huge pages are denied")
        os.pwrite(descriptor, b"x", 3 * HUGE)
        area = Area(length)
        area.map(0, length, descriptor, 0, False)
        fresh, huge = objects.copy_extent(descriptor, length, 1000)
        assert huge
        before = minor_faults()
        area.move(0, length, fresh, 0, False, True)
        moving = minor_faults() - before
        os.close(fresh)
        with area.view(0, length, False) as view:
            before = minor_faults()
            assert sum(view[::PAGE]) == ord("x")
            touching = minor_faults() - before
        # Python makes its own few; small pages would be 4096 entries, 16 with each fault.
        assert touching < 64
        assert moving < 64
        assert resident_by_kind(area) == {"Rss:": length, "ShmemPmdMapped:": length}
    finally:
        os.close(descriptor)


@needs_huge_pages
def test_where_addresses_are_not_aligned_pages_are_small_and_all_there() -> None:
    length = 2 * HUGE
    descriptor, _ = objects.allocate(length)
    try:
        area = Area(length, PAGE)
        area.map(0, length, descriptor, 0, False)
        area.move(0, length, descriptor, 0, False, True)
        assert resident_by_kind(area) == {"Rss:": length, "ShmemPmdMapped:": 0}
    finally:
        os.close(descriptor)


def test_a_copy_of_what_was_cut_short_is_refused_and_leaves_nothing(memfd: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="cut short"):
        objects.copy_extent(memfd, SIZE + PAGE, 2)
    assert len(os.listdir("/proc/self/fd")) == before
