"""``python -m benches.lending``: many processes lease the same memory, and it is taken back from two of them.

One complies, one says that it does and keeps its mapping. Measured is what the others notice: faults of
their own threads, faults of the whole process, and changed bytes; all are to be none.
"""

import argparse
import contextlib
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import quire
import quire.client
from benches.common import MIB, Plan, Row, timed
from quire.broker.operations import Handle

CLIENT = """
import sys, threading
import numpy as np
from quire import client
if sys.argv[2] == "liar":
    from quire.broker import borrowed
    borrowed.Lease._take_away = lambda self, start, stop: None
def faults(task):
    fields = open(f"/proc/self/{task}/stat").read().rsplit(")", 1)[1].split()
    return int(fields[7]) + int(fields[9])
c = client.connect(sys.argv[1], timeout=120)
lease = c.lease(c.open("memory"))
pages = lease.array("u8")[::512]
out = np.zeros_like(pages)
def look():
    np.copyto(out, pages)
    return int(out.sum())
own = f"task/{threading.get_native_id()}"
look()
for line in sys.stdin:
    before, whole = faults(own), faults(".")
    total = look()
    print(c.number, total, before, faults(own), whole, faults("."), flush=True)
"""


class Answer(NamedTuple):
    """What one client sees."""

    client: int
    total: int
    before_looking: int
    after_looking: int
    process_before: int
    process_after: int


class Client:
    """A process that has the memory mapped and looks at it when asked."""

    def __init__(self, path: str, kind: str) -> None:
        argv = [sys.executable, "-c", CLIENT, path, kind]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def look(self) -> Answer:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Answer(*map(int, self.process.stdout.readline().split()))

    def close(self) -> None:
        """End it; it has nothing to say any more."""
        self.process.kill()
        self.process.communicate()


class Noticed(NamedTuple):
    """What clients from whom nothing was taken saw while it was taken from somebody else, the worst of them.

    Attributes:
        changed: How many of them saw a changed byte.
        touching: Faults when they touched every page again.
        waiting: Faults of their own threads before that.
        process: Faults of the whole process, with the library's thread, which maps the pages.
    """

    changed: int
    touching: int
    waiting: int
    process: int


class Lending:
    """A broker, an owner, memory, and processes that have it mapped and have touched every page."""

    def __init__(self, stack: contextlib.ExitStack, honest: int, size: int) -> None:
        """Lend ``size`` bytes to ``honest`` processes; all ends with the stack."""
        self._stack = stack
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        self._path = str(Path(folder) / "broker")
        limit = str(size + 256 * MIB)
        self.broker = subprocess.Popen(
            [sys.executable, "-m", "quire", "broker", "--socket", self._path, "--limit", limit],
            stderr=subprocess.DEVNULL,
        )
        stack.callback(self.broker.wait)
        stack.callback(self.broker.terminate)
        while not os.path.exists(self._path):
            assert self.broker.poll() is None, "the broker has ended"
        self.owner: quire.client.Client = stack.enter_context(quire.connect(self._path, timeout=120))
        made: list[tuple[Handle, quire.client.Lease]] = []
        self.making = timed(lambda: made.append(self.owner.memory(size)))
        self.handle, lease = made[0]
        with lease.writing() as rw:
            view = rw.array("u8")
            view[:] = np.arange(len(view), dtype=np.uint64)
            self.expected = int(view[::512].sum())
            del view
        self.owner.publish(self.handle, "memory")
        self.honest = [self.add("honest") for _ in range(honest)]
        # Once to touch every page, once to see what looking costs by itself.
        for _ in range(2):
            self.before = [each.look() for each in self.honest]

    def add(self, kind: str) -> Client:
        """Start a client, honest or a liar."""
        client = Client(self._path, kind)
        self._stack.callback(client.close)
        return client

    def take_back(self, kind: str) -> float:
        """Have one more client lease it all, and take it back from that one; return the seconds."""
        client = self.add(kind)
        first = client.look()
        assert first.total == self.expected
        began = time.perf_counter()
        taken = self.owner.revoke(self.handle, client=first.client, deadline_ms=5000)
        seconds = time.perf_counter() - began
        (outcome,) = taken.outcomes
        assert outcome.result == ("cut" if kind == "liar" else "released"), outcome
        client.close()
        return seconds

    def noticed(self) -> Noticed:
        """What the honest ones saw since the last look."""
        now = [each.look() for each in self.honest]
        pairs = list(zip(now, self.before, strict=True))
        self.before = now
        return Noticed(
            sum(each.total != self.expected for each in now),
            max(each.after_looking - each.before_looking for each in now),
            max(a.before_looking - b.after_looking for a, b in pairs),
            max(a.process_before - b.process_after for a, b in pairs),
        )

    def processor_seconds(self) -> float:
        """Processor time that the broker and the honest clients have used so far."""
        brokers = Path(f"/proc/{self.broker.pid}/task/{self.broker.pid}/children").read_text().split()
        pids = [*brokers, *(str(each.process.pid) for each in self.honest)]
        fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def lending(honest: int, size: int) -> Iterator[Lending]:
    """Lend memory for a block."""
    with contextlib.ExitStack() as stack:
        yield Lending(stack, honest, size)


def _map_small(size: int) -> list[float]:
    """How long one process takes to map memory in pages of 4 KiB, and to unmap it, three times."""
    descriptor = os.memfd_create("small")
    try:
        os.posix_fallocate(descriptor, 0, size)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return [timed(lambda: mmap.mmap(descriptor, size, flags, mmap.PROT_READ).close()) for _ in range(3)]
    finally:
        os.close(descriptor)


def measure(plan: Plan) -> list[Row]:
    """Measure the row on taking memory back by force."""
    honest, rounds = (3, 1) if plan.quick else (16, 5)
    row = Row(
        f"{plan.size_bytes // MIB} MiB taken back by force from one of {honest + 1} processes",
        "From the call of Client.revoke to its return. The process has said that it gave the memory back and"
        " has not, so the broker moves everybody else to a copy and cuts the old pages off.",
        bounds="Making the copy: clearing and copying pages. With many processes their waking up and their"
        " Python, and where the kernel has no huge pages left, the entries of the page tables of each.",
    )
    with lending(honest, plan.size_bytes) as lent:
        for _ in range(rounds):
            row.part("the same from one that complies", lent.take_back("honest"))
            before = lent.processor_seconds()
            row.ours.append([lent.take_back("liar")])
            row.part("processor time of the broker and the others", lent.processor_seconds() - before)
            row.part(
                "bare: one process maps and unmaps as much in pages of 4 KiB",
                statistics.median(_map_small(plan.size_bytes)),
            )
            noticed = lent.noticed()
            row.notes.append(
                f"Of {honest} others {noticed.changed} saw a changed byte. Faults, in one process at most:"
                f" {noticed.process} while the memory was moved, {noticed.touching} when it touched every"
                " page again."
            )
    row.notes = list(dict.fromkeys(row.notes))
    return [row]


def report(clients: int, size: int) -> list[str]:
    """Lend memory to so many processes, take it back from two, and say what that took and did."""
    with lending(clients - 2, size) as lent:
        lines = [f"make and map {size // MIB} MiB: {lent.making:.3f} s"]
        opened = lent.owner.open("memory")
        pings = [timed(lent.owner.ping) for _ in range(300)]
        leases = []
        for _ in range(30):
            began = time.perf_counter()
            borrowed = lent.owner.lease(opened)
            leases.append(time.perf_counter() - began)
            borrowed.close()
        lines.append(
            f"empty call: {statistics.median(pings) * 1e6:.0f} us; "
            f"lease of {size // MIB} MiB: {statistics.median(leases) * 1e6:.0f} us"
        )
        lines.append(f"take back from who complies: {lent.take_back('honest') * 1e3:.1f} ms")
        before = lent.processor_seconds()
        seconds = lent.take_back("liar")
        used = lent.processor_seconds() - before
        lines.append(
            f"take back from who does not: {seconds:.2f} s; processor time of all others: {used:.2f} s"
        )
        noticed = lent.noticed()
        lines.append(
            f"the other {len(lent.honest)}: changed bytes seen by {noticed.changed}; "
            f"faults when they touched every page again: {noticed.touching} at most; "
            f"of their own threads meanwhile: {noticed.waiting} at most; "
            f"of the whole process meanwhile: {noticed.process} at most"
        )
        return lines


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benches.lending", description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--mib", type=int, default=1024)
    options = parser.parse_args()
    for line in report(options.clients, options.mib * MIB):
        print(line)


if __name__ == "__main__":
    main()
