"""``python -m benches.lending``: many processes lease the same memory, and it is taken back from two of them.

One complies, one says that it does and keeps its mapping. Measured is what the others notice: faults of
their own threads, and changed bytes; both are to be none. Pages that the library's thread maps for them are
counted apart.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import quire

MIB = 1 << 20

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


def measure(clients: int, size: int) -> list[str]:
    """Lend memory to so many processes, take it back from two, and say what that took and did."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "broker")
        limit = str(size + 256 * MIB)
        broker = subprocess.Popen(
            [sys.executable, "-m", "quire", "broker", "--socket", path, "--limit", limit]
        )
        lessees: list[Client] = []
        try:
            while not os.path.exists(path):
                assert broker.poll() is None, "the broker has ended"
            with quire.connect(path, timeout=120) as owner:
                began = time.perf_counter()
                handle, lease = owner.memory(size)
                lines.append(f"make and map {size >> 20} MiB: {time.perf_counter() - began:.3f} s")
                with lease.writing() as rw:
                    view = rw.array("u8")
                    view[:] = np.arange(len(view), dtype=np.uint64)
                    expected = int(view[::512].sum())
                    del view
                owner.publish(handle, "memory")
                opened = owner.open("memory")
                pings, leases = [], []
                for _ in range(300):
                    began = time.perf_counter()
                    owner.ping()
                    pings.append(time.perf_counter() - began)
                for _ in range(30):
                    began = time.perf_counter()
                    lent = owner.lease(opened)
                    leases.append(time.perf_counter() - began)
                    lent.close()
                lines.append(
                    f"empty call: {statistics.median(pings) * 1e6:.0f} us; "
                    f"lease of {size >> 20} MiB: {statistics.median(leases) * 1e6:.0f} us"
                )
                lessees = [Client(path, "liar" if number == 1 else "honest") for number in range(clients)]
                first = [each.look() for each in lessees]
                assert {each.total for each in first} == {expected}
                second = [each.look() for each in lessees]
                began = time.perf_counter()
                polite = owner.revoke(handle, client=first[0].client, deadline_ms=5000)
                took = time.perf_counter() - began
                lines.append(
                    f"take back from who complies ({polite.outcomes[0].result}): {took * 1e3:.1f} ms"
                )
                began = time.perf_counter()
                forced = owner.revoke(handle, client=first[1].client, deadline_ms=5000)
                took = time.perf_counter() - began
                lines.append(f"take back from who does not ({forced.outcomes[0].result}): {took:.2f} s")
                third = [each.look() for each in lessees[2:]]
                changed = sum(each.total != expected for each in third)
                touching = [each.after_looking - each.before_looking for each in third]
                waiting = [a.before_looking - b.after_looking for a, b in zip(third, second[2:], strict=True)]
                mapping = [a.process_before - b.process_after for a, b in zip(third, second[2:], strict=True)]
                lines.append(
                    f"the other {len(third)}: changed bytes seen by {changed}; "
                    f"faults when they touched every page again: {max(touching)} at most; "
                    f"of their own threads meanwhile: {max(waiting)} at most; "
                    f"of the library's thread, which maps the pages: {statistics.median(mapping):.0f} each"
                )
        finally:
            for each in lessees:
                each.process.kill()
                each.process.communicate()
            broker.terminate()
            broker.wait()
    return lines


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benches.lending", description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--mib", type=int, default=1024)
    options = parser.parse_args()
    for line in measure(options.clients, options.mib * MIB):
        print(line)


if __name__ == "__main__":
    main()
