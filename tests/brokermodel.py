"""Random clients of a broker, in processes of their own, against a reference of banks and leases.

``tests/test_broker_model.py`` and ``fuzz/lending.py`` run it; ``brokerchecks.py`` has what holds
after each step.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import tempfile
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
from brokerbooks import OBJECT, Account, Amount, Books, Thing
from brokerchecks import Checks, Lent, Maker, Memory, Version
from brokers import Raw, inside
from guests import Guest, crc
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from support import PAGE

import quire
from quire.broker import protocol
from quire.broker.operations import Taken
from quire.broker.protocol import Rights

LIMIT: Amount = (96 * PAGE, 70, 60)
USER_LIMIT = 48 * PAGE
RESERVE: Amount = (3 * PAGE, 0, 64)
STUBBORN = ("slow", "mute")
# Each kind must occur often, together with others.
KINDS = (("honest", "liar", "slow"), ("honest", "hoarder", "mute"), ("honest", "honest", "liar"))
SEGMENT = 6 * PAGE

numbers = st.integers(0, 1 << 20)


class Machine(Checks):
    """The owner makes, lends and takes back; guests borrow, comply, lie, linger, fork and die."""

    @classmethod
    def close_guests(cls) -> None:
        """End the processes that every example uses again."""
        while cls.guests:
            cls.guests.pop().close()

    # Beginning

    @initialize(kinds=st.sampled_from(KINDS))
    def start(self, kinds: tuple[str, ...]) -> None:
        if not self.guests:
            root = os.getuid() == 0
            # Two of them are one user, so that they share a bank.
            self.guests.extend(Guest(uid if root else None) for uid in (20001, 20002, 20002))
        self.stack = contextlib.ExitStack()
        folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        self.path = str(folder / "broker")
        self.broker = self.stack.enter_context(
            inside(
                folder / "broker",
                limit_bytes=LIMIT[0],
                limit_objects=LIMIT[1],
                limit_descriptors=LIMIT[2],
                user_limit_bytes=USER_LIMIT,
                reserve_bytes=RESERVE[0],
                move_ms=10_000,
                log_level="error",
            )
        )
        self.owner = self.stack.enter_context(quire.connect(self.path))
        self.count = 0
        self.books = Books()
        self.memories = []
        self.lent = []
        self.versions: list[Version] = []
        self.makers: list[Maker] = []
        self.banks: list[tuple[object, int]] = []
        self.watching: dict[tuple[int, str], bool] = {}
        self.told = [[] for _ in self.guests]
        self.files = {}
        self.segment = quire.Segment(SEGMENT)
        self.started = True
        for guest, kind in zip(self.guests, kinds, strict=True):
            guest.begin(self.path, kind)
        self.enter_homes()
        self.banks.append((self.owner.bank, self.home(os.getuid())))
        for size, extent in ((5 * PAGE, 2), (9 * PAGE + 1, 3)):
            self.make(0, size, extent)
        for guest in range(3):
            self.lend(guest, guest, 0, 1 << 16)

    def enter_homes(self) -> None:
        """The banks that a broker has from the start."""
        unlimited = (2**63 - 1,) * 3
        (root,) = self.bank_named("root")
        (clients,) = self.bank_named("clients")
        (reserve,) = self.bank_named("reserve")
        self.books.accounts = {
            root: Account(unlimited, 0),
            clients: Account(LIMIT, root),
            reserve: Account(RESERVE, root),
        }
        self.reserve = reserve
        for uid in {os.getuid(), *(guest.uid for guest in self.guests if guest.uid is not None)}:
            self.books.accounts[self.home(uid)] = Account((USER_LIMIT, LIMIT[1], LIMIT[2]), clients)

    def bank_named(self, name: str) -> list[int]:
        return self.broker.do(
            lambda: [b.number for b in self.broker.server.world.banks.values() if b.name == name]
        )

    def home(self, uid: int) -> int:
        (number,) = self.bank_named(f"uid-{uid}")
        return number

    def home_of(self, guest: int) -> int:
        uid = self.guests[guest].uid
        return self.home(os.getuid() if uid is None else uid)

    def number_of(self, handle: quire.broker.operations.Handle) -> int:
        """What the broker calls that which the owner has a handle of."""
        world = self.broker.server.world
        return self.broker.do(lambda: world.sessions[self.owner.number].grips[handle.number].target.number)

    def newest(self) -> int:
        """The object that was made last."""
        return self.broker.do(lambda: max(self.broker.server.world.objects))

    def name(self) -> str:
        self.count += 1
        return f"thing {self.count}"

    # Banks

    @rule(above=numbers, pages=st.integers(1, 80), objects=st.integers(1, 12))
    def make_bank(self, above: int, pages: int, objects: int) -> None:
        handle, parent = self.banks[above % len(self.banks)]
        limit = (pages * PAGE, objects, 40)

        def make() -> object:
            return self.owner.make_bank(limit[0], parent=handle, limit_objects=objects, limit_descriptors=40)

        if parent not in self.books.accounts:
            with pytest.raises(LookupError):
                make()
        elif not self.books.fits(parent, OBJECT) or len(list(self.books.line(parent))) >= 16:
            with pytest.raises(quire.QuotaExceeded):
                make()
        else:
            made = make()
            number = self.number_of(made)
            self.books.accounts[number] = Account(limit, parent)
            self.banks.append((made, number))

    @rule(bank=numbers)
    def destroy_bank(self, bank: int) -> None:
        handle, number = self.banks[bank % len(self.banks)]
        if handle == self.owner.bank:
            with pytest.raises(PermissionError):
                self.owner.destroy(handle)
            return
        taken = self.let_go(lambda: self.owner.destroy(handle, deadline_ms=50))
        assert taken.freed_bytes == (self.books.end_bank(number) if number in self.books.accounts else 0)
        self.forget_what_ended()

    # Memory

    @rule(bank=numbers, size=st.integers(1, 12 * PAGE), extent=st.integers(1, 6))
    def make(self, bank: int, size: int, extent: int) -> None:
        handle, number = self.banks[bank % len(self.banks)]
        padded = -(-size // PAGE) * PAGE
        cost = (padded, 1, -(-size // (extent * PAGE)))
        if number not in self.books.accounts:
            with pytest.raises(LookupError):
                self.owner.memory(size, bank=handle, extent_bytes=extent * PAGE)
            return
        if not self.books.fits(number, cost):
            with pytest.raises(quire.QuotaExceeded):
                self.owner.memory(size, bank=handle, extent_bytes=extent * PAGE)
            return
        made, lease = self.owner.memory(size, bank=handle, extent_bytes=extent * PAGE)
        name = self.name()
        data = np.random.default_rng(self.count).integers(0, 256, size, np.uint8)
        with lease.writing() as rw:
            rw[:] = data
        self.owner.publish(made, name)
        memory = Memory(self.number_of(made), made, lease, name, number, extent * PAGE, data)
        self.books.add(memory.number, Thing("memory", number, cost), ("owner", made.number))
        self.books.things[memory.number].references.add(name)
        self.memories.append(memory)

    @precondition(lambda self: self.memories)
    @rule(which=numbers, at=numbers, value=st.integers(0, 255))
    def write(self, which: int, at: int, value: int) -> None:
        memory = self.memories[which % len(self.memories)]
        at %= len(memory.data)
        with memory.lease.writing() as rw:
            rw[at] = value
        memory.data[at] = value

    @precondition(lambda self: self.memories)
    @rule(which=numbers)
    def destroy(self, which: int) -> None:
        if which % 3:
            return
        memory = self.memories[which % len(self.memories)]
        taken = self.let_go(lambda: self.owner.destroy(memory.handle, deadline_ms=50))
        assert taken.freed_bytes == memory.padded
        self.books.end(memory.number)
        self.forget_what_ended()

    def forget_what_ended(self) -> None:
        """What is in the books no more is in no list."""
        things = self.books.things
        self.memories = [each for each in self.memories if each.number in things]
        self.lent = [each for each in self.lent if each.memory.number in things]
        self.versions = [each for each in self.versions if each.number in things]
        for maker in [each for each in self.makers if each.number not in things]:
            self.makers.remove(maker)
            for key in [key for key in self.watching if key[1] == maker.name]:
                del self.watching[key]
        for maker in self.makers:
            if not things[maker.number].points_at:
                maker.data = None

    # Leases

    @precondition(lambda self: self.memories)
    @rule(which=numbers, guest=st.integers(0, 2), start=numbers, length=st.integers(1, 1 << 16))
    def lend(self, which: int, guest: int, start: int, length: int) -> None:
        memory = self.memories[which % len(self.memories)]
        start %= len(memory.data)
        length = min(length, len(memory.data) - start)
        self.count += 1
        self.guests[guest].child(f"borrow({self.count}, {memory.name!r}, {start}, {length})")
        spans = [(start // PAGE * PAGE, -(-(start + length) // PAGE) * PAGE)]
        self.lent.append(Lent(guest, self.count, memory, start, length, spans))
        reached = {(guest, index) for index in memory.within(*spans[0])}
        memory.given |= reached
        if self.guests[guest].kind == "hoarder":
            memory.hidden |= reached

    @precondition(lambda self: self.lent)
    @rule(which=numbers)
    def give_back(self, which: int) -> None:
        lent = self.lent.pop(which % len(self.lent))
        guest = self.guests[lent.guest]
        if guest.kind == "liar":
            for a, b in lent.spans:
                lent.memory.hidden |= {(lent.guest, index) for index in lent.memory.within(a, b)}
        guest.child(f"give_back({lent.key})")

    @precondition(lambda self: self.memories)
    @rule(
        which=numbers,
        start=numbers,
        length=st.integers(1, 1 << 16),
        guest=st.integers(-1, 2),
        certain=st.booleans(),
    )
    def revoke(self, which: int, start: int, length: int, guest: int, certain: bool) -> None:
        memory = self.memories[which % len(self.memories)]
        start %= len(memory.data)
        stop = min(start + length, len(memory.data))
        low, high = start // PAGE * PAGE, -(-stop // PAGE) * PAGE
        hit = {each.guest for each in self.lent if each.memory is memory and each.overlaps(low, high)}
        hit |= {who for who, index in memory.hidden if index in memory.within(low, high)}
        stubborn = [who for who in sorted(hit) if self.guests[who].kind in STUBBORN]
        if guest >= 0 or not stubborn:
            self.take(memory, low, high, guest, certain, start, stop)
            return
        # Those who will not answer are given little time, and the others much.
        for who in range(3):
            self.take(memory, low, high, who, certain, start, stop)

    def take(
        self, memory: Memory, low: int, high: int, guest: int, certain: bool, start: int, stop: int
    ) -> None:
        """Revoke from one guest, or from all."""
        chosen = range(3) if guest < 0 else (guest,)
        extents = memory.within(low, high)
        asked = {
            each.guest
            for each in self.lent
            if each.memory is memory and each.guest in chosen and each.overlaps(low, high)
        }
        hidden = {who for who, index in memory.hidden if who in chosen and index in extents}
        failed = {who for who in asked if self.guests[who].kind in ("liar", *STUBBORN)} | hidden
        taken = self.let_go(
            lambda: self.owner.revoke(
                memory.handle,
                start,
                stop - start,
                client=None if guest < 0 else self.guests[guest].number,
                certain=certain,
                deadline_ms=50 if any(self.guests[who].kind in STUBBORN for who in asked) else 10_000,
            )
        )
        # Who is cut off later may have only what was made of an extent in between.
        self.copy_descriptors()
        results = {outcome.client: outcome.result for outcome in taken.outcomes}
        for lent in self.lent:
            if lent.memory is memory and lent.guest in asked - failed:
                lent.cut(low, high)
        cut = failed | asked if certain else failed
        known = set(chosen) | ({-1} if guest < 0 else set())
        ever = certain and any(who in known and index in extents for who, index in memory.given)
        kept = False
        for index in extents if cut or ever else ():
            begin, end = index * memory.extent, min((index + 1) * memory.extent, memory.padded)
            payers = [*(self.home_of(who) for who in cut), memory.bank, self.reserve]
            if any(self.books.fits(payer, (end - begin, 0, 1)) for payer in payers):
                self.moved(memory, index, begin, end, cut)
            else:
                kept = True
        for who in asked | hidden:
            result = results[self.guests[who].number]
            hypothesis.event(f"{self.guests[who].kind}: {result}")
            expected = ("kept" if kept else "cut") if who in cut else "released"
            assert result == expected, (self.guests[who].kind, taken)
        self.lent = [each for each in self.lent if each.spans]

    def moved(self, memory: Memory, index: int, begin: int, end: int, cut: set[int]) -> None:
        """An extent is another file now, which only those have who have a lease."""
        for lent in self.lent:
            if lent.memory is memory and lent.guest in cut:
                lent.cut(begin, end)
        memory.given = {each for each in memory.given if each[1] != index}
        memory.hidden = {each for each in memory.hidden if each[1] != index}
        memory.inherited = {each for each in memory.inherited if each[1] != index}
        memory.given |= {
            (lent.guest, index) for lent in self.lent if lent.memory is memory and lent.overlaps(begin, end)
        }

    def let_go(self, act: Callable[[], Taken]) -> Taken:
        """Do something while those who are slow do not go on."""
        slow = [guest for guest in self.guests if guest.kind == "slow"]
        for guest in slow:
            guest.child("go.clear()")
        try:
            return act()
        finally:
            for guest in slow:
                guest.child("go.set()")

    # Coming and going

    @rule(guest=st.integers(0, 2), dies=st.sampled_from([None, None, "lease", "make", "fetch"]))
    def guest_goes(self, guest: int, dies: str | None) -> None:
        """It closes its connection, or is killed in the middle of a request; and another comes."""
        one = self.guests[guest]
        name = self.memories[-1].name if self.memories else "nothing"
        number, kind = one.number, one.kind
        if dies is None:
            one.leave()
        else:
            requests = {
                "lease": f"borrow(0, {name!r}, 0, 1)",
                "make": f"c.memory({PAGE})",
                "fetch": f"fetch(0, {self.versions[-1].name if self.versions else 'nothing'!r})",
            }
            one.child.begin(requests[dies])
            one.die()
        self.broker.wait(lambda world: number not in world.sessions)
        for memory in self.memories:
            mine = {each for each in memory.given if each[0] == guest}
            if dies == "lease" and memory.name == name:
                mine.add((guest, 0))
            memory.given = (memory.given - mine) | {(-1, index) for _, index in mine}
            memory.hidden = {each for each in memory.hidden if each[0] != guest}
        self.lent = [each for each in self.lent if each.guest != guest]
        self.books.drop_all(f"guest {guest}")
        self.forget_what_ended()
        for key in [key for key in self.watching if key[0] == guest]:
            del self.watching[key]
        self.told[guest] = []
        one.begin(self.path, kind)

    @rule(guest=st.integers(0, 2))
    def fork(self, guest: int) -> None:
        one = self.guests[guest]
        if len(one.forks) >= 2:
            one.end_forks()
            return
        pid = one.fork()
        if one.kind == "hoarder":
            for memory in self.memories:
                reached = {index for who, index in memory.hidden if who == guest}
                memory.inherited |= {(pid, index) for index in reached}

    # Snapshots

    @rule(bank=numbers, pages=st.sets(st.integers(0, 5), max_size=3), value=st.integers(0, 255))
    def deposit(self, bank: int, pages: set[int], value: int) -> None:
        """The owner's next version: it pays for what differs from those before."""
        handle, number = self.banks[bank % len(self.banks)]
        with self.next_version(pages, value) as (snapshot, data, layers):
            if number not in self.books.accounts:
                with pytest.raises(LookupError):
                    self.owner.deposit(snapshot, bank=handle)
            elif not self.books.fits(number, self.books.cost(layers)):
                with pytest.raises(quire.QuotaExceeded):
                    self.owner.deposit(snapshot, bank=handle)
            else:
                made = self.owner.deposit(snapshot, bank=handle)
                version = Version(self.number_of(made), self.name(), data)
                self.owner.publish(made, version.name, Rights.READ | Rights.SNAPSHOT)
                self.books.deposit(version.number, number, layers, ("owner", made.number))
                self.books.things[version.number].references.add(version.name)
                self.versions.append(version)
                version.handle = made

    @contextlib.contextmanager
    def next_version(self, pages: set[int], value: int):
        """Write pages of the owner's segment; give a snapshot, its bytes, and its layers with their sizes."""
        with self.segment.writing():
            for page in pages:
                self.segment.array("u1")[page * PAGE] = value
        with self.segment.snapshot() as snapshot:
            with snapshot.map() as mapping:
                data = np.frombuffer(mapping[:], np.uint8).copy()
            status = [os.fstat(each) for each in snapshot._core.layer_fds()]
            yield snapshot, data, {(each.st_dev, each.st_ino): each.st_size for each in status}

    @precondition(lambda self: self.versions)
    @rule(which=numbers, guest=st.integers(0, 2))
    def fetch(self, which: int, guest: int) -> None:
        version = self.versions[which % len(self.versions)]
        assert self.guests[guest].child(f"fetch({version.number}, {version.name!r})") == crc(version.data)

    @precondition(lambda self: self.versions)
    @rule(which=numbers, guest=st.integers(0, 2))
    def grant(self, which: int, guest: int) -> None:
        """A guest takes a snapshot over: from now on its bank pays."""
        version = self.versions[which % len(self.versions)]
        home = self.home_of(guest)
        code = f"grant({version.number}, {version.name!r})"
        if not self.books.try_grant(version.number, home):
            assert self.guests[guest].attempt(code)[0] == "QuotaExceeded"
            return
        handle, content = self.guests[guest].child(code)
        assert content == crc(version.data)
        self.books.granted(self.newest(), version.number, home, (f"guest {guest}", handle))

    @precondition(lambda self: self.versions)
    @rule(
        which=numbers,
        guest=st.integers(0, 2),
        pages=st.sets(st.integers(0, 5), min_size=1),
        value=st.integers(0, 255),
    )
    def diverge(self, which: int, guest: int, pages: set[int], value: int) -> None:
        """A guest writes to its copy of a snapshot and deposits that: it pays for the difference."""
        version = self.versions[which % len(self.versions)]
        one = self.guests[guest]
        assert one.child(f"fetch({version.number}, {version.name!r})") == crc(version.data)
        found = one.child(f"diverge({version.number}, {sorted(pages)}, {value})")
        layers = {(dev, ino): size for dev, ino, size in found}
        home = self.home_of(guest)
        cost = self.books.cost(layers)
        shared = set(layers) & set(self.books.layers)
        hypothesis.event(f"layers shared after divergence: {len(shared)}")
        if not self.books.fits(home, cost):
            assert one.attempt("deposit()")[0] == "QuotaExceeded"
            return
        handle = one.child("deposit()")
        self.books.deposit(self.newest(), home, layers, (f"guest {guest}", handle))

    @precondition(lambda self: self.versions)
    @rule(which=numbers)
    def forget(self, which: int) -> None:
        """The owner gives a snapshot up; who was granted it goes on paying."""
        version = self.versions.pop(which % len(self.versions))
        self.owner.unpublish(version.handle, version.name)
        self.owner.close_handle(version.handle)
        self.books.drop(version.number, version.name)
        self.books.drop(version.number, ("owner", version.handle.number))
        self.forget_what_ended()

    @precondition(lambda self: self.versions)
    @rule(which=numbers)
    def export(self, which: int) -> None:
        version = self.versions[which % len(self.versions)]
        bank = self.books.things[version.number].bank
        cost = (0, 1, 1)
        if not self.books.fits(bank, cost):
            with pytest.raises(quire.QuotaExceeded):
                self.owner.export_fd(version.handle, Rights.READ)
            return
        os.close(self.owner.export_fd(version.handle, Rights.READ))
        token = self.broker.do(lambda: max(self.broker.server.world.tokens))
        self.books.add(token, Thing("token", bank, cost, points_at=version.number), "kept by the broker")
        self.books.things[version.number].references.add(("token", token))

    # Factories

    @rule(bank=numbers)
    def make_factory(self, bank: int) -> None:
        handle, number = self.banks[bank % len(self.banks)]
        if number not in self.books.accounts:
            with pytest.raises(LookupError):
                self.owner.make_factory(bank=handle)
        elif not self.books.fits(number, OBJECT):
            with pytest.raises(quire.QuotaExceeded):
                self.owner.make_factory(bank=handle)
        else:
            made = self.owner.make_factory(bank=handle)
            maker = Maker(self.number_of(made), made, self.name(), (handle, number))
            self.owner.publish(made, maker.name)
            self.books.add(maker.number, Thing("factory", number, OBJECT), ("owner", made.number))
            self.books.things[maker.number].references.add(maker.name)
            self.makers.append(maker)

    @precondition(lambda self: self.makers)
    @rule(which=numbers, pages=st.sets(st.integers(0, 5), max_size=2), value=st.integers(0, 255))
    def put(self, which: int, pages: set[int], value: int) -> None:
        maker = self.makers[which % len(self.makers)]
        handle, bank = maker.bank
        with self.next_version(pages, value) as (snapshot, data, layers):
            if not self.books.fits(bank, self.books.cost(layers)):
                with pytest.raises(quire.QuotaExceeded):
                    self.owner.put(maker.handle, snapshot, bank=handle)
                return
            assert self.owner.put(maker.handle, snapshot, bank=handle) == maker.version + 1
        maker.version, maker.data = maker.version + 1, data
        number = self.newest()
        self.books.deposit(number, bank, layers, ("factory", maker.number))
        before = self.books.things[maker.number].points_at
        self.books.things[maker.number].points_at = number
        if before:
            self.books.drop(before, ("factory", maker.number))
        for guest, name in [
            key for key, waits in self.watching.items() if key[1] == maker.name and not waits
        ]:
            self.told[guest].append((name, maker.version))
            self.watching[guest, name] = True
        self.forget_what_ended()

    @precondition(lambda self: self.makers)
    @rule(which=numbers, guest=st.integers(0, 2))
    def watch(self, which: int, guest: int) -> None:
        maker = self.makers[which % len(self.makers)]
        if (guest, maker.name) in self.watching:
            return
        handle = self.guests[guest].child(f"watch({maker.name!r})")
        self.books.things[maker.number].references.add((f"guest {guest}", handle))
        self.watching[guest, maker.name] = bool(maker.version)
        if maker.version:
            self.told[guest].append((maker.name, maker.version))

    @precondition(lambda self: self.makers)
    @rule(which=numbers, guest=st.integers(0, 2))
    def current(self, which: int, guest: int) -> None:
        maker = self.makers[which % len(self.makers)]
        code = f"current({maker.name!r})"
        if maker.data is None:
            assert self.guests[guest].attempt(code)[0] == "LookupError"
            return
        assert self.guests[guest].child(code) == (maker.version, crc(maker.data))
        if (guest, maker.name) in self.watching:
            self.watching[guest, maker.name] = False

    # Hostile ones without a library

    @rule(
        kind=st.integers(0, 40),
        fields=st.lists(st.sampled_from([0, 2, 3, 7, PAGE, 1 << 40]), min_size=4, max_size=4),
    )
    def wrong_handles(self, kind: int, fields: list[int]) -> None:
        """A request with handles that it does not have, or for more than there is; then garbage."""
        kinds = [
            each
            for each in protocol.Request.__subclasses__()
            if each not in (protocol.Hello, protocol.Make, protocol.Bye)
        ]
        chosen = kinds[kind % len(kinds)]
        values = itertools.cycle(fields)
        wrong = {
            name: next(values) if annotation == "int" else "nothing"
            for name, annotation in chosen.__annotations__.items()
            if annotation in ("int", "str")
        }
        raw = Raw(self.path)
        number = raw.welcome.client
        # What lies outside of the protocol's bounds ends the connection, like the garbage.
        with contextlib.suppress(TypeError, EOFError, BrokenPipeError, ConnectionResetError):
            raw.ask(chosen(1, **wrong))
            answer = raw.ask(protocol.Make(2, 1, 1 << 50, 0, False))
            assert isinstance(answer, protocol.Fault)
            raw.sock.sendall(bytes(fields[0] & 0xFF for _ in range(64)))
        raw.sock.close()
        self.broker.wait(lambda world: number not in world.sessions)

    def teardown(self) -> None:
        if self.started:
            for guest in self.guests:
                guest.leave()
            self.stack.close()
            self.segment.close()
            for descriptor, *_ in self.files.values():
                os.close(descriptor)
