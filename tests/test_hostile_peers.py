"""Peers that lie, stall, trickle, close and flood: an exception of ours, and never a descriptor left."""

import array
import contextlib
import fcntl
import os
import pathlib
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerfiles import ALL_SEALS, PAGE, LayerFile, layer_id, memfd, node, page, run, simple, with_table
from leaks import no_new_descriptors
from rawmessages import HEADER_BYTES, header, mirror_message, put, records, snapshot_message

import quire
from quire import Channel, Malformed, NotImmutable, QuireError, Stalled

MIRROR_SEALS = 0x10 | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    with no_new_descriptors():
        yield


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


Pair = tuple[socket.socket, socket.socket]

ID = layer_id(1)


def nulls(count: int) -> list[int]:
    return [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(count)]


def layers(count: int) -> list[int]:
    return [simple(number).descriptor() for number in range(1, count + 1)]


def test_a_right_message_is_accepted(pair: Pair) -> None:
    put(pair[0], snapshot_message([ID]), layers(1))
    snapshot = quire.recv(pair[1])
    assert isinstance(snapshot, quire.Snapshot)
    assert snapshot.map()[:] == page(0) + page(1) + page(2)


RIGHT = records([ID])

HEADERS = {
    "magic": header(RIGHT, magic=b"QUIN"),
    "version 0": header(RIGHT, version=0),
    "version 2": header(RIGHT, version=2),
    "type 0": header(RIGHT, kind=0),
    "type 3": header(RIGHT, kind=3),
    "another type": header(RIGHT, kind=2),
    "reserved": header(RIGHT, reserved=1),
    "reserved, high": header(RIGHT, reserved=1 << 63),
    "length 4097": header(RIGHT, length=4097),
    "length 2^32 - 1": header(RIGHT, length=0xFFFFFFFF),
    "length 0": header(b""),
    "length too short": header(RIGHT[:-1]),
    "length too long": header(RIGHT + b"\0"),
    "no descriptors announced": header(RIGHT, descriptors=0),
    "2 announced": header(RIGHT, descriptors=2),
    "65 announced": header(RIGHT, descriptors=65),
    "2^32 - 1 announced": header(RIGHT, descriptors=0xFFFFFFFF),
    "no layers": header(records([])),
    "count too low": header(records([ID], count=0)),
    "count too high": header(records([ID], count=2)),
    "count 65": header(records([layer_id(i) for i in range(65)], count=65)),
    "count 2^32 - 1": header(records([ID], count=0xFFFFFFFF)),
    "padding of the list": header(records([ID], zero=1)),
    "padding of a record": header(records([ID], padding=1)),
    "unknown flag": header(records([ID], flags=3)),
    "descriptor not announced by its record": header(records([ID], flags=0)),
    "one record without a descriptor": header(records([ID]) + struct.pack("<16sII", layer_id(2), 0, 0)),
    "id of zeros": header(records([bytes(16)])),
    "another id": header(records([layer_id(2)])),
    "4096 bytes of nothing": header(bytes(4096)),
}


@pytest.mark.parametrize("message", HEADERS.values(), ids=HEADERS)
def test_messages(pair: Pair, message: bytes) -> None:
    put(pair[0], message, layers(1))
    pair[0].close()
    with pytest.raises(Malformed):
        quire.recv(pair[1])


def test_a_layer_that_was_never_sent(pair: Pair) -> None:
    payload = struct.pack("<II16sII16sII", 2, 0, ID, 1, 0, layer_id(2), 0, 0)
    put(pair[0], header(payload), layers(1))
    with pytest.raises(Malformed, match="not sent before"):
        quire.recv(pair[1])


@pytest.mark.parametrize("count", [0, 2, 3, 63, 64, 65, 100, 200, 253])
def test_too_few_or_too_many_descriptors(pair: Pair, count: int) -> None:
    put(pair[0], snapshot_message([ID]), nulls(count))
    with pytest.raises(Malformed):
        quire.recv(pair[1])


def test_twice_the_same_id(pair: Pair) -> None:
    put(pair[0], snapshot_message([ID, ID]), layers(1) + layers(1))
    with pytest.raises(Malformed, match="twice"):
        quire.recv(pair[1])


def test_ids_in_another_order(pair: Pair) -> None:
    top = with_table({0: run(0), 1: run(0, slot=1)}, pages=2, data=[page(0)], imports=[layer_id(2)])
    bottom = LayerFile(2, data=[page(7)])
    put(pair[0], snapshot_message([layer_id(2), ID]), [top.descriptor(), bottom.descriptor()])
    with pytest.raises(Malformed):
        quire.recv(pair[1])
    put(pair[0], snapshot_message([ID, layer_id(2)]), [top.descriptor(), bottom.descriptor()])
    assert quire.recv(pair[1]).size == 2 * PAGE


@pytest.mark.parametrize("at", [1, 4, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, 55])
@pytest.mark.parametrize("first", [0, 1])
def test_descriptors_on_later_bytes(pair: Pair, at: int, first: int) -> None:
    message = snapshot_message([ID])
    # With a timeout, each part is sent when the part before it was read.
    thread = threading.Thread(target=in_parts, args=(pair[0], message, at, first))
    thread.start()
    with pytest.raises(Malformed):
        quire.recv(pair[1])
    thread.join()


def in_parts(sock: socket.socket, message: bytes, at: int, first: int) -> None:
    put(sock, message[:at], layers(first))
    wait_until_read(sock)
    put(sock, message[at:], nulls(1))


def wait_until_read(sock: socket.socket) -> None:
    """Wait until the peer has read all that was sent; the kernel counts it."""
    import termios

    while struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]:
        os.sched_yield()


def test_a_descriptor_with_every_byte(pair: Pair) -> None:
    def flood() -> None:
        with contextlib.suppress(BrokenPipeError):
            for byte in header(bytes(4096), descriptors=64):
                put(pair[0], bytes([byte]), nulls(64))

    thread = threading.Thread(target=flood)
    thread.start()
    with pytest.raises(Malformed):
        quire.recv(pair[1])
    pair[1].close()
    thread.join()


def test_closing_at_every_byte() -> None:
    message = snapshot_message([ID])
    for sent in range(len(message)):
        a, b = socket.socketpair()
        with a, b:
            if sent:
                put(a, message[:sent], layers(1))
            a.close()
            with pytest.raises(Malformed if sent else EOFError):
                quire.recv(b)


@pytest.mark.parametrize("sent", [0, 1, HEADER_BYTES])
def test_a_connection_that_is_reset(pair: Pair, sent: int) -> None:
    # Closing with something unread resets instead of ending the connection.
    if sent:
        put(pair[0], snapshot_message([ID])[:sent], layers(1))
    pair[1].send(b"never read")
    pair[0].close()
    with pytest.raises(Malformed if sent else EOFError):
        quire.recv(pair[1])


@pytest.mark.parametrize("own_timeout", [None, 60.0, 0.0])
@pytest.mark.parametrize("sent", [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5])
def test_stalling(pair: Pair, sent: int, own_timeout: float | None) -> None:
    put(pair[0], snapshot_message([ID])[:sent], layers(1))
    pair[1].settimeout(own_timeout)
    start = time.monotonic()
    with pytest.raises(Stalled) as caught:
        quire.recv(pair[1], timeout=0.1)
    assert 0.1 <= time.monotonic() - start < 5
    assert isinstance(caught.value, TimeoutError)
    assert pair[1].gettimeout() == own_timeout


def test_trickling(pair: Pair) -> None:
    stop = threading.Event()
    message = header(bytes(4096))

    def trickle() -> None:
        put(pair[0], message[:1], layers(1))
        for byte in message[1:]:
            if stop.wait(0.02):
                return
            pair[0].send(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    start = time.monotonic()
    with pytest.raises(Stalled):
        quire.recv(pair[1], timeout=0.3)
    assert time.monotonic() - start < 5
    stop.set()
    thread.join()


def pipe_end() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def a_file(content: bytes) -> int:
    path = f"/dev/shm/quire-test-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    os.unlink(path)
    os.write(fd, content)
    return fd


def a_truncated_memfd() -> int:
    return memfd(simple().content(), length=2 * PAGE)


def huge() -> int:
    try:
        fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"no memfd of huge pages here: {error}")
    os.ftruncate(fd, 2 << 20)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
    return fd


DESCRIPTORS: dict[str, tuple[Callable[[], int], type[QuireError] | tuple[type[QuireError], ...]]] = {
    "unsealed": (lambda: simple().descriptor(0), NotImmutable),
    "not sealed against writing": (
        lambda: simple().descriptor(ALL_SEALS & ~fcntl.F_SEAL_WRITE),
        NotImmutable,
    ),
    "not sealed against sealing": (lambda: simple().descriptor(ALL_SEALS & ~fcntl.F_SEAL_SEAL), NotImmutable),
    "sealed as a mirror": (lambda: simple().descriptor(MIRROR_SEALS), NotImmutable),
    "pipe": (pipe_end, NotImmutable),
    "device": (lambda: nulls(1)[0], NotImmutable),
    "file of a tmpfs": (lambda: a_file(simple().content()), NotImmutable),
    "executable": (lambda: os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC), NotImmutable),
    "truncated": (a_truncated_memfd, Malformed),
    "empty": (lambda: memfd(b""), Malformed),
    "huge pages": (huge, (Malformed, NotImmutable)),
    "cyclic": (
        lambda: LayerFile(data=[page(0)], nodes=[{0: node(0)}], size=1 << 30, root=node(0)).descriptor(),
        Malformed,
    ),
}


@pytest.mark.parametrize(("make", "expected"), DESCRIPTORS.values(), ids=DESCRIPTORS)
def test_descriptors_that_are_no_layers(
    pair: Pair, make: Callable[[], int], expected: type[QuireError]
) -> None:
    put(pair[0], snapshot_message([ID]), [make()])
    with pytest.raises(expected):
        quire.recv(pair[1])
    put(pair[0], snapshot_message([ID, layer_id(2)]), [make(), simple(2).descriptor()])
    with pytest.raises((Malformed, NotImmutable)):
        quire.recv(pair[1])


MIRRORS: dict[str, tuple[Callable[[], int], int, type[QuireError]]] = {
    "unsealed": (lambda: memfd(bytes(PAGE), 0), PAGE, NotImmutable),
    "may shrink": (lambda: memfd(bytes(PAGE), MIRROR_SEALS & ~fcntl.F_SEAL_SHRINK), PAGE, NotImmutable),
    "may grow": (lambda: memfd(bytes(PAGE), MIRROR_SEALS & ~fcntl.F_SEAL_GROW), PAGE, NotImmutable),
    "may be written": (lambda: memfd(bytes(PAGE), MIRROR_SEALS & ~0x10), PAGE, NotImmutable),
    "may be unsealed": (lambda: memfd(bytes(PAGE), MIRROR_SEALS & ~fcntl.F_SEAL_SEAL), PAGE, NotImmutable),
    "pipe": (pipe_end, PAGE, NotImmutable),
    "file": (lambda: a_file(bytes(PAGE)), PAGE, NotImmutable),
    "shorter than it says": (lambda: memfd(bytes(PAGE), MIRROR_SEALS), PAGE + 1, Malformed),
    "a page longer than it says": (lambda: memfd(bytes(2 * PAGE), MIRROR_SEALS), PAGE, Malformed),
    "says 0": (lambda: memfd(bytes(PAGE), MIRROR_SEALS), 0, Malformed),
    "says 2^63": (lambda: memfd(bytes(PAGE), MIRROR_SEALS), 1 << 63, Malformed),
    "empty": (lambda: memfd(b"", MIRROR_SEALS), 1, Malformed),
}


@pytest.mark.parametrize(("make", "size", "expected"), MIRRORS.values(), ids=MIRRORS)
def test_descriptors_that_are_no_mirrors(
    pair: Pair, make: Callable[[], int], size: int, expected: type[QuireError]
) -> None:
    put(pair[0], mirror_message(size), [make()])
    with pytest.raises(expected):
        quire.recv(pair[1])


@pytest.mark.parametrize("count", [0, 2, 64])
def test_mirrors_with_other_than_one_descriptor(pair: Pair, count: int) -> None:
    fds = [memfd(bytes(PAGE), MIRROR_SEALS) for _ in range(count)]
    put(pair[0], header(struct.pack("<Q", PAGE), kind=2, descriptors=count), fds)
    with pytest.raises(Malformed):
        quire.recv(pair[1])


def test_a_channel_is_not_deceived_about_what_it_has(pair: Pair) -> None:
    with Channel(pair[1]) as channel:
        put(pair[0], snapshot_message([ID]), layers(1))
        assert channel.recv().size == 3 * PAGE
        # The layer that it has, left out: accepted. One that it does not have, left out: not.
        put(pair[0], header(records([ID], flags=0), descriptors=0))
        assert channel.recv().size == 3 * PAGE
        put(pair[0], header(records([layer_id(2)], flags=0), descriptors=0))
        with pytest.raises(Malformed, match="not sent before"):
            channel.recv()
        # From then on nothing is believed.
        put(pair[0], snapshot_message([ID]), layers(1))
        with pytest.raises(Malformed, match="close the channel"):
            channel.recv()


def test_a_channel_that_was_refused_something_is_finished(pair: Pair) -> None:
    with Channel(pair[1], timeout=0.1) as channel:
        put(pair[0], snapshot_message([ID]), [simple().descriptor(0)])
        with pytest.raises(NotImmutable):
            channel.recv()
        with pytest.raises(Malformed, match="NotImmutable"):
            channel.recv()
        # The other direction works on.
        channel.send(quire.Segment(10).snapshot())
        assert quire.recv(pair[0]).size == 10


def test_a_channel_survives_waiting(pair: Pair) -> None:
    pair[1].settimeout(0.01)
    with Channel(pair[1]) as channel:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                channel.recv()
        put(pair[0], snapshot_message([ID]), layers(1))
        assert channel.recv().size == 3 * PAGE


def test_a_channel_that_stalled_is_finished(pair: Pair) -> None:
    with Channel(pair[1], timeout=0.05) as channel:
        put(pair[0], snapshot_message([ID])[:30], layers(1))
        with pytest.raises(Stalled):
            channel.recv()
        put(pair[0], snapshot_message([ID])[30:])
        with pytest.raises(Malformed, match="Stalled"):
            channel.recv()


def test_a_channels_second_message_means_nothing_to_others(pair: Pair) -> None:
    with Channel(pair[0]) as channel:
        snapshot = quire.Segment(10).snapshot()
        channel.send(snapshot)
        quire.recv(pair[1])
        channel.send(snapshot)
        with pytest.raises(Malformed, match="not sent before"):
            quire.recv(pair[1])


def receive_all(sock: socket.socket) -> None:
    while True:
        quire.recv(sock, timeout=5)


FUZZED_HEADERS = st.builds(
    struct.Struct("<4sHHIIQ").pack,
    st.sampled_from([b"QUIM", b"QUIM", b"QUIL"]),
    st.sampled_from([1, 1, 0, 2, 0xFFFF]),
    st.sampled_from([1, 1, 2, 0, 3]),
    st.integers(0, 4100) | st.sampled_from([8, 32, 56, 0xFFFFFFFF]),
    st.integers(0, 70),
    st.sampled_from([0, 0, 0, 1]),
)


@settings(deadline=None, max_examples=300)
@given(FUZZED_HEADERS, st.binary(max_size=200), st.integers(0, 70), st.booleans())
def test_anything(head: bytes, rest: bytes, descriptors: int, layered: bool) -> None:
    a, b = socket.socketpair()
    with a, b, no_new_descriptors(collect=False):
        fds = layers(min(descriptors, 3)) if layered else nulls(descriptors)
        put(a, head + rest, fds)
        a.shutdown(socket.SHUT_WR)
        with pytest.raises((QuireError, EOFError)):
            receive_all(b)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 55), st.integers(1, 255))
def test_any_byte_of_a_message_changed(at: int, mask: int) -> None:
    message = bytearray(snapshot_message([ID]))
    message[at] ^= mask
    a, b = socket.socketpair()
    with a, b, no_new_descriptors(collect=False):
        put(a, bytes(message), layers(1))
        a.shutdown(socket.SHUT_WR)
        with pytest.raises(Malformed):
            quire.recv(b, timeout=5)


def test_a_flood_of_descriptors_costs_the_receiver_nothing(pair: Pair) -> None:
    for _ in range(50):
        put(pair[0], b"?", nulls(200))
    for _ in range(50):
        with pytest.raises(Malformed):
            quire.recv(pair[1])


def test_a_socket_may_send_itself(pair: Pair) -> None:
    # A cycle that only the kernel's collector for sockets can break; ours is to close our copies.
    message = header(RIGHT)
    ancillary = array.array("i", [pair[0].fileno()])
    pair[0].sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ancillary)])
    with pytest.raises(NotImmutable):
        quire.recv(pair[1])


def test_a_file_of_a_file_system_that_does_not_answer(pair: Pair, tmp_path: pathlib.Path) -> None:
    if os.getuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and /dev/fuse to mount a file system")
    script = pathlib.Path(__file__).with_name("fusefile.py")
    threads = set(threading.enumerate())
    child = subprocess.Popen(
        [sys.executable, script, tmp_path, str(pair[0].fileno())],
        pass_fds=[pair[0].fileno()],
        stdin=subprocess.PIPE,
    )
    try:
        pair[1].settimeout(60)
        start = time.monotonic()
        with pytest.raises(NotImmutable):
            quire.recv(pair[1])
        assert time.monotonic() - start < 30
    finally:
        child.communicate()
    # The file system is gone, so what waited for it ends.
    for thread in set(threading.enumerate()) - threads:
        thread.join(60)
        assert not thread.is_alive()
