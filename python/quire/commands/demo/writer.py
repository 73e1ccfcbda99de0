"""The writer: keeps the data, updates it, publishes versions. Run as a program of its own by the command."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quire import PAGE_SIZE, Channel
from quire.commands.demo.data import aggregate, fill, load_file, load_flights
from quire.commands.demo.talk import announce, ask, recv_json, send_json
from quire.commands.demo.updates import updates

if TYPE_CHECKING:
    import numpy.typing as npt

    from quire import Segment, Snapshot
    from quire.commands.demo.data import Column

__all__ = ["Failure", "write"]

PATIENCE_S = 60.0
"""How long a reader may take to connect or to check a version."""
BUCKETS = 256
"""Rows of the picture: parts of the segment whose changed pages are counted together."""
REPLAYED = 8
"""Versions whose pages are changed again for the comparison."""
MEASUREMENTS = 6
"""How often, about, the memory of all processes is looked at."""


class Failure(Exception):  # noqa: N818 -- a result to show, not a mistake of this program
    """A reader disagreed or went away."""


class Peer:
    """A reader, as the writer sees it.

    The socket carries JSON of the demo and messages of the channel in turn; neither reads beyond its own.
    """

    def __init__(self, sock: socket.socket, number: int) -> None:
        sock.settimeout(PATIENCE_S)
        self.sock = sock
        self.channel = Channel(sock, timeout=PATIENCE_S)
        self.number = number
        self.sent_version = 0

    def send(self, version: int, snapshot: Snapshot, aggregates: dict[str, Any]) -> None:
        """Hand over a version; a reader that is gone is a Failure."""
        try:
            header = {"version": version, "aggregates": aggregates, "sent_ns": time.monotonic_ns()}
            send_json(self.sock, header)
            self.channel.send(snapshot)
        except OSError as error:
            raise Failure(f"reader {self.number} is gone before version {version}: {error}") from error
        self.sent_version = version

    def check(self) -> dict[str, Any] | None:
        """Wait for what the reader says of the last version; None if none was sent."""
        if not self.sent_version:
            return None
        try:
            verdict = recv_json(self.sock)
        except (EOFError, OSError) as error:
            raise Failure(
                f"reader {self.number} went away while it had version {self.sent_version}: {error}"
            ) from error
        if verdict["wrong"]:
            raise Failure(
                f"reader {self.number} found version {verdict['version']} inconsistent: "
                + "; ".join(verdict["wrong"][:3])
            )
        return verdict


class Publisher:
    """Publishes the versions of one segment to all readers."""

    def __init__(self, segment: Segment, columns: list[Column], peers: list[Peer]) -> None:
        self.segment = segment
        self.columns = columns
        self.peers = peers
        self.version = 0
        self.last: Snapshot | None = None
        self.replay: list[list[int]] = []

    def publish(self, what: str, update_ns: int, falsify: int | None) -> None:
        """Take a version and hand it to every reader, when all are done with the one before."""
        version = self.version + 1
        # From the writer's own memory, before the version is taken.
        aggregates = aggregate(self.columns, self.segment)
        if version == falsify:
            aggregates[self.columns[-1].name]["checksum"] ^= 1
        started = time.perf_counter_ns()
        snapshot = self.segment.snapshot()
        snapshot_ns = time.perf_counter_ns() - started
        # Until here the readers were reading the version before, while this one was written.
        self.await_readers()
        for peer in self.peers:
            peer.send(version, snapshot, aggregates)
        pages = np.empty(0, np.int64) if self.last is None else changed_pages(self.last, snapshot)
        if self.last is not None:
            self.replay = [*self.replay, pages.tolist()][-REPLAYED:]
            self.last.close()
        self.last, self.version = snapshot, version
        announce(
            "version",
            version=version,
            what=what,
            update_ns=update_ns,
            snapshot_ns=snapshot_ns,
            pages=len(pages),
            layers=snapshot.layers,
            cells=cells(pages, self.segment.size),
        )

    def await_readers(self) -> None:
        """Wait until every reader agreed with the last version, and tell."""
        verdicts = [verdict for peer in self.peers if (verdict := peer.check()) is not None]
        if verdicts:
            announce(
                "agreed",
                version=self.version,
                handover_ns=[verdict["handover_ns"] for verdict in verdicts],
                copied_pages=[verdict["copied_pages"] for verdict in verdicts],
                aggregate_ns=[verdict["aggregate_ns"] for verdict in verdicts],
            )


def changed_pages(before: Snapshot, after: Snapshot) -> npt.NDArray[np.int64]:
    """Return the numbers of the pages that differ."""
    ranges = after.diff(before).array().astype(np.int64) // PAGE_SIZE
    if not len(ranges):
        return np.empty(0, np.int64)
    lengths = ranges[:, 1] - ranges[:, 0]
    skipped = np.repeat(ranges[:, 0] - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
    return np.arange(lengths.sum()) + skipped


def cells(pages: npt.NDArray[np.int64], size_bytes: int) -> list[float]:
    """Return the changed fraction of each of ``BUCKETS`` equal parts of the segment, or of each page."""
    total = -(-size_bytes // PAGE_SIZE)
    buckets = min(BUCKETS, total)
    edges = np.arange(buckets + 1) * total // buckets
    counts, _ = np.histogram(pages, edges)
    return [round(float(share), 4) for share in counts / np.diff(edges)]


def write(config: dict[str, Any]) -> None:
    """Do the writer's part.

    Args:
        config: ``socket``, ``file``, ``scale``, ``versions``, ``readers``, ``falsify``, as the command's.

    Raises:
        Failure: A reader disagreed or went away.
        OSError: The file cannot be read, or there is too little memory.
    """
    announce("step", text="reading the data")
    source = load_flights() if config["file"] is None else load_file(Path(config["file"]))
    scale = config["scale"] or source.default_scale()
    announce("step", text="filling the segment")
    shown = 0

    def progress(fraction: float) -> None:
        nonlocal shown
        if int(fraction * 50) > shown:
            shown = int(fraction * 50)
            announce("progress", fraction=fraction)

    started = time.perf_counter_ns()
    segment, columns = fill(source, scale, progress)
    announce(
        "filled",
        title=source.title,
        scale=scale,
        rows=source.rows * scale,
        size_bytes=segment.size,
        fill_ns=time.perf_counter_ns() - started,
        columns=[column._asdict() for column in columns],
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(config["socket"])
        listener.listen()
        listener.settimeout(PATIENCE_S)
        announce("listening")
        peers = [Peer(listener.accept()[0], number) for number in range(1, config["readers"] + 1)]
        for peer in peers:
            send_json(peer.sock, {"columns": [column._asdict() for column in columns]})
        publisher = Publisher(segment, columns, peers)
        publisher.publish("the data as it is", 0, config["falsify"])
        every = max(1, config["versions"] // MEASUREMENTS)
        for (what, make), version in zip(
            updates(source, columns, segment, seed=2013), range(2, config["versions"] + 1), strict=False
        ):
            started = time.perf_counter_ns()
            make()
            publisher.publish(what, time.perf_counter_ns() - started, config["falsify"])
            if version % every == 0 and version < config["versions"]:
                ask("measure", version=version)
        publisher.await_readers()
        ask("measure", version=publisher.version)
        for peer in peers:
            peer.channel.close()
        ask("published")
        serve_comparison(listener, publisher)


def serve_comparison(listener: socket.socket, publisher: Publisher) -> None:
    """Give the last version, and which pages changed before, to the program that compares."""
    sock, _ = listener.accept()
    sock.settimeout(PATIENCE_S)
    with Channel(sock) as channel:
        send_json(sock, {"replay": publisher.replay})
        assert publisher.last is not None
        channel.send(publisher.last)
        recv_json(sock)


def main() -> int:
    """Run as a program; the configuration is the only argument, in JSON."""
    config = json.loads(sys.argv[1])
    try:
        write(config)
    except Failure as failure:
        announce("failed", text=str(failure))
    except (BrokenPipeError, EOFError):
        # The command is gone, so nobody is left to tell, or to remove the folder of the socket.
        shutil.rmtree(Path(config["socket"]).parent, ignore_errors=True)
        return 1
    except (OSError, MemoryError, ValueError) as error:
        announce("failed", text=f"the writer cannot go on: {type(error).__name__}: {error}")
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
