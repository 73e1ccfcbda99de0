"""Killed writers and readers, too little of everything, and sizes at the edges."""

import os
import resource
import signal
import socket
import subprocess
import sys
import zlib

import numpy as np
import pytest
from support import (
    MIB,
    PAGE,
    TESTS,
    content,
    descriptor_count,
    fork,
    nothing_left,
    pattern,
    run_forked,
    shmem_names,
    status_bytes,
    vma_count,
    wait,
)

import quire

TIB = 1 << 40

WRITER = """
import socket, sys, zlib
import numpy as np, quire
channels = [quire.Channel(socket.socket(fileno=int(fd))) for fd in sys.argv[1:]]
generator = np.random.default_rng(3)
segment = quire.Segment(6 << 20)
array = segment.array(np.uint8)
number = 0
while channels:
    number += 1
    at = generator.integers(4, len(array), 400)
    array[at] += 1
    array[:4].view(np.uint32)[0] = zlib.crc32(array[4:])
    with segment.snapshot() as snapshot:
        for channel in list(channels):
            try:
                channel.send(snapshot)
            except (BrokenPipeError, ConnectionResetError):
                # The reader is gone.
                channels.remove(channel)
                channel.close()
    if number == 1:
        print("ready", flush=True)
"""

READER = """
import socket, sys, zlib
import quire
channel = quire.Channel(socket.socket(fileno=int(sys.argv[1])))
seen = 0
while True:
    try:
        snapshot = channel.recv()
    except (EOFError, quire.Malformed):
        # The writer is gone, maybe in the middle of a message.
        break
    with snapshot.map() as mapping:
        data = mapping[:]
        assert int.from_bytes(data[:4], "little") == zlib.crc32(data[4:]), "a wrong byte"
    seen += 1
    if seen == 1:
        print("ready", flush=True)
print(seen)
"""


@pytest.fixture(autouse=True)
def _nothing_leaks():
    with nothing_left():
        yield


def start(script: str, *sockets: socket.socket) -> subprocess.Popen:
    fds = [sock.fileno() for sock in sockets]
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, fds)],
        pass_fds=fds,
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS,
    )


def spin(rounds: int) -> None:
    """Let a little time pass, of no set length."""
    for _ in range(rounds):
        os.getppid()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("victim", ["writer", "reader"])
def test_kill_at_a_random_moment(victim: str, seed: int) -> None:
    names = shmem_names()
    generator = np.random.default_rng(seed)
    pairs = [socket.socketpair() for _ in range(2)]
    writer = start(WRITER, *(pair[0] for pair in pairs))
    readers = [start(READER, pair[1]) for pair in pairs]
    for pair in pairs:
        pair[0].close()
        pair[1].close()
    processes = [writer, *readers]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        spin(int(generator.integers(0, 300_000)))
        if victim == "reader":
            readers[0].send_signal(signal.SIGKILL)
            assert readers[0].wait() == -signal.SIGKILL
            # The writer and the other reader go on, until the writer is told to end by its last reader's end.
            assert writer.poll() is None
            assert readers[1].poll() is None
            spin(100_000)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        survivors = readers if victim == "writer" else readers[1:]
        for reader in survivors:
            assert int(reader.stdout.read()) >= 1
            assert reader.wait() == 0
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdout.close()
    assert not {name for name in shmem_names() - names if "quire" in name}


def test_a_version_outlives_its_writer() -> None:
    here, there = socket.socketpair()
    with here, there:
        writer = start(WRITER, here)
        here.close()
        with quire.Channel(there) as channel:
            kept = [channel.recv() for _ in range(20)]
            writer.kill()
            writer.wait()
            writer.stdout.close()
            for snapshot in kept:
                data = content(snapshot)
                assert int.from_bytes(data[:4], "little") == zlib.crc32(data[4:])
            assert kept[-1].diff(kept[0])
            with kept[-1].fork() as segment:
                segment[:4] = b"mine"
                assert content(segment.snapshot())[:4] == b"mine"


def many_layers() -> quire.Snapshot:
    with quire.Segment.from_buffer(pattern(MIB, 1)) as segment:
        for number in range(40):
            segment[number * 3 * PAGE] ^= 255
            snapshot = segment.snapshot()
    assert snapshot.layers > 10
    return snapshot


def test_a_reader_with_too_few_descriptors() -> None:
    snapshot = many_layers()
    here, there = socket.socketpair()

    def read() -> None:
        before = descriptor_count()
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (before + 8, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
        with pytest.raises((OSError, quire.Malformed), match=r"RLIMIT_NOFILE|ulimit"):
            quire.recv(there)
        assert descriptor_count() <= before

    with here, there, snapshot:
        quire.send(here, snapshot)
        run_forked(read)


def test_a_writer_with_too_few_descriptors() -> None:
    def write() -> None:
        with quire.Segment.from_buffer(pattern(MIB, 1)) as segment:
            kept = [segment.snapshot()]
            before = segment[:]
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor_count() + 8, hard))
            refused = None
            for number in range(40):
                segment[number * PAGE] ^= 255
                before = segment[:]
                try:
                    kept.append(segment.snapshot())
                except OSError as error:
                    refused = error
                    break
            assert refused is not None
            assert refused.errno == 24, refused
            assert segment[:] == before
            assert len(kept) > 1
            kept[0].close()
            kept.clear()
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            assert content(segment.snapshot()) == before

    run_forked(write)


def test_too_little_address_space() -> None:
    def work() -> None:
        with quire.Segment.from_buffer(pattern(64 * MIB, 1)) as segment, segment.snapshot() as snapshot:
            expected = segment[:100]
            descriptors = descriptor_count()
            vmas = vma_count()
            used = status_bytes("VmSize")
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (used + 32 * MIB, hard))
            for attempt in (
                lambda: quire.Segment(64 * MIB),
                lambda: quire.LiveSegment(64 * MIB),
                snapshot.map,
                snapshot.fork,
            ):
                with pytest.raises(MemoryError):
                    attempt()
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            assert descriptor_count() == descriptors
            assert vma_count() <= vmas + 2
            segment[0] ^= 1
            assert content(segment.snapshot())[1:100] == expected[1:]

    run_forked(work)


def test_one_tebibyte_mostly_holes() -> None:
    shared, private = status_bytes("RssShmem"), status_bytes("RssAnon")
    places = [0, 5 * PAGE, TIB // 3 // PAGE * PAGE, TIB - PAGE]
    with quire.Segment(TIB) as segment:
        empty = segment.snapshot()
        for number, place in enumerate(places):
            segment[place : place + PAGE] = bytes([number + 1]) * PAGE
        first = segment.snapshot()
        expected = [(place, place + PAGE) for place in places]
        assert first.diff(empty) == expected
        assert empty.diff(first) == expected
        segment[places[2]] = 200
        second = segment.snapshot()
        assert second.diff(first) == [expected[2]]
        with second.map() as mapping, second.fork() as child:
            assert mapping[places[2]] == child[places[2]] == 200
            assert mapping[TIB - 1] == 4
            assert mapping[TIB // 2] == 0
            child[TIB // 2] = 9
            third = child.snapshot()
            assert third.diff(second) == [(TIB // 2, TIB // 2 + PAGE)]
            mapping.advance(third)
            assert mapping[TIB // 2] == 9
            run_forked(lambda: segment.__setitem__(places[1], 3))
        for snapshot in (empty, first, second, third):
            snapshot._core.check_invariants()
            assert snapshot.size == TIB
        assert status_bytes("RssShmem") - shared < 8 * MIB
        assert status_bytes("RssAnon") - private < 64 * MIB
        severed = segment.sever()
        assert severed.diff(second) == []
        assert segment[places[2]] == 0


@pytest.mark.parametrize(
    "size", [0, -1, -PAGE, -(1 << 63), 1 << 63, (1 << 63) + 1, 1 << 64, (1 << 64) - 1, 1 << 80]
)
def test_sizes_that_are_none(size: int) -> None:
    with quire.Segment(PAGE) as segment:
        for attempt in (quire.Segment, quire.LiveSegment, segment.grow):
            with pytest.raises(ValueError, match="size"):
                attempt(size)
        assert segment.size == PAGE
        assert content(segment.snapshot()) == bytes(PAGE)


@pytest.mark.parametrize("size", [(1 << 63) - 1, 1 << 62, (1 << 62) + 1, 1 << 48, (1 << 47) - PAGE])
def test_sizes_beyond_the_address_space(size: int) -> None:
    with quire.Segment(PAGE) as segment:
        for attempt in (quire.Segment, segment.grow):
            with pytest.raises((MemoryError, OSError), match=r"."):
                attempt(size)
        with pytest.raises((MemoryError, OSError), match=r"."):
            quire.LiveSegment(size)
        segment[0] = 1
        assert content(segment.snapshot()) == b"\1" + bytes(PAGE - 1)


def test_sizes_that_are_no_numbers() -> None:
    for size in (1.0, "1", None, b"1"):
        with pytest.raises(TypeError):
            quire.Segment(size)


def test_a_killed_child_of_the_writer_disturbs_nothing() -> None:
    with quire.Segment.from_buffer(pattern(MIB, 1)) as segment:
        segment.snapshot()
        ready, ready_child = os.pipe()

        def write() -> None:
            array = segment.array(np.uint8)
            os.write(ready_child, b"r")
            while True:
                array[:] += 1

        child = fork(write)
        try:
            assert os.read(ready, 1) == b"r"
        finally:
            os.kill(child, signal.SIGKILL)
            code = wait(child)
            os.close(ready)
            os.close(ready_child)
        assert code == -signal.SIGKILL
        assert segment[:] == pattern(MIB, 1).tobytes()
        segment[0] ^= 1
        assert content(segment.snapshot()) == segment[:]
