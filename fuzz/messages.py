"""Fuzz what a peer may send over a socket: any bytes, in any pieces, with any descriptors.

Whatever comes, ``recv`` returns an object whose bytes are right, or raises an exception of quire's own,
EOFError or TimeoutError, within its timeout; and no descriptor stays open.
"""

from __future__ import annotations

import argparse
import array
import errno
import faulthandler
import fcntl
import gc
import os
import pathlib
import resource
import socket
import struct
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

import quire
from quire import messages

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = pathlib.Path(__file__).parent
PAGE = 4096
TIMEOUT = 0.02
# Longer than this is a hang; the process ends with the stack of every thread.
HANG_SECONDS = 30.0
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
FUTURE_WRITE = 0x10


@dataclass
class Honest:
    """Versions of a segment, and a mirror, with what a receiver must see."""

    snapshots: list[quire.Snapshot]
    contents: dict[tuple[bytes, ...], bytes]
    live: quire.LiveSegment
    mirror: quire.Mirror

    @classmethod
    def make(cls) -> Honest:
        segment = quire.Segment(40 * PAGE + 7)
        snapshots = []
        contents = {}
        for version in range(3):
            view = segment.array("uint8")
            view[version * PAGE : (30 - version) * PAGE : 61] = version + 1
            snapshot = segment.snapshot()
            snapshots.append(snapshot)
            contents[tuple(snapshot._core.layer_ids())] = view.tobytes()
        live = quire.LiveSegment(5 * PAGE)
        return cls(snapshots, contents, live, live.mirror())


@dataclass
class Step:
    """Bytes sent by one system call, and the descriptors that go with them."""

    data: bytes
    descriptors: list[str]


KINDS = [
    *("layer 0", "layer 1", "layer 2", "layer 3", "mirror"),
    *("unsealed", "half sealed", "sealed noise", "sealed empty", "sealed hole", "future write", "write only"),
    *("pipe", "socket", "file", "null", "directory", "eventfd", "epoll"),
]


def open_kind(kind: str, honest: Honest, noise: bytes) -> int:
    """A new descriptor of the kind."""
    if kind.startswith("layer"):
        layers = honest.snapshots[-1]._core.layer_fds()
        return os.dup(layers[int(kind[-1]) % len(layers)])
    if kind == "mirror":
        return honest_mirror_fd(honest)
    if kind == "pipe":
        read, write = os.pipe()
        os.close(write)
        return read
    if kind == "socket":
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()
    if kind == "file":
        with tempfile.TemporaryFile() as file:
            file.write(noise)
            file.flush()
            return os.dup(file.fileno())
    if kind == "null":
        return os.open("/dev/null", os.O_RDWR)
    if kind == "directory":
        return os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    if kind == "eventfd":
        return os.eventfd(0)
    if kind == "epoll":
        import select

        poll = select.epoll()
        try:
            return os.dup(poll.fileno())
        finally:
            poll.close()
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if kind == "sealed hole":
        os.ftruncate(fd, 1 << 46)
    elif kind != "sealed empty":
        os.write(fd, noise)
        os.ftruncate(fd, -(-len(noise) // PAGE) * PAGE)
    if kind == "half sealed":
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    elif kind == "future write":
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, FUTURE_WRITE | SEALS & ~fcntl.F_SEAL_WRITE)
    elif kind.startswith("sealed"):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    elif kind == "write only":
        only = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
        os.close(fd)
        return only
    return fd


def honest_mirror_fd(honest: Honest) -> int:
    """The descriptor that a mirror travels as."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        quire.send(ours, honest.mirror)
        _, descriptors, _, _ = socket.recv_fds(theirs, 4096, 1)
        return descriptors[0]


def layers_of(snapshot: quire.Snapshot, known: frozenset[bytes] = frozenset()) -> tuple[bytes, list[str]]:
    """The honest message of a snapshot, with the names of its descriptors."""
    ids = snapshot._core.layer_ids()
    last = HONEST.snapshots[-1]._core.layer_ids()
    names = [f"layer {last.index(i)}" if i in last else "sealed noise" for i in ids if i not in known]
    return bytes(messages.encode_snapshot(ids, known)), names


HONEST = Honest.make()
FIRST_IDS = frozenset(HONEST.snapshots[0]._core.layer_ids())
FIRST = layers_of(HONEST.snapshots[0])
MESSAGES = [
    layers_of(HONEST.snapshots[-1]),
    layers_of(HONEST.snapshots[-1], FIRST_IDS),
    FIRST,
    (bytes(messages.encode_mirror(5 * PAGE)), ["mirror"]),
]

numbers = st.one_of(
    st.integers(0, 70),
    st.integers(0, 2**64 - 1),
    st.sampled_from([2**k + d for k in range(64) for d in (-1, 0)]),
)


@st.composite
def bent(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """An honest message, bent in some places."""
    data, names = draw(st.sampled_from(MESSAGES))
    raw, names = bytearray(data), list(names)
    for _ in range(draw(st.integers(0, 4))):
        how = draw(st.integers(0, 7))
        if how == 0 and raw:
            raw[draw(st.integers(0, len(raw) - 1))] ^= draw(st.integers(1, 255))
        elif how == 1:
            # A whole field: version, type, length, descriptors, reserved, number of layers.
            at, form = draw(
                st.sampled_from([(4, "<H"), (6, "<H"), (8, "<I"), (12, "<I"), (16, "<Q"), (24, "<I")])
            )
            size = struct.calcsize(form)
            if len(raw) >= at + size:
                struct.pack_into(form, raw, at, draw(numbers) % (1 << 8 * size))
        elif how == 2:
            del raw[draw(st.integers(0, len(raw))) :]
        elif how == 3:
            at = draw(st.integers(0, len(raw)))
            raw[at:at] = draw(st.binary(max_size=64))
        elif how == 4:
            names = draw(st.lists(st.sampled_from(KINDS), max_size=4))
        elif how == 5 and names:
            names[draw(st.integers(0, len(names) - 1))] = draw(st.sampled_from(KINDS))
        elif how == 6:
            names = names * draw(st.sampled_from([0, 2, 30, 63]))
        elif how == 7 and names:
            names = draw(st.permutations(names))
    # As many as are announced, so that the deeper checks are reached.
    if draw(st.booleans()) and len(raw) >= 16:
        struct.pack_into("<I", raw, 12, len(names))
    return bytes(raw), names


def loose() -> st.SearchStrategy[tuple[bytes, list[str]]]:
    """Any bytes with any descriptors."""
    return st.tuples(st.binary(max_size=300), st.lists(st.sampled_from(KINDS), max_size=6))


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    """What the peer does, call by call."""
    out = []
    for data, names in draw(st.lists(st.one_of(bent(), loose()), min_size=1, max_size=3)):
        cuts = sorted(draw(st.lists(st.integers(1, max(1, len(data))), max_size=2)))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        pieces = [piece for piece in pieces if piece]
        # The descriptors belong to the first byte; sometimes they come later, or twice.
        places = draw(st.sampled_from([{0}, {0}, {0}, {1}, {0, 1}]))
        out += [Step(piece, names if i in places else []) for i, piece in enumerate(pieces)]
    return out


def descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


@contextmanager
def few_descriptors(left: int | None) -> Iterator[None]:
    """Leave room for so many new descriptors."""
    if left is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(descriptors()) + left), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def send_step(sock: socket.socket, step: Step, noise: bytes) -> None:
    with ExitStack() as opened:
        numbers = []
        for kind in step.descriptors[:200]:
            fd = open_kind(kind, HONEST, noise)
            opened.callback(os.close, fd)
            numbers.append(fd)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers))] if numbers else []
        sock.sendmsg([step.data], ancillary)


def look_at(obj: quire.Snapshot | quire.Mirror) -> None:
    """What was accepted is usable, and shows the honest bytes."""
    with obj:
        if isinstance(obj, quire.Snapshot):
            obj.verify()
            expected = HONEST.contents.get(tuple(obj._core.layer_ids()))
            assert expected is not None, "a snapshot that nobody sent was accepted"
            with obj.map() as mapping:
                assert bytes(memoryview(mapping)) == expected, "wrong bytes"
        else:
            with obj.map() as mapping:
                assert len(bytes(memoryview(mapping))) == obj.size


def receive_all(sock: socket.socket, as_channel: bool, left: int | None) -> None:
    """Receive until something is refused."""
    receiver = quire.Channel(sock, timeout=TIMEOUT) if as_channel else None
    try:
        for _ in range(4):
            try:
                with few_descriptors(left):
                    obj = receiver.recv() if receiver else quire.recv(sock, timeout=TIMEOUT)
            except (quire.QuireError, EOFError, TimeoutError):
                return
            except OSError as error:
                # With no descriptors left, the kernel's own word is right.
                if left is None or error.errno not in (errno.EMFILE, errno.ENOMEM):
                    raise
                return
            look_at(obj)
    finally:
        if receiver:
            receiver.close()


@given(
    script=steps(),
    as_channel=st.booleans(),
    first=st.booleans(),
    closes=st.booleans(),
    left=st.one_of(st.none(), st.none(), st.none(), st.integers(1, 4)),
    noise=st.binary(min_size=1, max_size=64),
)
def one(
    script: list[Step], as_channel: bool, first: bool, closes: bool, left: int | None, noise: bytes
) -> None:
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    before = descriptors()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(TIMEOUT)
        if first:
            send_step(ours, Step(*FIRST), noise)
        for step in script:
            try:
                send_step(ours, step, noise)
            except OSError as error:
                # The kernel bounds what one sender may have on its way.
                if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS):
                    raise
                break
        if closes:
            ours.close()
        begin = time.monotonic()
        receive_all(theirs, as_channel, left)
        assert time.monotonic() - begin < HANG_SECONDS / 3, "it took far longer than its timeout"
    after = descriptors()
    if after != before:
        gc.collect()
        after = descriptors()
    assert after == before, f"descriptors left open: {set(after.items()) ^ set(before.items())}"
    faulthandler.cancel_dump_traceback_later()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the messages that quire receives over sockets.")
    parser.add_argument("--seconds", type=float, default=60.0)
    end = time.monotonic() + parser.parse_args().seconds
    database = DirectoryBasedExampleDatabase(HERE / "corpus" / "messages")
    rounds = 0
    run = settings(
        max_examples=400,
        deadline=None,
        database=database,
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )(one)
    while time.monotonic() < end:
        run()
        rounds += 1
    print(f"{rounds * 400} conversations, nothing found")


if __name__ == "__main__":
    sys.exit(main())
