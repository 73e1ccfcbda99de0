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
    assert minor_faults() - before <= 1


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
