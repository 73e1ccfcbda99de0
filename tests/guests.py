"""Clients in processes of their own that behave well, badly, slowly, or not at all, and what they hold."""

import os
import re
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

from brokers import Child

HELPERS = """
import contextlib
from quire.broker import area, borrowed
ORIGINAL = borrowed.Lease._take_away, borrowed.Lease._map, borrowed.Borrowed._revoke, area.Area._dont_fork
go = threading.Event()
L, S, V, KEPT, CLOSED = {}, {}, [], [], []

def behave(kind):
    "One of: honest, liar, hoarder, slow, mute; all but the first keep what they are asked for."
    take, map_, revoke, dont_fork = ORIGINAL
    if kind == "liar":
        take = lambda self, start, stop: None
    elif kind == "slow":
        def take(self, start, stop):
            go.wait(20)
            ORIGINAL[0](self, start, stop)
    elif kind == "hoarder":
        def map_(self, descriptors):
            KEPT.extend(map(os.dup, descriptors))
            ORIGINAL[1](self, descriptors)
        # What it has reaches its children.
        dont_fork = lambda *_: None
    elif kind == "mute":
        revoke = lambda self, message: None
    borrowed.Lease._take_away, borrowed.Lease._map = take, map_
    borrowed.Borrowed._revoke, area.Area._dont_fork = revoke, staticmethod(dont_fork)

def begin(path, kind):
    global c
    behave("honest")
    while KEPT:
        os.close(KEPT.pop())
    L.clear(); S.clear(); V.clear(); CLOSED.clear(); go.set()
    behave(kind)
    c = client.connect(path)
    return c.number

def attempt(text):
    "Run a line; return the name of what it raised, or an empty string, and its value."
    try:
        return "", eval(text, globals())
    except Exception as error:
        return type(error).__name__, None

def borrow(key, name, start, length):
    handle = c.open(name)
    try:
        L[key] = c.lease(handle, start, length)
    finally:
        c.close_handle(handle)

def give_back(key):
    "Who lies keeps the mapping, so the lease is not forgotten here."
    CLOSED.append(L.pop(key))
    CLOSED[-1].close()

def sums(wanted):
    return [zlib.crc32(L[key].read(a, b - a)) for key, a, b in wanted]

def layers(snapshot):
    return [(s.st_dev, s.st_ino, s.st_size) for s in map(os.fstat, snapshot._core.layer_fds())]

def kept(key, snapshot):
    "Keep a snapshot; say what is in it."
    S[key] = snapshot
    with snapshot.map() as mapping:
        return zlib.crc32(mapping[:])

def fetch(key, name):
    handle = c.open(name)
    try:
        return kept(key, c.fetch(handle))
    finally:
        c.close_handle(handle)

def grant(key, name):
    handle = c.open(name)
    try:
        granted, snapshot = c.grant(handle)
    finally:
        c.close_handle(handle)
    return granted.number, kept(key, snapshot)

def diverge(key, pages, value):
    "Write pages of a snapshot that it has, and keep what comes of it; a draft is not deposited yet."
    segment = S[key].fork()
    for page in pages:
        segment.array("u1")[page * mmap.PAGESIZE] = value
    global draft
    draft = segment.snapshot()
    return layers(draft)

def deposit():
    return c.deposit(draft).number

def current(name):
    handle = c.open(name)
    try:
        version, held, snapshot = c.current(handle)
        c.close_handle(held)
    finally:
        c.close_handle(handle)
    return version, kept("current", snapshot)

def watch(name):
    handle = c.open(name)
    c.subscribe(handle, lambda version: V.append((name, version)))
    return handle.number

def heard(count):
    "Wait until it was told of so many versions."
    end = time.monotonic() + 10
    while len(V) < count and time.monotonic() < end:
        select.select([], [], [], 0.002)
    return list(V)

def reap(children):
    for pid in children:
        # It may be a child of the process that was here before this one.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

def fork():
    pid = os.fork()
    if not pid:
        try:
            while True:
                signal.pause()
        finally:
            os._exit(0)
    return pid
"""

_MAPPED = re.compile(r"^\S+ \S+ ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) +/memfd:quire-lease")


class Guest:
    """A client process, started when it is first needed, and its forked children."""

    def __init__(self, uid: int | None) -> None:
        self.uid = uid
        self._child: Child | None = None
        self.forks: list[int] = []
        self.number = 0
        self.kind = ""

    @property
    def child(self) -> Child:
        if self._child is None:
            child = Child("", self.uid)
            try:
                child(HELPERS)
            except BaseException:
                child.close()
                raise
            self._child = child
        return self._child

    @property
    def pid(self) -> int:
        return self.child.pid

    def begin(self, path: str, kind: str) -> None:
        """Connect, and be of a kind from now on."""
        self.kind = kind
        self.number = self.child(f"begin({path!r}, {kind!r})")

    def leave(self) -> None:
        """Close the connection, politely whatever it was."""
        self.child("behave('honest'); c.close()")
        self.end_forks()

    def attempt(self, text: str) -> tuple[str, object]:
        """Run a line; what it raised, and its value."""
        raised, value = self.child(f"attempt({text!r})")
        return raised, value

    def fork(self) -> int:
        """Have it fork; the child does nothing."""
        pid: int = self.child("fork()")
        self.forks.append(pid)
        return pid

    def end_forks(self) -> None:
        """Kill its children."""
        for pid in self.forks:
            os.kill(pid, signal.SIGKILL)
        if self._child is not None and self._child.process.poll() is None:
            self.child(f"reap({self.forks})")
        self.forks.clear()

    def die(self) -> None:
        """Be killed."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def close(self) -> None:
        """End it and its children."""
        for pid in self.forks:
            os.kill(pid, signal.SIGKILL)
        self.forks.clear()
        self.die()


def crc(data: object) -> int:
    """What the helpers say of content."""
    return zlib.crc32(bytes(data))  # type: ignore[call-overload]


def held(pid: int) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Lent memory that a process can reach: device and inode, and the range; all of a file that is open."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        found = _MAPPED.match(line)
        if found:
            offset, major, minor = (int(each, 16) for each in found.groups()[:3])
            start, _, stop = line.split()[0].partition("-")
            length = int(stop, 16) - int(start, 16)
            yield (os.makedev(major, minor), int(found[4])), offset, offset + length
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        if os.readlink(f"{folder}/{name}").startswith("/memfd:quire-lease"):
            status = os.stat(f"{folder}/{name}")
            yield (status.st_dev, status.st_ino), 0, 1 << 62
