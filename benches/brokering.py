"""What a broker costs: a call, a lease, a version published, against Redis with shared_memory and Ray."""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import quire
import quire.client
from benches import raypeer
from benches.common import MIB, Peer, Plan, Row, timed

CALLS = 50

# Both say what they are ready for, and that they have it, with a byte on standard output.
SUBSCRIBER = """
import sys
import quire
from quire import client
c = client.connect(sys.argv[1])
factory = c.open("factory")
def told(version):
    number, handle, snapshot = c.current(factory)
    with snapshot, snapshot.map() as mapping:
        assert mapping[0] == 1
        sys.stdout.buffer.write(b".")
        sys.stdout.buffer.flush()
    c.close_handle(handle)
c.subscribe(factory, told)
sys.stdin.read()
"""
ATTACHER = """
import sys
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
import redis
# The block belongs to whoever made it.
resource_tracker.register = lambda *_: None
pubsub = redis.Redis(unix_socket_path=sys.argv[1]).pubsub()
pubsub.subscribe("versions")
for message in pubsub.listen():
    if message["type"] == "message":
        block = SharedMemory(message["data"].decode())
        assert block.buf[0] == 1
        block.close()
    sys.stdout.buffer.write(b".")
    sys.stdout.buffer.flush()
"""


class Listener:
    """A process that is told of versions."""

    def __init__(self, program: str, path: str) -> None:
        argv = [sys.executable, "-c", program, path]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.wait_told()

    def wait_told(self) -> None:
        """Wait until it has what it was told of."""
        assert self.process.stdout
        assert os.read(self.process.stdout.fileno(), 1) == b".", "the listener has ended"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def redis_server(folder: str) -> Iterator[Any]:
    """Run a Redis server on a Unix socket and connect; yield why not, if it cannot be."""
    try:
        import redis
    except ImportError as error:
        yield f"Redis' client is not installed ({error}), so it was not measured: it is in the extra `bench`."
        return
    program = shutil.which("redis-server")
    if program is None:
        yield "There is no redis-server here, so it was not measured: it is in Debian's package redis-server."
        return
    path = str(Path(folder) / "redis")
    options = ["--port", "0", "--unixsocket", path, "--save", "", "--dir", folder]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        while not os.path.exists(path):
            assert server.poll() is None, "redis-server has ended"
            time.sleep(0.01)
        with redis.Redis(unix_socket_path=path) as connection:
            connection.ping()
            yield connection
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def _without_ray() -> Iterator[str]:
    yield "Ray was left out (--without-ray)."


def _attach(connection: Any) -> None:
    """Ask Redis for the name of a block, attach it and read a byte."""
    block = SharedMemory(connection.get("block").decode())
    assert block.buf[0] == 1
    block.close()


def measure(plan: Plan) -> list[Row]:
    """Measure the three rows in interleaved rounds."""
    size = f"{plan.size_bytes // MIB} MiB"
    call = Row(
        "An empty call of a broker",
        "From the call until its answer, blocking, over a Unix socket; Redis PING likewise; for Ray a method"
        " of an actor that returns nothing.",
    )
    lease = Row(
        f"A lease of {size}, mapped, and one byte of it read",
        "For Redis with shared_memory: GET of a block's name, attach it, read a byte; everybody can write"
        " to the block, and it cannot be taken back. For Ray: `ray.get` of a stored object inside an actor.",
    )
    version = Row(
        f"A version of {size} published, until a subscriber has mapped it and read a byte",
        "From the call of Client.put, with a snapshot that is there, until another process was told of it"
        " and has fetched, verified and mapped it and answered. For Redis: PUBLISH the name of a block that"
        " is filled already, until the subscriber has attached it; nothing is verified. For Ray: calling"
        " the actor with a reference to an object that is stored already.",
    )
    rows = [call, lease, version]
    rounds = plan.handovers
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = str(Path(folder) / "broker")
        limit = str(3 * plan.size_bytes + 256 * MIB)
        broker = subprocess.Popen(
            [sys.executable, "-m", "quire", "broker", "--socket", path, "--limit", limit]
        )
        stack.callback(broker.wait)
        stack.callback(broker.terminate)
        while not os.path.exists(path):
            assert broker.poll() is None, "the broker has ended"
            time.sleep(0.01)
        client = stack.enter_context(quire.client.connect(path, timeout=60))
        handle, mine = client.memory(plan.size_bytes)
        with mine.writing() as rw:
            rw[0] = 1
        factory = client.make_factory()
        client.publish(factory, "factory")
        segment = stack.enter_context(quire.Segment(plan.size_bytes))
        segment[0] = 1
        segment.array("u8")[1:] = 1
        snapshot = segment.snapshot()
        client.put(factory, snapshot)
        subscriber = Listener(SUBSCRIBER, path)
        stack.callback(subscriber.close)
        redis = stack.enter_context(redis_server(folder))
        getter = stack.enter_context(raypeer.started(plan.size_bytes) if plan.with_ray else _without_ray())
        block = SharedMemory(create=True, size=plan.size_bytes)
        stack.callback(block.unlink)
        stack.callback(block.close)
        block.buf[0] = 1
        attacher = None
        if isinstance(redis, str):
            for row in rows:
                row.notes.append(redis)
        else:
            redis.set("block", block.name)
            attacher = Listener(ATTACHER, redis.connection_pool.connection_kwargs["path"])
            stack.callback(attacher.close)
            for row, name in zip(rows, ("PING", "GET and attach", "PUBLISH and attach"), strict=True):
                row.peers.append(Peer(f"Redis, {name}", []))
        if isinstance(getter, str):
            for row in rows:
                row.notes.append(getter)
        else:
            names = ("an empty call of an actor", "get of an object already stored", "calling the actor")
            for row, name in zip(rows, names, strict=True):
                row.peers.append(Peer(f"Ray, {name}", []))

        def take() -> None:
            with client.lease(handle) as lent:
                assert lent[0] == 1

        for number in range(rounds + 1):
            call_group = [timed(client.ping) for _ in range(CALLS)]
            lease_group = [timed(take) for _ in range(CALLS)]
            segment[4096] = number
            with segment.snapshot() as following:
                start = time.perf_counter()
                client.put(factory, following)
                subscriber.wait_told()
                version_group = [time.perf_counter() - start]
            theirs: list[list[float]] = [[], [], []]
            if attacher is not None:
                theirs[0].append(statistics.median(timed(redis.ping) for _ in range(CALLS)))
                theirs[1].append(statistics.median(timed(lambda: _attach(redis)) for _ in range(CALLS)))
                start = time.perf_counter()
                redis.publish("versions", block.name)
                attacher.wait_told()
                theirs[2].append(time.perf_counter() - start)
            if not isinstance(getter, str):
                theirs[0].append(getter.empty())
                got = getter.get()
                theirs[1].append(got.call)
                theirs[2].append(got.whole)
            if number == 0:
                # The first round warms.
                continue
            for row, ours, figures in zip(
                rows, (call_group, lease_group, version_group), theirs, strict=True
            ):
                row.ours.append(ours)
                for peer, seconds in zip(row.peers, figures, strict=True):
                    peer.seconds.append(seconds)
    call.bounds = "Python at both ends: an event loop and decoding; the rest is two changes of process"
    return rows
