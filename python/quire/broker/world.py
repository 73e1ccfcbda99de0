"""Everything the broker knows: banks, objects, names, sessions. Each change goes to the journal.

Only the event loop touches it. A method that changes something leaves it complete, so what waits for the
journal's next commit is always a whole.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import itertools
import os
from typing import TYPE_CHECKING, Any

from quire.broker import given
from quire.broker.banks import Amount, Bank
from quire.broker.crashpoints import crash_point
from quire.broker.leases import Lease
from quire.broker.objects import (
    OBJECT,
    Extent,
    Factory,
    Held,
    Layer,
    Memory,
    SnapshotObject,
    check_layer,
)
from quire.broker.protocol import Rights
from quire.broker.readers import Readers
from quire.broker.sessions import Grip, Session, digest
from quire.errors import Malformed, QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from quire.broker.journal import Journal
    from quire.broker.keeper import Keeper
    from quire.broker.sessions import Target

__all__ = ["Name", "World"]

# Handles or leases that are given up with one record of the journal. Each may be the end of an object.
_AT_ONCE = 4


class Name:
    """What a name stands for, and who may open it."""

    def __init__(self, target: Held | Bank, rights: Rights, users: list[int] | None, owner: int) -> None:
        """Describe it.

        Args:
            target: What it stands for.
            rights: Of the handles that are made by opening it.
            users: Who may open it, by user id; None is everybody.
            owner: The user who published it.
        """
        self.owner = owner
        self.target = target
        self.rights = rights
        self.users = users


class Token(Held):
    """An empty memfd that stands for an object: whoever shows it is given a handle."""

    kind = "token"

    def __init__(self, number: int, bank: Bank, target: Held, rights: Rights, descriptor: int) -> None:
        """Take the memfd over."""
        super().__init__(number, bank)
        self.target = target
        self.rights = rights
        self.descriptor = descriptor
        status = os.fstat(descriptor)
        self.identity = status.st_dev, status.st_ino


class World:
    """The broker's state, and the changes of it that take no time."""

    def __init__(self, journal: Journal, keeper: Keeper) -> None:
        """Start with nothing; `quire.broker.recovery` fills it."""
        self.journal = journal
        self.keeper = keeper
        self.banks: dict[int, Bank] = {}
        self.objects: dict[int, Held] = {}
        self.extents: dict[int, Extent] = {}
        self.layers: dict[int, Layer] = {}
        self.layers_by_identity: dict[tuple[int, int], Layer] = {}
        self.names: dict[str, Name] = {}
        self.tokens: dict[int, Token] = {}
        self.tokens_by_identity: dict[tuple[int, int], Token] = {}
        self.sessions: dict[int, Session] = {}
        self.sessions_by_digest: dict[bytes, Session] = {}
        # Handles that the sessions of a user hold together, by user id.
        self.handles: collections.Counter[int] = collections.Counter()
        self.leases: dict[int, Lease] = {}
        self.readers = Readers()
        self.last = 0
        self._forgotten: list[tuple[str, int]] = []
        # What follows is set by the server: how to end memory, and whom to tell of versions.
        self.reclaim: Callable[[Memory], object] = self.free_memory
        self.announce: Callable[[Factory], object] = repr

    def number(self) -> int:
        """A number that was never used."""
        self.last += 1
        self.journal.put("q", self.last)
        return self.last

    def commit(self) -> None:
        """Make what was changed last; only then is forgotten what the journal named before.

        Raises:
            OSError: The kernel refused.
        """
        self.journal.commit()
        while self._forgotten:
            crash_point("commit:forgetting")
            key, descriptor = self._forgotten[0]
            self.keeper.forget(key)
            # Not before: what is kept may have to be handed to another keeper.
            os.close(descriptor)
            del self._forgotten[0]

    def _forget(self, key: str, descriptor: int) -> None:
        self._forgotten.append((key, descriptor))

    # Banks

    def make_bank(self, parent: Bank | None, limit: Amount, name: str = "") -> Bank:
        """Open a bank; a sub-bank costs its parent an object.

        Raises:
            QuotaExceeded: The parent has no object left, or banks nest too deep.
        """
        bank = Bank(0, limit, parent, name)
        if parent is not None:
            try:
                parent.charge(OBJECT)
            except QuotaExceeded:
                parent.children.discard(bank)
                raise
        bank.number = self.number()
        self.banks[bank.number] = bank
        self.put_bank(bank)
        return bank

    def put_bank(self, bank: Bank) -> None:
        """Write it to the journal."""
        above = bank.parent.number if bank.parent else 0
        self.journal.put(f"b{bank.number}", [above, list(bank.limit), bank.name])

    def limit_bank(self, bank: Bank, limit: Amount) -> None:
        """Change the limits of a bank.

        Raises:
            QuotaExceeded: It pays for more than that already; nothing was changed.
        """
        for what, used, most in zip(Amount._fields, bank.used, limit, strict=True):
            if used > most:
                raise QuotaExceeded(f"bank {bank.number} pays for {used} {what}, more than {most}")
        bank.limit = limit
        self.put_bank(bank)

    def drop_bank(self, bank: Bank) -> None:
        """Close an empty bank."""
        parent = bank.parent
        bank.detach()
        if parent is not None:
            parent.discharge(OBJECT)
        del self.banks[bank.number]
        self.journal.put(f"b{bank.number}", None)
        if parent is not None:
            self.settle(parent)

    def settle(self, bank: Bank) -> None:
        """Close a bank that pays for nothing and was destroyed, or that nobody can name any more.

        Home banks have names and stay.
        """
        if bank.parent is None or bank.children or any(bank.used) or bank.number not in self.banks:
            return
        if bank.dead or not (bank.name or bank.references):
            self.drop_bank(bank)

    def home(self, uid: int, limit: Amount, root: Bank) -> Bank:
        """The bank of a user, opened when it is first needed."""
        name = f"uid-{uid}"
        for bank in root.children:
            if bank.name == name:
                return bank
        return self.make_bank(root, limit, name)

    # References

    def refer(self, target: Target) -> None:
        """Count a handle, name or token of an object."""
        target.references += 1

    def unrefer(self, target: Target) -> None:
        """Count one less; an object that nothing names any more ends."""
        target.references -= 1
        if isinstance(target, Bank):
            self.settle(target)
        elif target.references == 0 and not target.dead:
            self.end(target)

    def end(self, held: Held) -> None:
        """End an object. Memory is taken back from its lessees first, which takes a moment."""
        if held.dead:
            return
        if isinstance(held, Memory):
            held.dead = True
            self.reclaim(held)
        elif isinstance(held, SnapshotObject):
            self.drop_snapshot(held)
        elif isinstance(held, Factory):
            self.drop_factory(held)
        elif isinstance(held, Token):
            self.drop_token(held)

    def unname(self, held: Held) -> None:
        """Withdraw every name and token of an object that has ended."""
        for name in list(held.names):
            self.drop_name(name)
        for token in list(held.tokens):
            if isinstance(token, Token):
                self.drop_token(token)

    # Sessions and handles

    def make_session(self, token: bytes, pid: int, uid: int, home: Bank) -> Session:
        """Start a session."""
        session = Session(self.number(), digest(token), pid, uid, home)
        self.sessions[session.number] = session
        self.sessions_by_digest[session.token_digest] = session
        self.journal.put(f"s{session.number}", [session.token_digest, pid, uid, home.number])
        return session

    def drop_session(self, session: Session) -> None:
        """End a session with its handles, leases and saved replies."""
        for lease in list(session.leases.values()):
            self.cut_lease(lease, 0, lease.memory.padded_bytes)
        for handle in list(session.grips):
            self.close_handle(session, handle)
        for extent in session.stuck:
            self.free_stuck(extent)
        session.stuck = []
        given.outlives(self.journal, session)
        for slot in session.replies:
            self.journal.put(f"r{session.number}.{slot}", None)
        self.sessions.pop(session.number, None)
        self.sessions_by_digest.pop(session.token_digest, None)
        self.journal.put(f"s{session.number}", None)

    def give(self, session: Session, target: Target, rights: Rights) -> int:
        """Make a handle."""
        handle = session.next_handle
        self.hold(session, handle, Grip(target, rights))
        kind = "b" if isinstance(target, Bank) else "o"
        self.journal.put(f"h{session.number}.{handle}", [kind, target.number, int(rights)])
        return handle

    def hold(self, session: Session, handle: int, grip: Grip) -> None:
        """Enter a handle, new or from the journal."""
        session.grips[handle] = grip
        session.next_handle = max(session.next_handle, handle + 1)
        self.handles[session.uid] += 1
        self.refer(grip.target)

    def close_handle(self, session: Session, handle: int) -> None:
        """Give a handle up."""
        grip = session.grips.pop(handle)
        self.handles[session.uid] -= 1
        if not self.handles[session.uid]:
            del self.handles[session.uid]
        self.journal.put(f"h{session.number}.{handle}", None)
        if isinstance(grip.target, Factory) and session.subscriptions.get(grip.target) == handle:
            del session.subscriptions[grip.target]
        self.unrefer(grip.target)

    def close_handles(self, session: Session) -> Iterator[None]:
        """Give up all handles of a session step by step: others are served in between."""
        while session.grips:
            for handle in list(itertools.islice(session.grips, _AT_ONCE)):
                self.close_handle(session, handle)
            self.commit()
            yield

    def wind_up(self, session: Session) -> Iterator[None]:
        """End a session that nobody can come back to step by step."""
        self.sessions_by_digest.pop(session.token_digest, None)
        while session.leases and session.number in self.sessions:
            for lease in list(itertools.islice(session.leases.values(), _AT_ONCE)):
                self.cut_lease(lease, 0, lease.memory.padded_bytes)
            self.commit()
            yield
        yield from self.close_handles(session)
        if session.number in self.sessions:
            self.drop_session(session)
            self.commit()

    # Memory and leases

    def add_memory(self, memory: Memory, descriptors: list[int]) -> None:
        """Enter memory that is charged for and allocated; the descriptors are its own from now on."""
        for index, descriptor in enumerate(descriptors):
            extent = Extent(memory, index, self.number(), descriptor)
            memory.extents.append(extent)
            self.extents[extent.serial] = extent
            self.put_extent(extent)
        self.objects[memory.number] = memory
        self.put_memory(memory)

    def put_memory(self, memory: Memory) -> None:
        """Write it to the journal."""
        state = ["memory", memory.bank.number, memory.size_bytes, memory.extent_bytes, memory.sealed]
        self.journal.put(f"o{memory.number}", [*state, memory.shared, memory.maker])

    def put_extent(self, extent: Extent) -> None:
        """Write it to the journal."""
        self.journal.put(f"x{extent.serial}", [extent.memory.number, extent.index, extent.generation])

    def drop_move(self, extent: Extent, key: str, descriptor: int) -> None:
        """A move is over: what the extent was before is kept no more, and closed."""
        self.journal.put(f"v{extent.serial}", None)
        self._forget(key, descriptor)

    def free_memory(self, memory: Memory) -> int:
        """Cut memory off from everybody and give it back; return the bytes.

        What cannot be truncated, because its maker sealed it against that, stays charged to its bank until
        the maker's process has ended.
        """
        memory.dead = True
        freed = 0
        stuck = []
        for lease in list(memory.leases):
            self.cut_lease(lease, 0, memory.padded_bytes)
        for extent in memory.extents:
            given.forget(self.journal, extent)
            self.journal.put(f"x{extent.serial}", None)
            del self.extents[extent.serial]
            self.readers.drop(extent.serial)
            try:
                os.ftruncate(extent.descriptor, 0)
                freed += extent.length
            except PermissionError:
                stuck.append(extent)
            else:
                self._forget(extent.key, extent.descriptor)
        self.objects.pop(memory.number, None)
        self.journal.put(f"o{memory.number}", None)
        self.unname(memory)
        kept = Amount(sum(extent.length for extent in stuck), 0, len(stuck))
        memory.bank.discharge(memory.cost.minus(kept))
        owner = self.sessions.get(memory.maker)
        for extent in stuck:
            self.journal.put(
                f"z{extent.serial}", [memory.bank.number, extent.length, extent.generation, memory.maker]
            )
            if owner is not None:
                owner.stuck.append(extent)
            else:
                self.free_stuck(extent)
        self.settle(memory.bank)
        return freed

    def free_stuck(self, extent: Extent) -> None:
        """Give up what could not be truncated; its maker has ended."""
        self._forget(extent.key, extent.descriptor)
        self.journal.put(f"z{extent.serial}", None)
        extent.memory.bank.discharge(extent.cost)
        self.settle(extent.memory.bank)

    def make_lease(self, session: Session, memory: Memory, start: int, stop: int, write: bool) -> Lease:
        """Lend a range, page aligned."""
        lease = Lease(self.number(), memory, session, [(start, stop)], write)
        session.leases[lease.number] = lease
        self.leases[lease.number] = lease
        for extent in lease.extents():
            given.lent(self.journal, extent, session)
        self.put_lease(lease)
        return lease

    def put_lease(self, lease: Lease) -> None:
        """Write it to the journal."""
        state = [lease.memory.number, lease.session.number, lease.spans, lease.write]
        self.journal.put(f"l{lease.number}", state if lease.spans else None)

    def cut_lease(self, lease: Lease, start: int, stop: int) -> None:
        """Take a range out of a lease, perhaps all of it."""
        lease.cut(start, stop)
        self.put_lease(lease)
        if not lease.spans:
            lease.session.leases.pop(lease.number, None)
            self.leases.pop(lease.number, None)

    # Snapshots

    def add_snapshot(self, bank: Bank, descriptors: list[int], size_bytes: int) -> SnapshotObject:
        """Enter a snapshot whose layers were checked; the descriptors are the broker's from now on.

        The bank is charged for the object and for those layers that nobody pays for yet.

        Raises:
            QuotaExceeded: It has too little left; the descriptors are closed.
            NotImmutable, Malformed: A layer may change, or may come to cost more. They are closed.
        """
        try:
            checked = [check_layer(descriptor) for descriptor in descriptors]
            if len({(dev, ino) for dev, ino, _ in checked}) != len(checked):
                raise Malformed("a snapshot names a layer twice")
            cost = OBJECT
            for dev, ino, size in checked:
                if (dev, ino) not in self.layers_by_identity:
                    cost = cost.plus(Amount(size, 0, 1))
            bank.charge(cost)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        layers = []
        for descriptor, (dev, ino, _) in zip(descriptors, checked, strict=True):
            layer = self.layers_by_identity.get((dev, ino))
            if layer is None:
                layer = Layer(self.number(), descriptor, bank)
                self.keeper.keep(layer.key, descriptor)
                self.layers[layer.number] = layer
                self.layers_by_identity[dev, ino] = layer
                self._put_layer(layer)
            else:
                os.close(descriptor)
            layers.append(layer)
        snapshot = SnapshotObject(self.number(), bank, layers, size_bytes)
        self._put_snapshot(snapshot)
        return snapshot

    def _put_layer(self, layer: Layer) -> None:
        self.journal.put(f"y{layer.number}", [layer.payer.number])

    def _put_snapshot(self, snapshot: SnapshotObject) -> None:
        self.objects[snapshot.number] = snapshot
        numbers = [layer.number for layer in snapshot.layers]
        self.journal.put(
            f"o{snapshot.number}", ["snapshot", snapshot.bank.number, snapshot.size_bytes, numbers]
        )

    def grant(self, snapshot: SnapshotObject, bank: Bank) -> SnapshotObject:
        """Let a bank pay for a snapshot; return an object of its own with the same layers.

        Raises:
            QuotaExceeded: It has too little left; nobody's charge was changed.
        """
        moved: list[tuple[Layer, Bank]] = []
        bank.charge(OBJECT)
        try:
            for layer in snapshot.layers:
                if layer.payer is not bank:
                    layer.payer.transfer(layer.cost, bank)
                    moved.append((layer, layer.payer))
                    layer.payer = bank
        except QuotaExceeded:
            for layer, payer in reversed(moved):
                # It was paid a moment ago, so there is room for it.
                bank.transfer(layer.cost, payer)
                layer.payer = payer
            bank.discharge(OBJECT)
            raise
        for layer, _ in moved:
            self._put_layer(layer)
        granted = SnapshotObject(self.number(), bank, list(snapshot.layers), snapshot.size_bytes)
        self._put_snapshot(granted)
        return granted

    def drop_snapshot(self, snapshot: SnapshotObject) -> None:
        """Give a snapshot up. What it paid for and others use is paid by the first of them that can.

        Where none can, those objects end too: memory that nobody pays for is not kept.
        """
        if snapshot.dead:
            return
        snapshot.dead = True
        self.objects.pop(snapshot.number, None)
        self.journal.put(f"o{snapshot.number}", None)
        self.unname(snapshot)
        for factory in list(snapshot.shown_by):
            if isinstance(factory, Factory):
                self.show(factory, None)
                self.put_factory(factory)
        orphans: list[SnapshotObject] = []
        for layer in snapshot.layers:
            layer.holders.pop(snapshot, None)
            if any(holder.bank is layer.payer for holder in layer.holders):
                continue
            for holder in layer.holders:
                with contextlib.suppress(QuotaExceeded):
                    layer.payer.transfer(layer.cost, holder.bank)
                    layer.payer = holder.bank
                    self._put_layer(layer)
                    break
            else:
                orphans += [holder for holder in layer.holders if holder not in orphans]
                self._drop_layer(layer)
        snapshot.bank.discharge(OBJECT)
        for orphan in orphans:
            self.drop_snapshot(orphan)
        self.settle(snapshot.bank)

    def _drop_layer(self, layer: Layer) -> None:
        for holder in layer.holders:
            holder.layers = [each for each in holder.layers if each is not layer]
        layer.payer.discharge(layer.cost)
        del self.layers[layer.number]
        del self.layers_by_identity[layer.identity]
        self.journal.put(f"y{layer.number}", None)
        self._forget(layer.key, layer.descriptor)

    # Factories

    def make_factory(self, bank: Bank) -> Factory:
        """Make a factory without a version.

        Raises:
            QuotaExceeded: The bank has no object left.
        """
        bank.charge(OBJECT)
        factory = Factory(self.number(), bank)
        self.put_factory(factory)
        return factory

    def put_factory(self, factory: Factory) -> None:
        """Write it to the journal."""
        self.objects[factory.number] = factory
        current = factory.current.number if factory.current else 0
        self.journal.put(f"o{factory.number}", ["factory", factory.bank.number, factory.version, current])

    def show(self, factory: Factory, snapshot: SnapshotObject | None) -> SnapshotObject | None:
        """Set the current version of a factory; return what it was. References are the caller's to count."""
        old, factory.current = factory.current, snapshot
        if old is not None:
            old.shown_by.pop(factory, None)
        if snapshot is not None:
            snapshot.shown_by[factory] = None
        return old

    def put_version(self, factory: Factory, snapshot: SnapshotObject) -> None:
        """Make a snapshot the current version; the one before it is held by those who asked for it only."""
        self.refer(snapshot)
        old = self.show(factory, snapshot)
        factory.version += 1
        self.put_factory(factory)
        if old is not None:
            self.unrefer(old)
        self.announce(factory)

    def drop_factory(self, factory: Factory) -> None:
        """End a factory; versions that somebody has a handle of stay."""
        factory.dead = True
        self.objects.pop(factory.number, None)
        self.journal.put(f"o{factory.number}", None)
        self.unname(factory)
        current = self.show(factory, None)
        if current is not None:
            self.unrefer(current)
        factory.bank.discharge(OBJECT)
        self.settle(factory.bank)

    # Names and tokens

    def add_name(self, name: str, entry: Name) -> None:
        """Publish."""
        self.enter_name(name, entry)
        kind = "b" if isinstance(entry.target, Bank) else "o"
        self.journal.put(f"n{name}", [kind, entry.target.number, int(entry.rights), entry.users, entry.owner])

    def enter_name(self, name: str, entry: Name) -> None:
        """Make it known; it holds what it stands for."""
        self.names[name] = entry
        if isinstance(entry.target, Held):
            entry.target.names.add(name)
        self.refer(entry.target)

    def drop_name(self, name: str) -> None:
        """Withdraw a name."""
        entry = self.names.pop(name)
        if isinstance(entry.target, Held):
            entry.target.names.discard(name)
        self.journal.put(f"n{name}", None)
        if not entry.target.dead:
            self.unrefer(entry.target)

    def add_token(self, target: Held, rights: Rights) -> Token:
        """Make a descriptor that stands for an object; the object's bank pays for it.

        Raises:
            QuotaExceeded: It has too little left.
        """
        target.bank.charge(Amount(0, 1, 1))
        descriptor = os.memfd_create("quire-capability", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(descriptor, 0o400)
        # Nothing can ever be stored in it, so it costs no memory.
        fcntl.fcntl(
            descriptor,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL,
        )
        token = Token(self.number(), target.bank, target, rights, descriptor)
        self.keeper.keep(f"t{token.number}", descriptor)
        self.enter_token(token)
        self.journal.put(f"t{token.number}", [target.number, int(rights)])
        return token

    def enter_token(self, token: Token) -> None:
        """Make it known; it holds its object."""
        self.tokens[token.number] = token
        self.tokens_by_identity[token.identity] = token
        token.target.tokens[token] = None
        self.refer(token.target)

    def drop_token(self, token: Token) -> None:
        """Make a token mean nothing."""
        if token.dead:
            return
        token.dead = True
        del self.tokens[token.number]
        del self.tokens_by_identity[token.identity]
        token.target.tokens.pop(token, None)
        self.journal.put(f"t{token.number}", None)
        self._forget(f"t{token.number}", token.descriptor)
        token.bank.discharge(Amount(0, 1, 1))
        if not token.target.dead:
            self.unrefer(token.target)

    # Audit

    def descriptors(self) -> Iterable[int]:
        """Every memfd that is charged for."""
        for extent in self.extents.values():
            yield extent.descriptor
        for layer in self.layers.values():
            yield layer.descriptor
        for session in self.sessions.values():
            for extent in session.stuck:
                yield extent.descriptor

    def audit(self) -> list[str]:
        """Compare what is charged with what is held and with what the kernel says; return what is wrong."""
        wrong = []
        due: dict[Bank, Any] = {bank: Amount(0) for bank in self.banks.values()}

        def add(bank: Bank, amount: Amount) -> None:
            for each in bank.line():
                due[each] = due[each].plus(amount)

        for bank in self.banks.values():
            if bank.parent is not None:
                add(bank.parent, OBJECT)
        for held in self.objects.values():
            add(held.bank, held.cost if isinstance(held, Memory) else OBJECT)
        for layer in self.layers.values():
            add(layer.payer, layer.cost)
        for token in self.tokens.values():
            add(token.bank, Amount(0, 1, 1))
        for session in self.sessions.values():
            for extent in session.stuck:
                add(extent.memory.bank, extent.cost)
        for held in self.objects.values():
            names = {name for name, entry in self.names.items() if entry.target is held}
            tokens = {token for token in self.tokens.values() if token.target is held}
            if held.names != names or set(held.tokens) != tokens:
                wrong.append(f"object {held.number} does not know what stands for it")
            if isinstance(held, Factory) and held.current and held not in held.current.shown_by:
                wrong.append(
                    f"version {held.version} of factory {held.number} does not know that it is shown"
                )
        held_by = collections.Counter[int]()
        for session in self.sessions.values():
            held_by[session.uid] += len(session.grips)
        if +held_by != self.handles:
            wrong.append(f"users hold the handles {+held_by}, and {self.handles} are counted")
        for bank, amount in due.items():
            if bank.used != amount:
                wrong.append(f"bank {bank.number} is charged {bank.used} and should be {amount}")
            for used, limit in zip(bank.used, bank.limit, strict=True):
                if used > limit:
                    wrong.append(f"bank {bank.number} is over its limit: {bank.used} of {bank.limit}")
        held_bytes = sum(os.fstat(descriptor).st_blocks * 512 for descriptor in self.descriptors())
        paid = sum(bank.used.bytes for bank in self.banks.values() if bank.parent is None)
        if held_bytes != paid:
            wrong.append(f"the kernel has {held_bytes} bytes allocated, the banks pay for {paid}")
        return wrong
