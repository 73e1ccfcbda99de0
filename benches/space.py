"""The model of an address space with 65,000 VMAs, against plain interval sets and the kernel itself."""

import random
import time
from collections.abc import Iterator

from intervaltree import IntervalTree
from sortedcontainers import SortedDict

from benches.common import PAGE, Peer, Plan, Row
from quire.space import AddressSpace, Rules
from quire.space.constants import (
    MADV_DONTNEED,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
)
from quire.space.native import CallList

BASE = 0x1000_0000_0000
VMAS = 65_000
ROUNDS = 20
OPERATIONS = 1_000_000
KERNEL_OPERATIONS = 20_000
TREE_OPERATIONS = 1_000
QUICK_VMAS, QUICK_OPERATIONS = 2_000, 6_000
FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
READ, BOTH = PROT_READ, PROT_READ | PROT_WRITE
NO_FILE = (1 << 64) - 1

# A slot has two pages that are mapped or not, and two that never are.
SLOT = 4 * PAGE
SIZE = 2 * PAGE
FIND, TOGGLE, PROTECT = range(3)

Operation = tuple[int, int]


def operations(rng: random.Random, slots: int, count: int) -> list[Operation]:
    """What is done, and in which slot: half are look-ups, a quarter maps or unmaps, a quarter protects."""
    kinds = rng.choices((FIND, TOGGLE, PROTECT), (2, 1, 1), k=count)
    return [(kind, BASE + rng.randrange(slots) * SLOT) for kind in kinds]


class Model:
    """Ours: all rules, merging and pages included."""

    def __init__(self, slots: int) -> None:
        self.space = AddressSpace(Rules())
        for slot in range(slots):
            self.space.mmap(BASE + slot * SLOT, SIZE, BOTH, FLAGS)

    def run(self, work: list[Operation]) -> None:
        space = self.space
        for kind, address in work:
            vma = space.at(address)
            if kind == FIND:
                continue
            if kind == TOGGLE:
                if vma is None:
                    space.mmap(address, SIZE, BOTH, FLAGS)
                else:
                    space.munmap(address, SIZE)
            elif vma is not None:
                space.mprotect(address, SIZE, READ if vma.flags & PROT_WRITE else BOTH)


class Sorted:
    """Starts, ends and protections in a SortedDict: no rules, no merging, no pages."""

    def __init__(self, slots: int) -> None:
        self.map = SortedDict(
            (BASE + slot * SLOT, (BASE + slot * SLOT + SIZE, BOTH)) for slot in range(slots)
        )

    def run(self, work: list[Operation]) -> None:
        ranges = self.map
        for kind, address in work:
            index = ranges.bisect_right(address) - 1
            found = None
            if index >= 0:
                start, (end, prot) = ranges.peekitem(index)
                if address < end:
                    found = start
            if kind == FIND:
                continue
            if kind == TOGGLE:
                if found is None:
                    ranges[address] = (address + SIZE, BOTH)
                else:
                    del ranges[found]
            elif found is not None:
                ranges[found] = (end, READ if prot & PROT_WRITE else BOTH)


class Tree:
    """The same in an IntervalTree."""

    def __init__(self, slots: int) -> None:
        self.tree = IntervalTree.from_tuples(
            (BASE + slot * SLOT, BASE + slot * SLOT + SIZE, BOTH) for slot in range(slots)
        )

    def run(self, work: list[Operation]) -> None:
        tree = self.tree
        for kind, address in work:
            found = next(iter(tree.at(address)), None)
            if kind == FIND:
                continue
            if kind == TOGGLE:
                if found is None:
                    tree.addi(address, address + SIZE, BOTH)
                else:
                    tree.remove(found)
            elif found is not None:
                tree.remove(found)
                tree.addi(found.begin, found.end, READ if found.data & PROT_WRITE else BOTH)


def kernel_seconds(calls: CallList, slots: int, work: list[Operation]) -> float:
    """Let a process that runs nothing else map all slots and do the work; return how long that took."""
    calls.begin(1, [])
    for slot in range(slots):
        calls.call("mmap", BASE + slot * SLOT, SIZE, BOTH, FLAGS, NO_FILE, 0)
    there = dict.fromkeys((BASE + slot * SLOT for slot in range(slots)), BOTH)
    for kind, address in work:
        prot = there.get(address, 0)
        if kind == FIND:
            # Nothing finds and does no more: this finds, and drops pages that are not there.
            calls.call("madvise", address, SIZE, MADV_DONTNEED)
        elif kind == TOGGLE:
            if prot:
                calls.call("munmap", address, SIZE)
                there[address] = 0
            else:
                calls.call("mmap", address, SIZE, BOTH, FLAGS, NO_FILE, 0)
                there[address] = BOTH
        elif prot:
            there[address] = READ if prot & PROT_WRITE else BOTH
            calls.call("mprotect", address, SIZE, there[address])
    start = time.perf_counter()
    calls.run()
    return time.perf_counter() - start


def each(run: "Model | Sorted | Tree", work: list[Operation]) -> float:
    """Return the seconds for one operation."""
    start = time.perf_counter()
    run.run(work)
    return (time.perf_counter() - start) / len(work)


def blocks(rng: random.Random, slots: int, rounds: int, count: int) -> Iterator[list[Operation]]:
    """Yield the work of each round."""
    for _ in range(rounds):
        yield operations(rng, slots, count)


def measure(plan: Plan) -> list[Row]:
    """Measure random operations on many VMAs."""
    slots = QUICK_VMAS if plan.quick else VMAS
    rounds = 2 if plan.quick else ROUNDS
    total = QUICK_OPERATIONS if plan.quick else OPERATIONS
    for_kernel = min(total // rounds, KERNEL_OPERATIONS)
    for_tree = min(total // rounds, TREE_OPERATIONS)
    row = Row(
        f"model of an address space, one of {total} operations on {slots} VMAs",
        "Half look-ups, a quarter mmap or munmap, a quarter mprotect, of two pages at random places. Peers of"
        " sortedcontainers and intervaltree keep ranges and protections only: no rules, no merging, no pages."
        f" A round of intervaltree is {for_tree} operations, one of the kernel {for_kernel}, made by a"
        " process that runs nothing else (madvise for a look-up), less the same without them.",
    )
    rng = random.Random(65)
    ours, sorted_ranges, tree = Model(slots), Sorted(slots), Tree(slots)
    sorted_peer = Peer("ranges in sortedcontainers", [])
    tree_peer = Peer("ranges in intervaltree", [])
    kernel_peer = Peer("the kernel itself", [])
    with CallList() as calls:
        for work in blocks(rng, slots, rounds, total // rounds):
            row.ours.append([each(ours, work)])
            sorted_peer.seconds.append(each(sorted_ranges, work))
            tree_peer.seconds.append(each(tree, work[:for_tree]))
            with_work = kernel_seconds(calls, slots, work[:for_kernel])
            seconds = with_work - kernel_seconds(calls, slots, [])
            # A difference of two runs can come out below what a call takes.
            kernel_peer.seconds.append(max(seconds / for_kernel, 1e-8))
    finds = [(FIND, address) for _, address in operations(rng, slots, total // rounds)]
    row.part("a look-up alone", each(ours, finds))
    row.peers = [sorted_peer, tree_peer, kernel_peer]
    row.bounds = "Python: the calls, checks and records of what was done around two bisections"
    return [row]
