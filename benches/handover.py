"""Handing memory to another process, against shared_memory and Ray."""

import contextlib
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory

import numpy as np

import quire
from benches import raypeer
from benches.common import (
    MIB,
    PAGE,
    Peer,
    Plan,
    Row,
    Words,
    fill,
    median_of,
    places,
    store,
    timed,
    warm,
    warm_for_version,
)
from benches.receiving import Receiver, contents

PER_ROUND = 5
VERSIONS = 10
INSIDE = "recv, map and the byte, timed in the receiver as Ray's get is"


def hand_over(receiver: Receiver, snapshot: quire.Snapshot, row: Row | None = None) -> float:
    """Send a snapshot; return the seconds until the other process has mapped it and read a byte."""
    start = time.perf_counter()
    quire.send(receiver.sock, snapshot)
    seconds = receiver.wait_mapped() - start
    inside = receiver.wait_idle()
    if row is not None:
        row.part(INSIDE, inside)
    return seconds


def _ping(receiver: Receiver) -> float:
    start = time.perf_counter()
    receiver.sock.sendall(b"p")
    seconds = receiver.wait_mapped() - start
    receiver.wait_idle()
    return seconds


def _attach(receiver: Receiver, block: SharedMemory) -> float:
    receiver.sock.sendall(block.name.encode())
    return receiver.wait_mapped()


def _reused(receiver: Receiver, block: SharedMemory, source: Words) -> float:
    target = np.frombuffer(contents(block), "u8", len(source))
    start = time.perf_counter()
    np.copyto(target, source)
    seconds = _attach(receiver, block) - start
    receiver.wait_idle()
    del target
    return seconds


def _fresh(receiver: Receiver, source: Words) -> float:
    warm(source.nbytes)
    start = time.perf_counter()
    block = SharedMemory(create=True, size=source.nbytes)
    target = np.frombuffer(contents(block), "u8", len(source))
    np.copyto(target, source)
    seconds = _attach(receiver, block) - start
    receiver.wait_idle()
    del target
    block.close()
    block.unlink()
    return seconds


def measure(plan: Plan) -> list[Row]:
    """Measure a whole snapshot, one with scattered versions on top, and a channel's next version."""
    size = f"{plan.size_bytes // MIB} MiB"
    first = Row(
        f"A snapshot of {size}, handed to another process, verified and mapped",
        "From the call of send, over a Unix socket to a process that waits, until its answer has come: it has"
        " received and verified the snapshot, mapped it and read a byte. For shared_memory: from before the"
        " copy into the block until the answer that the other process has attached it and read a byte. For"
        " Ray: `ray.get` alone, as timed inside an actor, of an object that is in the store, and reading a"
        " byte. Descriptors and mappings are given up after the answer, outside the time.",
    )
    scattered = Row(
        f"The same, with {VERSIONS} versions of 1 % scattered changes on top",
        "As above. Each version was made from the one before, with 1 % of the pages changed at random.",
    )
    following = Row(
        "A channel's next version, 1 % of pages changed at random",
        "From the call of Channel.send until the other process has received and verified the version,"
        " advanced its mapping of the one before to it, and read a byte.",
    )
    segment = quire.Segment(plan.size_bytes)
    words: Words = segment.array("u8")
    fill(words)
    base = segment.snapshot()
    pages = plan.size_bytes // PAGE
    changed = pages // 100
    rng = np.random.default_rng(21)
    newest = base.fork()
    # The versions on top are made on a fork, and `base` stays what it is.
    newer: Words = newest.array("u8")
    versions = []
    for value in range(VERSIONS):
        store(newer, places(rng, pages, changed), value)
        versions.append(newest.snapshot())
    top = versions[-1]
    for version in versions[:-1]:
        version.close()

    reused = Peer("shared_memory, copy in and attach, reused block", [], 50.0)
    fresh = Peer("shared_memory, copy in and attach, fresh block", [], 500.0)
    stored = Peer("Ray, get of an object already stored", [], 1.5)
    whole = Peer("Ray, calling the actor that gets it", [])
    source: Words = np.zeros(plan.size_bytes // 8, "u8")
    fill(source)
    block = SharedMemory(create=True, size=plan.size_bytes)
    with (
        Receiver("snapshot") as receiver,
        Receiver("channel") as channel_receiver,
        Receiver("block") as attacher,
        Receiver("ping") as pinger,
        raypeer.started(plan.size_bytes) if plan.with_ray else _without() as getter,
    ):
        channel = quire.Channel(channel_receiver.sock)
        for number in range(plan.handovers + 1):
            warm(64 * MIB)
            whole_group = [hand_over(receiver, base, first) for _ in range(PER_ROUND)]
            scattered_group = [hand_over(receiver, top, scattered) for _ in range(PER_ROUND)]
            warm_for_version(changed)
            store(newer, places(rng, pages, changed), 1000 + number)
            version = newest.snapshot()
            start = time.perf_counter()
            channel.send(version)
            next_version = channel_receiver.wait_mapped() - start
            channel_receiver.wait_idle()
            version_layers = version.layers
            version.close()
            by_reused = _reused(attacher, block, source)
            by_fresh = _fresh(attacher, source)
            by_ray = None if isinstance(getter, str) else getter.get()
            # What the first round maps is mapped again later; it warms everything.
            if number == 0:
                continue
            first.ours.append(whole_group)
            scattered.ours.append(scattered_group)
            following.ours.append([next_version])
            reused.seconds.append(by_reused)
            fresh.seconds.append(by_fresh)
            if by_ray:
                stored.seconds.append(by_ray.call)
                whole.seconds.append(by_ray.whole)
            first.part("a byte to another process and one back, bare socket", _ping(pinger))
            for row, snapshot in ((first, base), (scattered, top)):
                row.part("verify(), in this process", timed(snapshot.verify))
                start = time.perf_counter()
                mapping = snapshot.map()
                row.part("map(), in this process", time.perf_counter() - start)
                mapping.close()
        if isinstance(getter, str):
            first.notes.append(getter)
        channel.close()
    first.peers = [peer for peer in (reused, fresh, stored, whole) if peer.seconds]
    first.notes.append(f"The snapshot has {base.layers} layers; each is a descriptor that travels.")
    scattered.notes.append(f"The snapshot has {top.layers} layers.")
    following.notes.append(
        f"The last version had {version_layers} layers; the channel sends those that the peer has not."
    )
    first.bounds = "; ".join(f"{name}: {1e3 * median_of(each):.3f} ms" for name, each in first.parts.items())
    block.close()
    block.unlink()
    del words, newer
    newest.close()
    segment.close()
    return [first, scattered, following]


@contextlib.contextmanager
def _without() -> Iterator[str]:
    yield "Ray was left out of this run."
