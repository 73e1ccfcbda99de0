"""System calls on pages that are missing: each backend's documented outcome, and none inside a pin."""

import errno
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import PAGE, pattern

import quire

WINDOW = 65536
SIZE = 8 * WINDOW
DATA = pattern(SIZE, 21).tobytes()
BACKENDS = ["thread", "signal", "sigsegv", "eager"]


@pytest.fixture(params=BACKENDS)
def region(request: pytest.FixtureRequest) -> Iterator[quire.Region]:
    with quire.Region(DATA, faults=request.param) as made:
        yield made


def by_write(view: memoryview, folder: Path) -> bytes:
    with (folder / "out").open("w+b", buffering=0) as file:
        assert file.write(view) == len(view)
        return (folder / "out").read_bytes()


def by_pwritev(view: memoryview, folder: Path) -> bytes:
    fd = os.open(folder / "out", os.O_RDWR | os.O_CREAT)
    try:
        assert os.pwritev(fd, [view[:PAGE], view[PAGE:]], 0) == len(view)
        return os.pread(fd, len(view), 0)
    finally:
        os.close(fd)


def by_pathlib(view: memoryview, folder: Path) -> bytes:
    (folder / "out").write_bytes(view)
    return (folder / "out").read_bytes()


def by_pipe(view: memoryview, _folder: Path) -> bytes:
    reader, writer = os.pipe()
    try:
        assert os.write(writer, view[:PAGE]) == PAGE
        return os.read(reader, PAGE) + bytes(view[PAGE:])
    finally:
        os.close(reader)
        os.close(writer)


def by_socket(view: memoryview, _folder: Path) -> bytes:
    ours, theirs = socket.socketpair()
    got = bytearray()

    def receive() -> None:
        while part := theirs.recv(1 << 20):
            got.extend(part)

    with ours, theirs:
        thread = threading.Thread(target=receive)
        thread.start()
        try:
            ours.sendall(view)
        finally:
            ours.shutdown(socket.SHUT_WR)
            thread.join()
    return bytes(got)


def refusal(call: Callable[[memoryview, Path], bytes], view: memoryview, folder: Path) -> int | None:
    """The error of a call, whose traceback, with the views in it, does not outlive it."""
    try:
        call(view, folder)
    except OSError as error:
        return error.errno
    return None


CALLS: list[Callable[[memoryview, Path], bytes]] = [by_write, by_pwritev, by_pathlib, by_pipe, by_socket]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_on_missing_pages_waits_or_is_refused(
    region: quire.Region, tmp_path: Path, call: Callable[[memoryview, Path], bytes]
) -> None:
    assert region.serves_system_calls == (region.faults in ("thread", "eager"))
    with memoryview(region) as whole, whole[2 * WINDOW + 5 : 3 * WINDOW + 105] as view:
        if region.serves_system_calls:
            assert call(view, tmp_path) == DATA[2 * WINDOW + 5 : 3 * WINDOW + 105]
            return
        assert refusal(call, view, tmp_path) == errno.EFAULT


@pytest.mark.parametrize("call", CALLS)
def test_every_call_works_on_what_is_pinned(
    region: quire.Region, tmp_path: Path, call: Callable[[memoryview, Path], bytes]
) -> None:
    with region.pin(2 * WINDOW + 5, WINDOW + 100) as view:
        region.discard()
        assert call(view, tmp_path) == DATA[2 * WINDOW + 5 : 3 * WINDOW + 105]


def test_a_call_that_wants_to_write_is_refused_by_python(region: quire.Region, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(bytes(100))
    with path.open("rb", buffering=0) as file, pytest.raises((TypeError, BufferError)):
        file.readinto(region)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises((TypeError, BufferError)):
        ours.recv_into(region)
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises((TypeError, BufferError)):
        os.readv(fd, [region])
    os.close(fd)
    assert bytes(region) == DATA


def test_a_call_that_writes_past_python_is_refused_by_the_kernel(
    region: quire.Region, tmp_path: Path
) -> None:
    """read(2) into the memory itself: filled or not, it stays what the source says."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    path = tmp_path / "in"
    path.write_bytes(bytes(SIZE))
    with path.open("rb") as file:
        for at in (0, 5 * WINDOW):
            if at == 0:
                region.prefetch(0, WINDOW)
            got = libc.read(file.fileno(), ctypes.c_void_p(region.address + at), ctypes.c_size_t(PAGE))
            assert (got, ctypes.get_errno()) == (-1, errno.EFAULT)
    assert bytes(region) == DATA


def test_a_file_shows_through_its_own_mapping_what_the_region_shows(tmp_path: Path) -> None:
    """What the kernel itself reads, as it does for O_DIRECT and splice, is filled too."""
    path = tmp_path / "plain"
    path.write_bytes(DATA)
    with quire.open(path, faults="thread") as region:
        target = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        os.ftruncate(target, SIZE)
        with memoryview(region) as view, mmap.mmap(target, SIZE) as mapped:
            mapped[:] = view[:]
            assert mapped[:] == DATA
        os.close(target)
