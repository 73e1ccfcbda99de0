"""Sending and receiving between processes that mean well; for the others see test_hostile_peers.py."""

import array
import contextlib
import fcntl
import gc
import os
import pathlib
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from leaks import no_new_descriptors
from rawmessages import header, put

import quire
from quire import PAGE_SIZE, Channel, LiveSegment, Malformed, Mirror, NotImmutable, Segment, Snapshot, Stalled


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    with no_new_descriptors():
        yield


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


def versions(count: int, pages: int = 600) -> Iterator[Snapshot]:
    """Snapshots that each have a layer more than the one before."""
    with Segment(pages * PAGE_SIZE) as segment:
        segment[:] = np.random.default_rng(1).bytes(segment.size)
        for number in range(count):
            segment[(number % pages) * PAGE_SIZE] = number % 256
            yield segment.snapshot()


def received(sock: socket.socket) -> Snapshot:
    snapshot = quire.recv(sock)
    assert isinstance(snapshot, Snapshot)
    return snapshot


def test_snapshot(pair: tuple[socket.socket, socket.socket]) -> None:
    for snapshot in versions(3):
        quire.send(pair[0], snapshot)
        got = received(pair[1])
        assert got is not snapshot
        assert (got.size, got.layers, got.diff(snapshot)) == (snapshot.size, snapshot.layers, [])
        got.verify()
        assert got.stats == (0, 0, 0, 0)
        assert got.map()[:] == snapshot.map()[:]


def test_received_descriptors_are_closed_on_exec(pair: tuple[socket.socket, socket.socket]) -> None:
    (snapshot,) = versions(1)
    quire.send(pair[0], snapshot)
    got = received(pair[1])
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in got._core.layer_fds())


def test_survives_its_sender(pair: tuple[socket.socket, socket.socket]) -> None:
    segment = Segment.from_buffer(b"the first version")
    snapshot = segment.snapshot()
    quire.send(pair[0], snapshot)
    snapshot.close()
    segment.close()
    pair[0].close()
    assert received(pair[1]).map()[:] == b"the first version"
    with pytest.raises(EOFError):
        quire.recv(pair[1])


def test_reads_nothing_beyond_the_message(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = versions(2)
    quire.send(pair[0], one)
    quire.send(pair[0], two)
    pair[0].sendall(b"something else")
    assert not received(pair[1]).diff(one)
    assert not received(pair[1]).diff(two)
    assert pair[1].recv(100) == b"something else"


@pytest.mark.parametrize("timeout", [None, 5.0, 0.0])
def test_the_mode_of_the_socket_stays(
    pair: tuple[socket.socket, socket.socket], timeout: float | None
) -> None:
    (snapshot,) = versions(1)
    flags = []
    for sock in pair:
        sock.settimeout(timeout)
        flags.append(fcntl.fcntl(sock, fcntl.F_GETFL))
    quire.send(pair[0], snapshot)
    received(pair[1])
    put(pair[0], header(magic=b"oops"))
    with pytest.raises(Malformed):
        quire.recv(pair[1])
    for sock, before in zip(pair, flags, strict=True):
        assert sock.gettimeout() == timeout
        assert fcntl.fcntl(sock, fcntl.F_GETFL) == before


def test_waiting_for_a_message_to_begin_follows_the_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].settimeout(0.05)
    with pytest.raises(TimeoutError) as caught:
        quire.recv(pair[1], timeout=None)
    assert not isinstance(caught.value, Stalled)
    pair[1].settimeout(0)
    with pytest.raises(BlockingIOError):
        quire.recv(pair[1])
    # A timeout of its own does not bound the wait for the first byte.
    pair[1].settimeout(None)
    (snapshot,) = versions(1)
    waiting = threading.Event()
    got: list[Snapshot] = []

    def receive() -> None:
        waiting.set()
        got.append(received_within(pair[1], 0.05))

    thread = threading.Thread(target=receive)
    thread.start()
    waiting.wait()
    thread.join(0.3)
    assert thread.is_alive()
    quire.send(pair[0], snapshot)
    thread.join()
    assert not got.pop().diff(snapshot)


def received_within(sock: socket.socket, timeout: float) -> Snapshot:
    snapshot = quire.recv(sock, timeout=timeout)
    assert isinstance(snapshot, Snapshot)
    return snapshot


def test_sockets_that_pass_credentials(pair: tuple[socket.socket, socket.socket]) -> None:
    (snapshot,) = versions(1)
    passpidfd = 76
    for option in (
        socket.SO_PASSCRED,
        socket.SO_TIMESTAMP if hasattr(socket, "SO_TIMESTAMP") else 29,
        passpidfd,
    ):
        # A kernel before 6.5 knows no SO_PASSPIDFD.
        with contextlib.suppress(OSError):
            pair[1].setsockopt(socket.SOL_SOCKET, option, 1)
    quire.send(pair[0], snapshot)
    assert not received(pair[1]).diff(snapshot)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ],
)
def test_other_sockets_are_refused(family: int, kind: int) -> None:
    (snapshot,) = versions(1)
    with socket.socket(family, kind) as sock:
        for misuse in (lambda: quire.send(sock, snapshot), lambda: quire.recv(sock), lambda: Channel(sock)):
            with pytest.raises(ValueError, match="Unix stream socket"):
                misuse()


def test_misuse(pair: tuple[socket.socket, socket.socket]) -> None:
    (snapshot,) = versions(1)
    for wrong in (1, "socket", None):
        with pytest.raises(TypeError):
            quire.send(wrong, snapshot)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            quire.recv(wrong)  # type: ignore[arg-type]
    for wrong in (None, b"", snapshot._core, snapshot.map()):
        with pytest.raises(TypeError):
            quire.send(pair[0], wrong)  # type: ignore[arg-type]
    for timeout in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            quire.send(pair[0], snapshot, timeout=timeout)
        with pytest.raises(ValueError, match="timeout"):
            quire.recv(pair[1], timeout=timeout)
        with pytest.raises(ValueError, match="timeout"):
            Channel(pair[0], timeout=timeout)
    snapshot.close()
    with pytest.raises(ValueError, match="closed"):
        quire.send(pair[0], snapshot)
    pair[0].close()
    with pytest.raises(ValueError, match="closed"):
        quire.recv(pair[0])
    with pytest.raises(TypeError):
        Snapshot()
    with pytest.raises(TypeError):
        Mirror()


@pytest.mark.parametrize("timeout", [1e10, 1e300, float("inf")])
def test_timeouts_of_any_length(pair: tuple[socket.socket, socket.socket], timeout: float) -> None:
    with quire.Segment(100) as segment, segment.snapshot() as snapshot:
        quire.send(pair[0], snapshot, timeout=timeout)
    with quire.recv(pair[1], timeout=timeout) as snapshot:
        assert snapshot.size == 100


def test_sending_to_a_peer_that_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    (snapshot,) = versions(1)
    pair[1].close()
    with pytest.raises(BrokenPipeError, match="sendmsg"):
        quire.send(pair[0], snapshot)


def fill(sock: socket.socket) -> None:
    """Send until the kernel takes no more."""
    timeout = sock.gettimeout()
    sock.setblocking(False)
    for size in (1 << 16, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(size))
    sock.settimeout(timeout)


@pytest.mark.parametrize("own_timeout", [None, 60.0])
def test_sending_to_a_peer_that_does_not_read(
    pair: tuple[socket.socket, socket.socket], own_timeout: float | None
) -> None:
    (snapshot,) = versions(1)
    fill(pair[0])
    pair[0].settimeout(own_timeout)
    with pytest.raises(Stalled):
        quire.send(pair[0], snapshot, timeout=0.1)
    pair[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        quire.send(pair[0], snapshot)


class Dribbling(socket.socket):
    """A socket whose kernel takes one byte at a time."""

    def sendmsg(self, buffers, *rest):  # type: ignore[no-untyped-def]
        return super().sendmsg([memoryview(buffers[0])[:1]], *rest)


@pytest.mark.parametrize("timeout", [None, 5.0, 0.0])
def test_sending_is_completed_when_the_kernel_takes_it_in_parts(timeout: float | None) -> None:
    a, b = socket.socketpair()
    (*_, snapshot) = versions(5)
    with Dribbling(fileno=a.detach()) as dribbling, b:
        dribbling.settimeout(timeout)
        thread = threading.Thread(target=quire.send, args=(dribbling, snapshot))
        thread.start()
        assert not received(b).diff(snapshot)
        thread.join()


@pytest.mark.parametrize("timeout", [None, 0.0])
def test_many_messages_wait_for_a_slow_reader(
    pair: tuple[socket.socket, socket.socket], timeout: float | None
) -> None:
    pair[0].settimeout(timeout)
    snapshots = list(versions(60))
    for snapshot in snapshots:
        quire.send(pair[0], snapshot, timeout=0.1)
    for snapshot in snapshots:
        assert not received(pair[1]).diff(snapshot)


def test_a_file_is_refused_by_its_sender(
    pair: tuple[socket.socket, socket.socket], tmp_path: pathlib.Path
) -> None:
    (snapshot,) = versions(1)
    snapshot.save(tmp_path / "saved")
    loaded = quire.load(tmp_path / "saved")
    with pytest.raises(NotImmutable, match="copy=True"):
        quire.send(pair[0], loaded)
    quire.send(pair[0], quire.load(tmp_path / "saved", copy=True))
    assert not received(pair[1]).diff(snapshot)


def test_too_many_descriptors_on_their_way() -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to become a user whose limit counts")
    script = """
import errno, os, resource, socket, quire
from quire import recv, send
segment = quire.Segment(1 << 16)
snapshot = segment.snapshot()
a, b = socket.socketpair()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    for _ in range(100):
        send(a, snapshot)
except OSError as error:
    assert error.errno == errno.ETOOMANYREFS, error
    assert "RLIMIT_NOFILE" in str(error), error
else:
    raise SystemExit("never refused")
assert not recv(b).diff(snapshot)
send(a, snapshot)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_too_many_open_descriptors_to_receive_one(pair: tuple[socket.socket, socket.socket]) -> None:
    (*_, snapshot) = versions(10)
    quire.send(pair[0], snapshot)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = [os.dup(0) for _ in range(highest - len(os.listdir("/proc/self/fd")) + 4)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 4, limits[1]))
    try:
        with pytest.raises(Malformed, match="RLIMIT_NOFILE"):
            quire.recv(pair[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in fillers:
            os.close(fd)


def test_between_unrelated_processes(tmp_path: pathlib.Path) -> None:
    script = """
import socket, sys, numpy as np, quire
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    snapshot = quire.recv(sock)
    snapshot.verify()
    answer = quire.Segment.from_buffer(snapshot.map().array("f8").sum())
    quire.send(sock, answer.snapshot())
"""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "socket")])
        connection, _ = listener.accept()
        with connection:
            segment = Segment.from_buffer(np.arange(100_000.0))
            quire.send(connection, segment.snapshot())
            assert received(connection).map().array("f8")[0] == np.arange(100_000.0).sum()
        assert child.wait() == 0


def test_mirror(pair: tuple[socket.socket, socket.socket]) -> None:
    with LiveSegment(10_000) as live:
        with live.mirror() as mirror:
            quire.send(pair[0], mirror)
        got = quire.recv(pair[1])
        assert isinstance(got, Mirror)
        got.verify()
        assert got.size == 10_000
        with got, got.map() as mapping:
            with live.unprotected() as rw:
                rw[9_995:] = b"hello"
            assert mapping[9_990:] == bytes(5) + b"hello"


class Counting(socket.socket):
    """A socket that counts the descriptors it sends."""

    sent = 0

    def sendmsg(self, buffers, ancillary=(), *rest):  # type: ignore[no-untyped-def]
        self.sent += sum(len(array.array("i", data)) for _, _, data in ancillary)
        return super().sendmsg(buffers, ancillary, *rest)


def test_a_channel_sends_new_layers_only() -> None:
    a, b = socket.socketpair()
    counting = Counting(fileno=a.detach())
    with Channel(counting) as here, Channel(b) as there:
        before: set[bytes] = set()
        for snapshot in versions(80):
            counting.sent = 0
            here.send(snapshot)
            layer_ids = set(snapshot._core.layer_ids())
            assert counting.sent == len(layer_ids - before)
            before = layer_ids
            got = there.recv()
            assert isinstance(got, Snapshot)
            assert (got.layers, got.diff(snapshot)) == (snapshot.layers, [])
            got.close()
        counting.sent = 0
        here.send(snapshot)
        assert counting.sent == 0
        assert there.recv().size == snapshot.size
    assert here.closed
    here.close()
    gc.collect()


def test_what_came_through_a_channel_stays_good() -> None:
    a, b = socket.socketpair()
    with Channel(a) as here, Channel(b) as there:
        got = []
        for snapshot in versions(10):
            here.send(snapshot)
            got.append((there.recv(), snapshot.map()[:]))
    for snapshot, content in got:
        assert isinstance(snapshot, Snapshot)
        snapshot.verify()
        assert snapshot.map()[:] == content


def test_a_channel_forgets_all_but_the_last() -> None:
    a, b = socket.socketpair()
    first, *_ = versions(3)
    other = Segment(PAGE_SIZE).snapshot()
    with Channel(a) as here, Channel(b) as there:
        for snapshot in (first, other, first, other):
            here.send(snapshot)
            got = there.recv()
            assert isinstance(got, Snapshot)
            assert not got.diff(snapshot)


def test_a_mirror_between_snapshots_forgets_nothing() -> None:
    a, b = socket.socketpair()
    counting = Counting(fileno=a.detach())
    (snapshot,) = versions(1)
    with Channel(counting) as here, Channel(b) as there, LiveSegment(10) as live, live.mirror() as mirror:
        for obj in (snapshot, mirror, snapshot):
            counting.sent = 0
            here.send(obj)
            with there.recv() as got:
                assert got.size == obj.size
        assert counting.sent == 0


def test_both_directions_of_a_channel_at_once() -> None:
    a, b = socket.socketpair()
    with Channel(a) as here, Channel(b) as there:
        errors: list[BaseException] = []

        def talk(channel: Channel, seed: int) -> None:
            try:
                with Segment.from_buffer(bytes([seed]) * 9000) as segment:
                    for number in range(100):
                        segment[number] = number
                        channel.send(segment.snapshot())
            except BaseException as error:
                errors.append(error)
                raise

        def listen(channel: Channel, seed: int) -> None:
            try:
                for number in range(100):
                    snapshot = channel.recv()
                    assert isinstance(snapshot, Snapshot)
                    with snapshot.map() as mapping:
                        assert mapping[number] == number
                        assert mapping[number + 1] == seed
                    snapshot.close()
            except BaseException as error:
                errors.append(error)
                raise

        work = [(talk, here, 200), (listen, there, 200), (talk, there, 201), (listen, here, 201)]
        threads = [threading.Thread(target=target, args=args) for target, *args in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors


def test_threads_that_share_a_channel() -> None:
    a, b = socket.socketpair()
    with Channel(a) as here, Channel(b) as there:
        snapshots = list(versions(8))
        threads = [threading.Thread(target=here.send, args=(snapshot,)) for snapshot in snapshots]
        for thread in threads:
            thread.start()
        sizes = []
        for _ in snapshots:
            got = there.recv()
            assert isinstance(got, Snapshot)
            sizes.append([index for index, snapshot in enumerate(snapshots) if not snapshot.diff(got)])
        for thread in threads:
            thread.join()
        assert sorted(sizes) == [[index] for index in range(8)]


def test_a_closed_channel(pair: tuple[socket.socket, socket.socket]) -> None:
    (snapshot,) = versions(1)
    channel = Channel(pair[0])
    channel.close()
    assert pair[0].fileno() == -1
    with pytest.raises(ValueError, match="closed"):
        channel.send(snapshot)
    with pytest.raises(ValueError, match="closed"):
        channel.recv()
    with pytest.raises(EOFError):
        quire.recv(pair[1])
