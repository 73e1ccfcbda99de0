"""The reference that the broker is compared with: who pays for what, added up from a list of what exists.

It is written after docs/broker.md, section "Banks", and shares no code with the broker. Numbers of banks and
objects are the broker's, so that the two can be compared one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

Amount = tuple[int, int, int]
"""Bytes, objects, descriptors."""
Key = tuple[int, int]
"""Device and inode of a layer."""

OBJECT: Amount = (0, 1, 0)


def plus(*amounts: Amount) -> Amount:
    """The sum."""
    return tuple(map(sum, zip((0, 0, 0), *amounts, strict=True)))  # type: ignore[return-value]


@dataclasses.dataclass
class Account:
    """A bank."""

    limit: Amount
    parent: int
    dead: bool = False


@dataclasses.dataclass
class Thing:
    """Whatever a bank pays an object for: memory, a snapshot, a factory, a token."""

    kind: str
    bank: int
    own: Amount
    layers: list[Key] = dataclasses.field(default_factory=list)
    # Who keeps it: handles, names, factories and tokens, each by a key of its own.
    references: set[object] = dataclasses.field(default_factory=set)
    # Of a factory: its current version; of a token: what it stands for.
    points_at: int = 0


@dataclasses.dataclass
class Layer:
    """A sealed memfd, paid for once."""

    size: int
    payer: int
    users: list[int] = dataclasses.field(default_factory=list)


class Books:
    """Every bank, object and layer that there should be."""

    def __init__(self) -> None:
        self.accounts: dict[int, Account] = {}
        self.things: dict[int, Thing] = {}
        self.layers: dict[Key, Layer] = {}

    # Banks

    def line(self, bank: int) -> Iterator[int]:
        """A bank and those above it."""
        while bank:
            yield bank
            bank = self.accounts[bank].parent

    def below(self, bank: int) -> list[int]:
        """A bank and those below it."""
        return [each for each in self.accounts if bank in self.line(each)]

    def charges(self) -> Iterator[tuple[int, Amount]]:
        """Everything that somebody pays for."""
        for account in self.accounts.values():
            if account.parent:
                yield account.parent, OBJECT
        for thing in self.things.values():
            yield thing.bank, thing.own
        for layer in self.layers.values():
            yield layer.payer, (layer.size, 0, 1)

    def used(self, bank: int) -> Amount:
        """What a bank and those below it pay for."""
        below = self.below(bank)
        return plus(*(amount for payer, amount in self.charges() if payer in below))

    def fits(self, bank: int, amount: Amount, spared: Iterable[int] = ()) -> bool:
        """Whether a bank and all above it, but for the spared, can pay."""
        return all(
            not self.accounts[each].dead
            and all(
                a + b <= c for a, b, c in zip(self.used(each), amount, self.accounts[each].limit, strict=True)
            )
            for each in self.line(bank)
            if each not in spared
        )

    def can_take_over(self, layer: Layer, bank: int) -> bool:
        """Whether a bank can become the payer of a layer; banks above both see no change."""
        return self.fits(bank, (layer.size, 0, 1), spared=list(self.line(layer.payer)))

    # Objects

    def add(self, number: int, thing: Thing, reference: object) -> None:
        """Enter an object that was paid for."""
        self.things[number] = thing
        thing.references.add(reference)
        for key in thing.layers:
            self.layers[key].users.append(number)

    def cost(self, layers: dict[Key, int]) -> Amount:
        """What a snapshot of these layers costs whoever deposits it."""
        return plus(OBJECT, *((size, 0, 1) for key, size in layers.items() if key not in self.layers))

    def deposit(self, number: int, bank: int, layers: dict[Key, int], reference: object) -> None:
        """Enter a snapshot."""
        for key, size in layers.items():
            if key not in self.layers:
                self.layers[key] = Layer(size, bank)
        self.add(number, Thing("snapshot", bank, OBJECT, list(layers)), reference)

    def try_grant(self, snapshot: int, bank: int) -> bool:
        """Make a bank the payer of every layer of a snapshot, or of none."""
        before = {key: self.layers[key].payer for key in self.things[snapshot].layers}
        # The new object is paid for first.
        granted = Thing("snapshot", bank, OBJECT)
        if not self.fits(bank, OBJECT):
            return False
        self.things[-1] = granted
        for key in before:
            layer = self.layers[key]
            if layer.payer != bank:
                if not self.can_take_over(layer, bank):
                    for undone, payer in before.items():
                        self.layers[undone].payer = payer
                    del self.things[-1]
                    return False
                layer.payer = bank
        del self.things[-1]
        return True

    def granted(self, number: int, snapshot: int, bank: int, reference: object) -> None:
        """Enter the object that a grant made."""
        self.add(number, Thing("snapshot", bank, OBJECT, list(self.things[snapshot].layers)), reference)

    def drop(self, number: int, reference: object) -> None:
        """A handle, name, factory or token less; what nobody keeps ends."""
        thing = self.things.get(number)
        if thing is not None:
            thing.references.discard(reference)
            if not thing.references:
                self.end(number)

    def drop_all(self, holder: str) -> None:
        """A client has gone: its handles are given up in the order in which it got them."""
        held = [
            (reference, number)
            for number, thing in self.things.items()
            for reference in thing.references
            if isinstance(reference, tuple) and reference[0] == holder
        ]
        for reference, number in sorted(held):
            self.drop(number, reference)

    def end(self, number: int) -> None:
        """End an object, and with it whatever nobody pays for or keeps any more."""
        thing = self.things.get(number)
        if thing is None:
            return
        if thing.kind == "token":
            # Its own cost stays until it is out of the books; what it stands for may end with it.
            del self.things[number]
            self.drop(thing.points_at, ("token", number))
            return
        tokens = [
            key for key, each in self.things.items() if each.kind == "token" and each.points_at == number
        ]
        if thing.kind == "snapshot":
            self._end_snapshot(number, thing, tokens)
            return
        for token in tokens:
            self.things.pop(token, None)
        self.things.pop(number, None)
        if thing.kind == "factory" and thing.points_at:
            self.drop(thing.points_at, ("factory", number))

    def _end_snapshot(self, number: int, thing: Thing, tokens: list[int]) -> None:
        for token in tokens:
            del self.things[token]
        # While its layers find other payers, its own object is still paid for.
        thing.kind, thing.references = "ending", {"the end"}
        for factory in self.things.values():
            if factory.kind == "factory" and factory.points_at == number:
                factory.points_at = 0
        orphans: list[int] = []
        for key in thing.layers:
            layer = self.layers[key]
            layer.users.remove(number)
            if any(self.things[user].bank == layer.payer for user in layer.users):
                continue
            for user in layer.users:
                if self.can_take_over(layer, self.things[user].bank):
                    layer.payer = self.things[user].bank
                    break
            else:
                for user in layer.users:
                    self.things[user].layers = [each for each in self.things[user].layers if each != key]
                    if user not in orphans:
                        orphans.append(user)
                del self.layers[key]
        del self.things[number]
        for orphan in orphans:
            self.end(orphan)

    def end_bank(self, bank: int) -> int:
        """Reclaim all that a bank and those below it pay for; return the bytes."""
        used = self.used(bank)[0]
        banks = self.below(bank)
        for each in banks:
            self.accounts[each].dead = True
        for number in [
            n for n, thing in self.things.items() if thing.bank in banks and thing.kind != "token"
        ]:
            self.end(number)
        for number in [n for n, thing in self.things.items() if thing.bank in banks]:
            self.end(number)
        for each in banks:
            del self.accounts[each]
        return used
