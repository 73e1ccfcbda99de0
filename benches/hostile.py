"""``python -m benches.hostile``: what an honest client of a broker notices of clients that misbehave.

For each kind of misbehaviour two brokers are started. Honest calls to one are timed alone, then beside a
hostile client of the other, then beside one of the same: one after the other in short turns, so that a
machine that is busy elsewhere is busy in all. What the second takes longer than the first is the processors'
doing, what the third takes longer than the second is the broker's.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import quire
import quire.client

MIB = 1 << 20
TURNS = 4

# What the hostile processes do, for ever. `raw()` is a connection without a library that has said Hello.
BEGINNING = """
import array, os, socket, sys, time
import quire
import quire.client
from quire.broker import protocol as p
path = sys.argv[1]
def raw(hello=True):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.settimeout(30)
    while True:
        try:
            s.connect(path)
            break
        except BlockingIOError:
            pass
    if hello:
        s.sendall(p.encode(p.Hello(1, 1)))
        s.recv(1 << 16)
    return s
def ready():
    print("ready", flush=True)
def take(s):
    # Read what has come, and close the descriptors that came with it.
    data, descriptors, _, _ = socket.recv_fds(s, 1 << 16, 253)
    for d in descriptors:
        os.close(d)
    return data
"""

KINDS = {
    "floods with empty calls": """
s = raw(); s.setblocking(False); ready()
frames = p.encode(p.Ping(1)) * 100
import select
while True:
    readable, writable, _ = select.select([s], [s], [])
    if writable:
        try: s.send(frames)
        except BlockingIOError: pass
    if readable: s.recv(1 << 16)
""",
    "floods from 64 connections": """
all = [raw() for _ in range(64)]; ready()
import select
frames = p.encode(p.Ping(1)) * 100
for s in all: s.setblocking(False)
while True:
    readable, writable, _ = select.select(all, all, [])
    for s in writable:
        try: s.send(frames)
        except BlockingIOError: pass
    for s in readable: s.recv(1 << 16)
""",
    "maps and unmaps in a loop": """
c = quire.connect(path); h = c.open("memory"); ready()
while True: c.lease(h).close()
""",
    "makes and destroys a gigabyte in a loop": """
c = quire.connect(path); ready()
while True: c.destroy(c.make(1 << 30))
""",
    "opens handles without end": """
c = quire.connect(path); h = c.open("memory"); ready()
while True:
    try: c.weaken(h, p.Rights.READ)
    except quire.QuotaExceeded: pass
""",
    "holds many leases and lists them": """
c = quire.connect(path)
h, l = c.memory(4096)
c.publish(h, f"mine {os.getpid()}")
others = [quire.connect(path) for _ in range(8)]
kept = []
for o in others:
    g = o.open(f"mine {os.getpid()}")
    s = o._link
    for _ in range(1000): kept.append(s.submit(p.Lease, {"handle": g.number, "offset": 0, "length": 4096}))
    o.ping()
ready()
while True: c.holders(h)
""",
    "gives back every other page of a lease": """
c = quire.connect(path); h, l = c.memory(256 << 20); g = c._link; ready()
while True:
    x = c.lease(h)
    for at in range(0, 256 << 20, 8192):
        try: g.submit(p.Release, {"lease": x._number, "offset": at, "length": 4096})
        except Exception: break
    c.ping(); x.close()
""",
    "ends 4,000 objects at once": """
c = quire.connect(path); f = c.make_factory(); ready()
while True:
    d = quire.connect(path)
    futures = [d._link.submit(p.MakeFactory, {"bank": d.bank.number}) for _ in range(4000)]
    d.ping(); d.close()
""",
    "connects and goes in a loop": """
ready()
while True: raw().close()
""",
    "sends garbage in a loop": """
ready()
while True:
    s = raw()
    s.sendall(b"QB\\1\\0\\0\\xff\\0\\0" + b"\\x91" * 65535); s.close()
""",
    "stalls in the middle of messages": """
all = []
ready()
while True:
    while len(all) < 100:
        s = raw(); s.sendall(b"QB\\1\\0\\x10\\0\\0\\0abc"); all.append(s)
    for s in all: s.recv(1); s.close()
    all = []
""",
    "never reads its replies": """
s = raw(); s.sendall(p.encode(p.Open(2, "memory"))); s.recv(1 << 16); ready(); n = 3
s.settimeout(None)
while True:
    try: s.sendall(p.encode(p.Lease(n, 2, 0, 1 << 20)))
    except OSError: s = raw(); s.sendall(p.encode(p.Open(2, "memory"))); s.recv(1 << 16)
    n += 1
""",
    "sends descriptors that nobody asked for": """
ready(); r, w = os.pipe()
while True:
    s = raw()
    s.sendmsg([p.encode(p.Ping(1), 60)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [r] * 60))])
    s.recv(1 << 16); s.close()
""",
    "has 60,000 mappings and is looked at": """
import mmap
c = quire.connect(path); h, l = c.memory(1 << 20); o = quire.connect(path)
c.publish(h, f"mine {os.getpid()}")
keep = [mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) for _ in range(30000)]
g = o.open(f"mine {os.getpid()}"); ready()
while True:
    x = o.lease(g); c.revoke(h)
""",
    "leases and never acknowledges": """
from quire.broker import borrowed
borrowed.Lease._take_away = lambda self, start, stop: None
borrowed.Borrowed._answer = lambda self, serial, done=True: None
c = quire.connect(path); h, l = c.memory(64 << 20); o = quire.connect(path)
c.publish(h, f"mine {os.getpid()}"); g = o.open(f"mine {os.getpid()}"); ready()
while True:
    x = o.lease(g); c.revoke(h, deadline_ms=1)
""",
    "dies while it leases": """
c = quire.connect(path); h = c.open("memory"); ready()
while True:
    pid = os.fork()
    if pid == 0:
        d = quire.connect(path); g = d.open("memory")
        for _ in range(20): d.lease(g)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
""",
    "is stopped": """
c = quire.connect(path); h = c.open("memory"); l = c.lease(h)
f = c.open("factory"); c.subscribe(f, print); ready()
os.kill(os.getpid(), 19)
""",
}


class Percentiles(NamedTuple):
    """Of seconds."""

    median: float
    p90: float
    p99: float
    p999: float
    worst: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> "Percentiles":
        values = sorted(sample)
        at = [values[min(len(values) - 1, int(len(values) * part))] for part in (0.5, 0.9, 0.99, 0.999)]
        return cls(*at, values[-1])

    def __str__(self) -> str:
        return " | ".join(f"{value * 1e6:,.0f}" for value in self)


@contextlib.contextmanager
def broker(path: str) -> Iterator[None]:
    """Run a broker."""
    process = subprocess.Popen(
        [sys.executable, "-m", "quire", "broker", "--socket", path, "--limit", str(3 << 30)],
        stderr=subprocess.DEVNULL,
    )
    try:
        while not os.path.exists(path):
            assert process.poll() is None, "the broker has ended"
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def hostile(path: str, text: str, uid: int) -> Iterator[subprocess.Popen[str]]:
    """Run a hostile client, in a process group of its own."""
    drop = f"\nos.setuid({uid})\n" if os.getuid() == 0 and uid else "\n"
    process = subprocess.Popen(
        [sys.executable, "-c", BEGINNING + drop + text, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n", f"the hostile client failed: {text}"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def calls(client: quire.client.Client, seconds: float) -> list[float]:
    """Time empty calls, a millisecond apart."""
    sample = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        client.ping()
        sample.append(time.perf_counter() - began)
        time.sleep(0.001)
    return sample


@contextlib.contextmanager
def prepared(path: str) -> Iterator[quire.client.Client]:
    """Run a broker and publish what hostile clients open; yield a connection to it."""
    with broker(path), quire.connect(path, timeout=60) as client:
        handle, _lease = client.memory(64 * MIB, extent_bytes=MIB)
        client.publish(handle, "memory")
        client.publish(client.make_factory(), "factory")
        yield client


def beside(kind: str, seconds: float, uid: int) -> tuple[Percentiles, Percentiles, Percentiles]:
    """Measure an honest client alone, beside a hostile one of another broker, and beside one of its own."""
    samples: list[list[float]] = [[], [], []]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        own, other = str(Path(folder) / "broker"), str(Path(folder) / "other")
        with prepared(own) as client, prepared(other):
            calls(client, 0.1)
            for _ in range(TURNS):
                samples[0] += calls(client, seconds / TURNS)
                for path, sample in ((other, samples[1]), (own, samples[2])):
                    with hostile(path, KINDS[kind], uid) as process:
                        sample.extend(calls(client, seconds / TURNS))
                        if process.poll() is not None:
                            raise RuntimeError(f"the hostile client ended: {kind}")
    alone, elsewhere, together = map(Percentiles.of, samples)
    return alone, elsewhere, together


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benches.hostile", description=__doc__)
    parser.add_argument("--kinds", nargs="*", help="only those whose name has one of these words")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each kind, alone and beside it")
    parser.add_argument("--uid", type=int, default=65534, help="of the hostile client, if this is root")
    options = parser.parse_args()
    print(
        "| a hostile client | median alone, µs | it has another broker | beside it | ratio to alone"
        " | 99 % alone, µs | it has another broker | beside it | worst |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        if options.kinds and not any(word in kind for word in options.kinds):
            continue
        alone, elsewhere, together = beside(kind, options.seconds, options.uid)
        medians = " | ".join(f"{each.median * 1e6:.0f}" for each in (alone, elsewhere, together))
        p99s = " | ".join(f"{each.p99 * 1e6:.0f}" for each in (alone, elsewhere, together))
        ratio = together.median / alone.median
        print(
            f"| {kind} | {medians} | {ratio:.1f} | {p99s} | {together.worst * 1e6:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
