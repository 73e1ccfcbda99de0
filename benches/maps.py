"""Reading a process with many VMAs, against psutil."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import psutil

import quire
from benches.common import Peer, Plan, Row, timed

VMAS = 10_000
QUICK_VMAS = 500
GOAL = 3.0
FIGURES = (
    "Rss",
    "Size",
    "Pss",
    "Shared_Clean",
    "Shared_Dirty",
    "Private_Clean",
    "Private_Dirty",
    "Referenced",
    "Anonymous",
    "Swap",
)
"""What psutil gives of each VMA."""
KERNEL = "of that, the kernel: smaps read and thrown away"
EVERY = "every figure of every VMA as a dict of integers (in no figure)"
ADDRESSES = 'detail="maps" (in no figure)'
CHILD = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
count = int(sys.argv[1])
memory = mmap.mmap(-1, count * 2 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for number in range(count):
    memory[number * 2 * mmap.PAGESIZE] = 1
    at = start + number * 2 * mmap.PAGESIZE
    if number % 2 == 0 and libc.mprotect(at, 2 * mmap.PAGESIZE, mmap.PROT_READ):
        sys.exit("mprotect failed")
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def child(vmas: int) -> Iterator[int]:
    """Run a process with at least so many VMAs, half of them read-only, a page of each in memory."""
    command = [sys.executable, "-c", CHILD, str(vmas)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the child with many VMAs did not start")
        yield process.pid
        process.stdin.close()


def ours(pid: int) -> list[list[int]]:
    found = quire.maps(pid)
    return [found.column(key).tolist() for key in FIGURES]


def kernel(pid: int) -> None:
    fd = os.open(f"/proc/{pid}/smaps", os.O_RDONLY)
    try:
        while os.read(fd, 1 << 16):
            pass
    finally:
        os.close(fd)


def measure(plan: Plan) -> list[Row]:
    """Measure one process, the two in turns."""
    vmas = QUICK_VMAS if plan.quick else VMAS
    row = Row(
        f"maps of a process with {vmas} VMAs",
        "All VMAs with address, protection, name and the ten figures that psutil gives, as Python objects:"
        " quire.maps() and the figures as lists; psutil's memory_maps(grouped=False).",
        bounds="The kernel's walk and its text, which both wait for.",
    )
    peer = Peer("psutil", [], GOAL)
    with child(vmas) as pid:
        process = psutil.Process(pid)
        found = quire.maps(pid)
        theirs = process.memory_maps(grouped=False)
        if len(found) != len(theirs) or found.column("Rss").sum() != sum(each.rss for each in theirs):
            raise RuntimeError("quire and psutil do not tell the same")
        for _ in range(3 if plan.quick else 15):
            row.ours.append([timed(lambda: ours(pid))])
            peer.seconds.append(timed(lambda: process.memory_maps(grouped=False)))
            row.part(KERNEL, timed(lambda: kernel(pid)))
            row.part(EVERY, timed(lambda: [vma.counters for vma in found]))
            row.part(ADDRESSES, timed(lambda: quire.maps(pid, detail="maps")))
    row.peers.append(peer)
    return [row]
