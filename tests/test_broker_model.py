"""Random clients against a model of banks and leases: honest, hostile, slow and dying ones."""

import contextlib
import pathlib
import tempfile

import hypothesis
import numpy as np
import pytest
from brokers import inside
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from support import PAGE

import quire
from quire.broker import borrowed
from quire.broker.banks import NOTHING, UNLIMITED, Amount, Bank

LIMIT = 64 * PAGE


class Model:
    """One bank of the reference: what it may pay and what it pays for."""

    def __init__(self, limit: int, parent: "Model | None") -> None:
        self.limit, self.parent, self.memory = limit, parent, {}
        self.children: list[Model] = []
        self.dead = False
        if parent:
            parent.children.append(self)

    def used(self) -> int:
        return sum(self.memory.values()) + sum(child.used() for child in self.children if not child.dead)

    def fits(self, size: int) -> bool:
        bank: Model | None = self
        while bank:
            if bank.used() + size > bank.limit:
                return False
            bank = bank.parent
        return True

    def depth(self) -> int:
        return 1 + (self.parent.depth() if self.parent else 0)

    def ends(self) -> None:
        self.dead = True
        self.memory.clear()
        for child in self.children:
            child.ends()


class Thing:
    """Memory as the model knows it: its bytes, and who may have which of them mapped."""

    def __init__(self, name: str, bank: Model, data: np.ndarray) -> None:
        self.name, self.bank, self.data = name, bank, data
        self.alive = True


class Machine(RuleBasedStateMachine):
    """The owner makes and takes back; guests borrow, comply or lie, come and go."""

    banks = Bundle("banks")

    @initialize(target=banks)
    def start(self) -> object:
        self.stack = contextlib.ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        path = pathlib.Path(folder) / "broker"
        self.broker = self.stack.enter_context(inside(path, limit_bytes=LIMIT, reserve_bytes=16 * PAGE))
        self.owner = self.stack.enter_context(quire.connect(path))
        self.guests = [quire.connect(path) for _ in range(3)]
        self.path, self.count = path, 0
        # Guest, lease, what was lent, and whether the guest's library lies about unmapping it.
        self.lent: list[tuple[int, borrowed.Lease, Thing, bool]] = []
        self.live: list[tuple[object, borrowed.Lease, Thing]] = []
        root = Model(LIMIT, None)
        for size in (5 * PAGE, 9 * PAGE + 1):
            self.make((self.owner.bank, root), size, 2)
        return self.owner.bank, root

    def pick(self, number: int) -> tuple:
        """One of the things that were ever made."""
        return self.live[number % len(self.live)]

    @rule(target=banks, above=banks, pages=st.integers(1, 80))
    def make_bank(self, above, pages) -> object:
        handle, model = above
        if model.dead:
            with pytest.raises(LookupError):
                self.owner.make_bank(pages * PAGE, parent=handle)
            return multiple()
        try:
            return self.owner.make_bank(pages * PAGE, parent=handle), Model(pages * PAGE, model)
        except quire.QuotaExceeded:
            assert model.depth() >= 13, "the only limit that is reached is that on depth"
            return multiple()

    @rule(bank=banks, size=st.integers(1, 12 * PAGE), extent=st.integers(1, 6))
    def make(self, bank, size, extent) -> None:
        handle, model = bank
        padded = -(-size // PAGE) * PAGE
        if model.dead:
            with pytest.raises(LookupError):
                self.owner.memory(size, bank=handle)
            return
        if not model.fits(padded):
            with pytest.raises(quire.QuotaExceeded):
                self.owner.memory(size, bank=handle, extent_bytes=extent * PAGE)
            return
        memory, lease = self.owner.memory(size, bank=handle, extent_bytes=extent * PAGE)
        self.count += 1
        data = np.random.default_rng(self.count).integers(0, 256, size, np.uint8)
        with lease.writing() as rw:
            rw[:] = data
        thing = Thing(f"thing {self.count}", model, data)
        self.owner.publish(memory, thing.name)
        model.memory[thing] = padded
        self.live.append((memory, lease, thing))

    @rule(
        which=st.integers(0, 99),
        guest=st.integers(0, 2),
        start=st.integers(0, 2**30),
        length=st.integers(1, 2**16),
        lies=st.booleans(),
    )
    def lend(self, which, guest, start, length, lies) -> None:
        _, _, thing = self.pick(which)
        client = self.guests[guest]
        if not self.exists(thing):
            with pytest.raises(LookupError):
                client.open(thing.name)
            return
        handle = client.open(thing.name)
        start %= len(thing.data)
        lease = client.lease(handle, start, min(length, len(thing.data) - start))
        client.close_handle(handle)
        if lies:
            lease._take_away = lambda _start, _stop: None
        self.lent.append((guest, lease, thing, lies))

    @rule(which=st.integers(0, 99), at=st.integers(0, 2**30), value=st.integers(0, 255))
    def write(self, which, at, value) -> None:
        _, lease, thing = self.pick(which)
        if self.exists(thing):
            at %= len(thing.data)
            with lease.writing() as rw:
                rw[at] = value
            thing.data[at] = value

    @rule(
        which=st.integers(0, 99),
        start=st.integers(0, 2**30),
        length=st.integers(1, 2**16),
        guest=st.integers(-1, 2),
        certain=st.booleans(),
    )
    def revoke(self, which, start, length, guest, certain) -> None:
        memory, lease, thing = self.pick(which)
        if not self.exists(thing):
            return
        start %= len(thing.data)
        stop = min(start + length, len(thing.data))
        low, high = start // PAGE * PAGE, -(-stop // PAGE) * PAGE
        hit = [
            each
            for each in self.lent
            if each[2] is thing and guest in (-1, each[0]) and self.overlaps(each[1], low, high)
        ]
        # All are in one process here, where what a liar keeps cannot be told from what the owner has mapped.
        certain = certain or any(each[3] for each in hit)
        client = None if guest < 0 else self.guests[guest].number
        taken = self.owner.revoke(
            memory, start, stop - start, client=client, certain=certain, deadline_ms=5000
        )
        results = {outcome.client: outcome.result for outcome in taken.outcomes}
        assert {self.guests[each[0]].number for each in hit} <= set(results)
        for guest_index, held, _, lies in hit:
            result = results[self.guests[guest_index].number]
            hypothesis.event(f"{'a liar' if lies else 'an honest one'}: {result}")
            assert result in ("acknowledged", "cut", "kept")
            if certain:
                assert result != "acknowledged"
            if not lies:
                assert not self.overlaps(held, low, high)
            elif result == "cut":
                # It may not be looked at any more, whatever its library says.
                self.lent = [each for each in self.lent if each[1] is not held]
        assert not lease.revoked

    @rule(which=st.integers(0, 99))
    def destroy(self, which) -> None:
        if which % 3:
            return
        memory, _, thing = self.pick(which)
        if self.exists(thing):
            taken = self.owner.destroy(memory)
            assert taken.freed_bytes == thing.bank.memory.pop(thing)
        self.forget(thing)

    @rule(bank=banks)
    def destroy_bank(self, bank) -> None:
        handle, model = bank
        if model.parent is None:
            with pytest.raises(PermissionError):
                self.owner.destroy(handle)
            return
        used = model.used()
        taken = self.owner.destroy(handle)
        assert taken.freed_bytes == (0 if model.dead else used)
        model.ends()

    @rule(guest=st.integers(0, 2))
    def guest_leaves(self, guest) -> None:
        self.lent = [each for each in self.lent if each[0] != guest]
        for lease in self.guests[guest]._borrowed.all():
            lease.__dict__.pop("_take_away", None)
        self.guests[guest].close()
        self.guests[guest] = quire.connect(self.path)

    def exists(self, thing: Thing) -> bool:
        return thing.alive and thing in thing.bank.memory

    def forget(self, thing: Thing) -> None:
        thing.alive = False

    @staticmethod
    def overlaps(lease: borrowed.Lease, low: int, high: int) -> bool:
        return any(a < high and low < b for a, b in lease._spans)

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "broker"):
            return
        assert self.broker.audit() == []
        root = self.owner.describe(self.owner.bank).used[0]
        assert root == sum(thing.bank.memory[thing] for _, _, thing in self.live if self.exists(thing))

    @invariant()
    def bytes_are_right(self) -> None:
        if not hasattr(self, "broker"):
            return
        for memory, lease, thing in self.live:
            if self.exists(thing):
                assert lease[:] == thing.data.tobytes(), (memory, thing.name)
        for _, lease, thing, lies in self.lent:
            if self.exists(thing) and not lies:
                for a, b in lease.held:
                    assert lease[a:b] == thing.data[lease.offset + a : lease.offset + b].tobytes()

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            for guest in self.guests:
                for lease in guest._borrowed.all():
                    lease.__dict__.pop("_take_away", None)
                guest.close()
            self.stack.close()


TestModel = Machine.TestCase
TestModel.settings = hypothesis.settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=100, deadline=None)
def test_banks_against_sums(data: st.DataObject) -> None:
    """Charges, transfers and ends in any order: what a bank has used is what is charged to it and below."""
    root = Bank(1, UNLIMITED)
    banks = [root]
    charges: list[tuple[Bank, Amount]] = []
    amounts = st.builds(Amount, st.integers(0, 50), st.integers(0, 3), st.integers(0, 3))
    for number in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.integers(0, 3))
        if what == 0 and len(banks) < 12:
            with contextlib.suppress(quire.QuotaExceeded):
                banks.append(
                    Bank(
                        number,
                        Amount(data.draw(st.integers(0, 200)), 10, 10),
                        data.draw(st.sampled_from(banks)),
                    )
                )
        elif what == 1:
            bank, amount = data.draw(st.sampled_from(banks)), data.draw(amounts)
            with contextlib.suppress(quire.QuotaExceeded):
                bank.charge(amount)
                charges.append((bank, amount))
        elif what == 2 and charges:
            index = data.draw(st.integers(0, len(charges) - 1))
            bank, amount = charges[index]
            to = data.draw(st.sampled_from(banks))
            with contextlib.suppress(quire.QuotaExceeded):
                bank.transfer(amount, to)
                charges[index] = to, amount
        elif charges:
            bank, amount = charges.pop(data.draw(st.integers(0, len(charges) - 1)))
            bank.discharge(amount)
        for bank in banks:
            due = NOTHING
            for payer, amount in charges:
                if bank in payer.line():
                    due = due.plus(amount)
            assert bank.used == due
            assert all(used <= limit for used, limit in zip(bank.used, bank.limit, strict=True))
