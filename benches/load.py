"""``python -m benches.load``: a broker under a fixed rate of requests, with a hostile client beside it.

Requests are due at fixed times, whether or not those before were answered; the latency of each counts from
when it was due. So a broker that stands still for a while is charged for all that was to be asked meanwhile.
"""

import argparse
import os
import select
import socket
import tempfile
import time
from pathlib import Path

import quire
import quire.client
from benches.hostile import KINDS, MIB, Percentiles, broker, hostile
from quire.broker import protocol

CONNECTIONS = 8


class Asker:
    """A connection without a library, so that the client costs little of the machine."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(path)
        self.sock.sendall(protocol.encode(protocol.Hello(1, protocol.VERSION)))
        self.frames = protocol.FrameReader()
        while not list(self.frames.frames()):
            self.frames.feed(self.sock.recv(1 << 16), [])
        self.due: list[float] = []
        self.number = 1

    def room(self) -> int:
        """How many more requests may be without their reply."""
        return protocol.MAX_OUTSTANDING - 1 - len(self.due)

    def ask(self, due: list[float]) -> None:
        """Send empty calls that were due then."""
        frames = b""
        for _ in due:
            self.number += 1
            frames += protocol.encode(protocol.Ping(self.number))
        self.due += due
        self.sock.sendall(frames)

    def take(self) -> list[float]:
        """Read replies; return when they were due."""
        data = self.sock.recv(1 << 16)
        assert data, "the broker closed the connection"
        self.frames.feed(data, [])
        count = sum(1 for _ in self.frames.frames())
        answered, self.due = self.due[:count], self.due[count:]
        return answered


def load(path: str, rate: int, seconds: float) -> tuple[list[float], float]:
    """Ask at a rate; return the latency of each request, and the seconds until the last was answered."""
    askers = [Asker(path) for _ in range(CONNECTIONS)]
    poller = select.poll()
    by_number = {asker.sock.fileno(): asker for asker in askers}
    for number in by_number:
        poller.register(number, select.POLLIN)
    total = int(rate * seconds)
    sent = 0
    latencies: list[float] = []
    began = time.perf_counter()
    while len(latencies) < total:
        wanted = min(total, int((time.perf_counter() - began) * rate) + 1)
        for asker in sorted(askers, key=lambda each: len(each.due)):
            count = min(asker.room(), wanted - sent, 2)
            if count > 0:
                asker.ask([began + (sent + index) / rate for index in range(count)])
                sent += count
        for number, _ in poller.poll(1):
            due = by_number[number].take()
            now = time.perf_counter()
            latencies += [now - each for each in due]
    for asker in askers:
        asker.sock.close()
    return latencies, time.perf_counter() - began


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benches.load", description=__doc__)
    parser.add_argument("--rate", type=int, default=10_000, help="requests a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kind", choices=KINDS, default="floods with empty calls", help="of hostile client")
    parser.add_argument("--alone", action="store_true", help="without a hostile client")
    parser.add_argument("--uid", type=int, default=65534, help="of the hostile client, if this is root")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = str(Path(folder) / "broker")
        with broker(path), quire.connect(path, timeout=60) as owner:
            handle, _lease = owner.memory(64 * MIB, extent_bytes=MIB)
            owner.publish(handle, "memory")
            if options.alone:
                latencies, took = load(path, options.rate, options.seconds)
            else:
                with hostile(path, KINDS[options.kind], options.uid):
                    latencies, took = load(path, options.rate, options.seconds)
    who = "alone" if options.alone else f"beside a client that {options.kind}"
    print(f"{len(latencies)} requests in {took:.1f} s, {len(latencies) / took:,.0f} a second, {who}")
    print("µs from when each was due: median | 90 % | 99 % | 99.9 % | worst")
    print(Percentiles.of(latencies))


if __name__ == "__main__":
    main()
