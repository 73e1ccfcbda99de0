"""A reader that tries to write, by every way there is, changes nothing for anybody else."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import socket
import sys
from collections.abc import Callable

import numpy as np
import pytest
from support import MIB, PAGE, content, expect_signal, nothing_left, pattern, run_forked

import quire

SIZE = 2 * MIB
NOBODY = 65534
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)

users = pytest.mark.parametrize(
    "other_user",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
        ),
    ],
    ids=["same user", "another user"],
)


@pytest.fixture(autouse=True)
def _nothing_leaks():
    with nothing_left():
        yield


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """What a child of another user could not import: the interpreter may lie in a home that is closed."""
    assert socket.socket
    assert "quire.wire" in sys.modules or quire.recv


def refuses(call: Callable[[], object], *errnos: int) -> None:
    with pytest.raises(OSError, match=r".") as refusal:
        call()
    assert refusal.value.errno in errnos, f"{refusal.value} is none of {[errno.errorcode[n] for n in errnos]}"


def checked(result: int) -> None:
    if result == -1 or result == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def attack(fd: int, seals_say: int) -> None:
    """Everything that can be tried with a descriptor."""
    length = os.fstat(fd).st_size
    refuses(lambda: os.pwrite(fd, b"x", 0), errno.EPERM, errno.EBADF)
    refuses(lambda: os.ftruncate(fd, 0), errno.EPERM, errno.EINVAL)
    refuses(lambda: os.ftruncate(fd, length + PAGE), errno.EPERM, errno.EINVAL)
    punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    refuses(lambda: checked(libc.fallocate(fd, punch, 0, PAGE)), errno.EPERM, errno.EBADF)
    refuses(
        lambda: mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        errno.EPERM,
        errno.EACCES,
    )
    refuses(lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE), errno.EPERM)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ~F_SEAL_EXEC == seals_say
    assert os.fstat(fd).st_size == length


def attack_reopened(fd: int, seals_say: int) -> None:
    """Reopen for writing through /proc; where that is allowed, the seals must hold."""
    path = f"/proc/self/fd/{fd}"
    try:
        again = os.open(path, os.O_RDWR)
    except PermissionError:
        again = -1
    if again >= 0:
        try:
            attack(again, seals_say)
        finally:
            os.close(again)
    refuses(lambda: os.truncate(path, 0), errno.EPERM, errno.EACCES)
    refuses(lambda: os.open(path, os.O_RDWR | os.O_TRUNC), errno.EPERM, errno.EACCES)


def attack_view(address: int) -> None:
    """Make the own view writable: refused, or a private copy."""
    result = libc.mprotect(address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    if result == 0:
        ctypes.memset(address, 0xEE, PAGE)
        assert ctypes.string_at(address, 2) == b"\xee\xee"
    else:
        assert ctypes.get_errno() in {errno.EACCES, errno.EPERM}


def as_user(other: bool) -> None:
    if other:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # Without this a process that changed its user may not look into its own /proc/self/fd.
        assert libc.prctl(4, 1, 0, 0, 0) == 0


F_SEAL_EXEC = 0x20
ALL_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
FUTURE_SEALS = 0x10 | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@pytest.fixture
def versions():
    """Two layers, so that every kind of descriptor is tried: a segment's own memory and what came later."""
    with quire.Segment.from_buffer(pattern(SIZE, 1)) as segment:
        first = segment.snapshot()
        segment.array(np.uint8)[:: 7 * PAGE] ^= 255
        second = segment.snapshot()
        yield segment, first, second
        first.close()
        second.close()


@users
def test_a_reader_of_snapshots(versions, other_user: bool) -> None:
    segment, first, second = versions
    expected = content(first), content(second)
    mine = second.map()
    here, there = socket.socketpair()

    def read() -> None:
        as_user(other_user)
        received = quire.recv(there)
        received.verify()
        assert content(received) == expected[1]
        for fd in received._core.layer_fds():
            attack(fd, ALL_SEALS)
            attack_reopened(fd, ALL_SEALS)
        mapping = received.map()
        attack_view(mapping.address)
        attack_view(mapping.address + 7 * PAGE)
        private = received.map(private=True)
        private[:] = bytes(SIZE)
        with received.fork() as own:
            own[:] = bytes(SIZE)
            own.snapshot().close()
        assert content(received) == expected[1]

    with here, there:
        quire.send(here, second)
        run_forked(read)
    assert (content(first), content(second)) == expected
    assert mine[:] == segment[:] == expected[1]
    mine.close()


@users
def test_a_reader_of_a_mirror(other_user: bool) -> None:
    with quire.LiveSegment(SIZE) as live:
        data = pattern(SIZE, 2).tobytes()
        with live.unprotected() as rw:
            rw[:] = data
        here, there = socket.socketpair()

        def read() -> None:
            as_user(other_user)
            mirror = quire.recv(there)
            mirror.verify()
            attack(mirror._fd, FUTURE_SEALS)
            attack_reopened(mirror._fd, FUTURE_SEALS)
            mapping = mirror.map()
            assert mapping[:] == data
            assert libc.mprotect(mapping.address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == -1
            assert ctypes.get_errno() in {errno.EACCES, errno.EPERM}

        with here, there, live.mirror() as mirror, mirror.map() as shown:
            quire.send(here, mirror)
            run_forked(read)
            assert live[:] == shown[:] == data
            with live.unprotected() as rw:
                rw[:5] = b"still"
            assert live[:5] == shown[:5] == b"still"


def test_a_store_through_a_mapping_faults(versions) -> None:
    segment, _, second = versions
    expected = segment[:]
    with second.map() as mapping:
        for offset in (0, 7 * PAGE, SIZE - 1):
            expect_signal(lambda offset=offset: ctypes.memset(mapping.address + offset, 1, 1))
        assert mapping[:] == segment[:] == expected


@pytest.mark.parametrize("backend", ["memfd", "sysv"])
def test_a_store_through_a_mirror_faults(backend: str) -> None:
    with quire.LiveSegment(3 * PAGE, backend=backend) as live, live.mirror() as mirror, mirror.map() as shown:
        expect_signal(lambda: ctypes.memset(shown.address, 1, 1))
        expect_signal(lambda: ctypes.memset(live.ro_address + PAGE, 1, 1))
        assert shown[:] == live[:] == bytes(3 * PAGE)


def test_views_are_read_only(versions) -> None:
    _, _, second = versions
    with second.map() as mapping:
        array = mapping.array(np.uint8)
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        with memoryview(mapping) as shown, pytest.raises(TypeError):
            shown[0] = 1
        with pytest.raises(TypeError):
            mapping[0] = 1
        with pytest.raises(TypeError, match="not writable"):
            ctypes.c_char.from_buffer(mapping)
        del array


def test_the_writer_cannot_change_what_it_gave_away(versions) -> None:
    """Not even with the descriptors that it made itself."""
    _, first, second = versions
    expected = content(first), content(second)
    for snapshot in (first, second):
        for fd in snapshot._core.layer_fds():
            attack(fd, ALL_SEALS)
            attack_reopened(fd, ALL_SEALS)
    assert (content(first), content(second)) == expected
    with contextlib.closing(first.fork()) as segment:
        segment[:] = bytes(SIZE)
    assert content(first) == expected[0]
