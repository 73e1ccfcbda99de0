"""What holds after each step of the broker's model: books, bytes, and what processes can reach."""

from __future__ import annotations

import dataclasses
import os
from typing import ClassVar

import numpy as np
from brokerbooks import Books
from brokers import Inside
from guests import Guest, crc, held
from hypothesis.stateful import RuleBasedStateMachine, invariant
from support import PAGE

from quire.broker import borrowed
from quire.client import Client


@dataclasses.dataclass(eq=False)
class Lent:
    """A lease that a guest has."""

    guest: int
    key: int
    memory: Memory
    offset: int
    size: int
    spans: list[tuple[int, int]]

    def cut(self, low: int, high: int) -> None:
        """Take a range away."""
        kept = [(a, min(b, low)) for a, b in self.spans if a < low]
        self.spans = kept + [(max(a, high), b) for a, b in self.spans if b > high]

    def overlaps(self, low: int, high: int) -> bool:
        return any(a < high and low < b for a, b in self.spans)


@dataclasses.dataclass(eq=False)
class Memory:
    """Memory, its bytes, and who may reach which extents of it beyond what is lent."""

    number: int
    handle: object
    lease: borrowed.Lease
    name: str
    bank: int
    extent: int
    data: np.ndarray
    # Extents of which somebody was given a descriptor; -1 is whoever has ended or left since.
    given: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    # Extents that a guest holds without saying so, and those that a forked child holds, by its process.
    hidden: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    inherited: set[tuple[int, int]] = dataclasses.field(default_factory=set)

    @property
    def padded(self) -> int:
        return -(-len(self.data) // PAGE) * PAGE

    def within(self, low: int, high: int) -> range:
        return range(low // self.extent, -(-high // self.extent))


@dataclasses.dataclass(eq=False)
class Version:
    """A snapshot under a name."""

    number: int
    name: str
    data: np.ndarray
    handle: object = None


@dataclasses.dataclass(eq=False)
class Maker:
    """A factory."""

    number: int
    handle: object
    name: str
    bank: tuple[object, int]
    version: int = 0
    data: np.ndarray | None = None


class Checks(RuleBasedStateMachine):
    """Compares the broker, the kernel and every process with what the model says."""

    guests: ClassVar[list[Guest]] = []
    started = False
    broker: Inside
    owner: Client
    books: Books
    memories: list[Memory]
    lent: list[Lent]
    # What each guest was told of versions.
    told: list[list[tuple[str, int]]]
    # A copy of the descriptor of everything that was ever lent, by device and inode; the number of the memory
    # and of the extent; and whether it is lent now.
    files: dict[tuple[int, int], tuple[int, int, int, bool]]

    @invariant()
    def books_agree(self) -> None:
        """No charge is lost or counted twice, and the sum is what the kernel has allocated."""
        if not self.started:
            return
        world = self.broker.server.world
        assert self.broker.audit() == []

        def state() -> tuple:
            return (
                {number: tuple(bank.used) for number, bank in world.banks.items()},
                {
                    number: (each.kind, each.bank.number)
                    for number, each in [*world.objects.items(), *world.tokens.items()]
                },
                {each.identity: (each.bytes, each.payer.number) for each in world.layers.values()},
                sorted(
                    (each.session.number, each.memory.number, each.spans)
                    for each in world.leases.values()
                    if each.session.number != self.owner.number
                ),
            )

        used, things, layers, leases = self.broker.do(state)
        assert used == {number: self.books.used(number) for number in self.books.accounts}
        assert things == {number: (each.kind, each.bank) for number, each in self.books.things.items()}
        assert layers == {key: (each.size, each.payer) for key, each in self.books.layers.items()}
        assert leases == sorted(
            (self.guests[each.guest].number, each.memory.number, each.spans) for each in self.lent
        )

    @invariant()
    def nobody_has_what_it_may_not(self) -> None:
        """What processes map and have open is lent to them, or it is empty."""
        if not self.started:
            return
        self.copy_descriptors()
        by_number = {each.number: each for each in self.memories}
        for who, guest in enumerate(self.guests):
            for pid in (guest.pid, *guest.forks):
                for file, low, high in held(pid):
                    number, index = self.files[file][1:3]
                    if not self.files[file][3]:
                        # It was checked that it is empty.
                        continue
                    memory = by_number[number]
                    if pid in guest.forks:
                        assert (pid, index) in memory.inherited, (guest.kind, number, index)
                        continue
                    spans = [
                        span
                        for each in self.lent
                        if each.guest == who and each.memory is memory
                        for span in each.spans
                    ]
                    begin = index * memory.extent
                    if guest.kind == "honest":
                        assert covered(begin + low, begin + high, spans), (number, index, low, high, spans)
                    else:
                        reached = {i for span in spans for i in memory.within(*span)}
                        assert index in reached or (who, index) in memory.hidden, (guest.kind, number, index)

    def copy_descriptors(self) -> None:
        """Keep a descriptor of each extent; those that are extents no more must be empty."""
        world = self.broker.server.world

        def look() -> list[tuple[tuple[int, int], int, int, int]]:
            return [
                (each.identity(), each.memory.number, each.index, os.dup(each.descriptor))
                for each in world.extents.values()
            ]

        now = {}
        for identity, number, index, fresh in self.broker.do(look):
            if identity in self.files:
                os.close(fresh)
            descriptor = self.files.pop(identity)[0] if identity in self.files else fresh
            now[identity] = descriptor, number, index, True
        for identity, (descriptor, number, index, _) in self.files.items():
            status = os.fstat(descriptor)
            assert (status.st_size, status.st_blocks) == (0, 0), (
                "what is lent no more is empty, whoever has it"
            )
            now[identity] = descriptor, number, index, False
        self.files = now

    @invariant()
    def bytes_are_right(self) -> None:
        """Nobody sees a byte that the owner did not write."""
        if not self.started:
            return
        for memory in self.memories:
            assert memory.lease[:] == memory.data.tobytes(), memory.name
        for who, guest in enumerate(self.guests):
            wanted, expected = [], []
            for each in self.lent:
                if each.guest == who:
                    for a, b in each.spans:
                        low, high = max(a, each.offset), min(b, each.offset + each.size)
                        wanted.append((each.key, low - each.offset, high - each.offset))
                        expected.append(crc(each.memory.data[low:high]))
            assert guest.child(f"sums({wanted})") == expected, guest.kind
            assert guest.child(f"heard({len(self.told[who])})") == self.told[who], guest.kind


def covered(low: int, high: int, spans: list[tuple[int, int]]) -> bool:
    """Whether a range lies within others."""
    for a, b in sorted(spans):
        if a <= low < b:
            low = b
    return low >= high
