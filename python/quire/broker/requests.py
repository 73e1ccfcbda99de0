"""What each request does. A handler returns its reply, and the descriptors that go with it by name.

Descriptors are named, not opened, so that a reply can be sent again after a restart: ``x5r`` and ``x5w`` are
extent 5 for reading and for writing, ``y7`` is layer 7, ``t9`` the token 9.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import TYPE_CHECKING, Any, TypeAlias, cast, get_args

from quire import _native
from quire.ancillary import discard
from quire.broker import objects, protocol, rows
from quire.broker.banks import Amount, Bank
from quire.broker.crashpoints import crash_point
from quire.broker.leases import MAX_PARTS
from quire.broker.objects import Factory, Held, Memory, SnapshotObject
from quire.broker.protocol import ALL_RIGHTS, Rights
from quire.broker.world import Name
from quire.errors import Malformed, QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from quire.broker.config import Config
    from quire.broker.factory import Announcer
    from quire.broker.leases import Lease
    from quire.broker.protocol import Reply
    from quire.broker.revocation import Revoker
    from quire.broker.sessions import Session
    from quire.broker.turns import Turns
    from quire.broker.world import World

    Answer: TypeAlias = tuple[Reply, list[str]]

__all__ = ["Requests"]

PAGE = _native.PAGE_SIZE
_INLINE_BYTES = 256 << 10
_MAX_HOLDERS = 500
_HOLDERS_AT_ONCE = 32
# Half of what a lender may make of it, so that a lessee cannot keep parts from being taken back.
_MAX_GIVEN_PARTS = MAX_PARTS // 2


def _check_administrator(session: Session) -> None:
    """Let pass the broker's own user and root, who could do anything to its process anyhow.

    Raises:
        PermissionError: The client runs as somebody else.
    """
    if session.uid not in (0, os.geteuid()):
        raise PermissionError("only root and the broker's own user may administer it")


class Requests:
    """Carries requests out on the world."""

    def __init__(
        self, world: World, revoker: Revoker, announcer: Announcer, turns: Turns, config: Config
    ) -> None:
        """Prepare."""
        self._world = world
        self._revoker = revoker
        self._announcer = announcer
        self._turns = turns
        self._config = config
        self._handlers: dict[type[protocol.Request], Callable[..., Any]] = {
            kind: getattr(self, f"_{kind.__name__.lower()}")
            for kind in get_args(protocol.ClientMessage)
            if kind not in (protocol.Hello, protocol.Acknowledge)
        }

    def __call__(
        self, session: Session, message: protocol.Request, descriptors: list[int]
    ) -> Answer | Coroutine[None, None, Answer]:
        """Carry a request out, at once or, where it takes time, as a coroutine.

        Raises:
            Exception: What went wrong; nothing was changed.
        """
        handler = self._handlers[type(message)]
        if isinstance(message, protocol.WITH_DESCRIPTORS):
            return cast("Answer", handler(session, message, descriptors))
        return cast("Answer", handler(session, message))

    # Helpers

    def _give(self, session: Session, target: Held | Bank, rights: Rights) -> int:
        self._room(session)
        return self._world.give(session, target, rights)

    def _room(self, session: Session) -> None:
        """Refuse before anything is made that could then not be given."""
        if len(session.grips) >= self._config.handles:
            raise QuotaExceeded(f"a client holds {self._config.handles} handles at most")
        if self._world.handles[session.uid] >= self._config.user_handles:
            raise QuotaExceeded(f"the clients of a user hold {self._config.user_handles} handles at most")

    @staticmethod
    def _memory(session: Session, handle: int, rights: Rights) -> Memory:
        return cast("Memory", session.grip(handle, rights, "memory"))

    @staticmethod
    def _bank(session: Session, handle: int, rights: Rights) -> Bank:
        return cast("Bank", session.grip(handle, rights, "bank"))

    @staticmethod
    def _range(memory: Memory, offset: int, length: int) -> tuple[int, int]:
        """A range of bytes, widened to pages.

        Raises:
            ValueError: It is empty or not within the memory.
        """
        stop = min(offset + length, memory.size_bytes) if length == protocol.WHOLE else offset + length
        if not 0 <= offset < stop <= memory.size_bytes:
            raise ValueError(f"bytes {offset} to {stop} are not within memory of {memory.size_bytes}")
        return offset // PAGE * PAGE, -(-stop // PAGE) * PAGE

    # Plain ones

    def _ping(self, _session: Session, message: protocol.Ping) -> Answer:
        return protocol.Done(message.id), []

    async def _bye(self, session: Session, message: protocol.Bye) -> Answer:
        await self._turns.run(session.uid, self._world.close_handles(session))
        return protocol.Done(message.id), []

    def _describe(self, session: Session, message: protocol.Describe) -> Answer:
        target = session.grip(message.handle, Rights(0))
        rights = int(session.grips[message.handle].rights)
        if isinstance(target, Bank):
            return protocol.Description(
                message.id, target.kind, rights, used=list(target.used), limit=list(target.limit)
            ), []
        size = getattr(target, "size_bytes", 0)
        return protocol.Description(
            message.id,
            target.kind,
            rights,
            size,
            sealed=isinstance(target, SnapshotObject) or getattr(target, "sealed", False),
            version=getattr(target, "version", 0),
        ), []

    def _close(self, session: Session, message: protocol.Close) -> Answer:
        if message.handle not in session.grips:
            raise LookupError(f"no handle {message.handle}")
        self._world.close_handle(session, message.handle)
        return protocol.Done(message.id), []

    def _weaken(self, session: Session, message: protocol.Weaken) -> Answer:
        rights = Rights(message.rights)
        target = session.grip(message.handle, rights)
        return protocol.Handle(message.id, self._give(session, target, rights), int(rights)), []

    # Banks

    def _makebank(self, session: Session, message: protocol.MakeBank) -> Answer:
        parent = self._bank(session, message.bank, Rights.WRITE)
        self._room(session)
        limit = Amount(message.limit_bytes, message.limit_objects, message.limit_descriptors)
        bank = self._world.make_bank(parent, limit)
        rights = ALL_RIGHTS & ~(Rights.LEND | Rights.SNAPSHOT)
        return protocol.Handle(message.id, self._give(session, bank, rights), int(rights)), []

    def _limitbank(self, session: Session, message: protocol.LimitBank) -> Answer:
        bank = self._bank(session, message.handle, Rights.DESTROY)
        limit = Amount(message.limit_bytes, message.limit_objects, message.limit_descriptors)
        self._world.limit_bank(bank, limit)
        return protocol.Done(message.id), []

    # Administration

    def _list(self, session: Session, message: protocol.List) -> Answer:
        _check_administrator(session)
        found, more = rows.page(self._world, message.what, message.after)
        return protocol.Listed(message.id, **{message.what: found}, more=more), []  # type: ignore[arg-type]

    def _administer(self, session: Session, message: protocol.Administer) -> Answer:
        _check_administrator(session)
        target = self._world.banks.get(message.number) or self._world.objects.get(message.number)
        if target is None or target.dead:
            raise LookupError(f"nothing has the number {message.number}")
        if isinstance(target, Bank):
            # What the broker needs itself is bounded by its configuration and ends with it.
            own = target.parent is None or (target.parent.parent is None and target.name)
            rights = Rights.READ if own else ALL_RIGHTS & ~(Rights.SNAPSHOT | Rights.LEND)
        else:
            # To take back and to end, not to look into.
            rights = Rights.LEND | Rights.DESTROY if isinstance(target, Memory) else Rights.DESTROY
        return protocol.Handle(message.id, self._give(session, target, rights), int(rights)), []

    # Memory

    async def _make(self, session: Session, message: protocol.Make) -> Answer:
        bank = self._bank(session, message.bank, Rights.WRITE)
        self._room(session)
        if not message.size_bytes:
            raise ValueError("memory has at least one byte")
        extent_bytes = objects.extent_size(message.size_bytes, message.extent_bytes)
        memory = Memory(
            self._world.number(),
            bank,
            message.size_bytes,
            extent_bytes,
            shared=message.shared,
            maker=session.number,
        )
        bank.charge(memory.cost)
        crash_point("make:charged")
        made: list[int] = []
        try:
            for index in range(memory.extent_count):
                length = min(extent_bytes, memory.padded_bytes - index * extent_bytes)
                if length <= _INLINE_BYTES:
                    made.append(objects.allocate(length)[0])
                else:
                    made.append((await asyncio.to_thread(objects.allocate, length))[0])
                if memory.shared:
                    objects.seal_extent(made[-1], 0)
                if session.number not in self._world.sessions or bank.dead:
                    raise LookupError("the bank, or the client, has gone meanwhile")
            self._room(session)
            crash_point("make:allocated")
            self._world.add_memory(memory, made)
            for extent in memory.extents:
                self._world.keeper.keep(extent.key, extent.descriptor)
        except BaseException:
            if memory.extents:
                self._world.free_memory(memory)
            else:
                for descriptor in made:
                    os.close(descriptor)
                bank.discharge(memory.cost)
                self._world.settle(bank)
            raise
        crash_point("make:kept")
        rights = ALL_RIGHTS & ~Rights.SNAPSHOT
        return protocol.Handle(message.id, self._give(session, memory, rights), int(rights)), []

    async def _seal(self, session: Session, message: protocol.Seal) -> Answer:
        memory = self._memory(session, message.handle, Rights.WRITE)
        async with self._revoker.lock(memory):
            if memory.dead:
                raise LookupError("the memory has ended meanwhile")
            if memory.shared:
                raise ValueError("shared memory stays writable; only memory with one writer can be sealed")
            for extent in memory.extents:
                extent.seal()
            memory.sealed = True
            self._world.put_memory(memory)
        return protocol.Done(message.id), []

    def _lease(self, session: Session, message: protocol.Lease) -> Answer | Coroutine[None, None, Answer]:
        memory = self._memory(session, message.handle, Rights.WRITE if message.write else Rights.READ)
        if self._revoker.lock(memory).locked():
            return self._lease_later(session, message, memory)
        return self._lease_now(session, message, memory)

    async def _lease_later(self, session: Session, message: protocol.Lease, memory: Memory) -> Answer:
        async with self._revoker.lock(memory):
            if session.number not in self._world.sessions:
                raise LookupError("the client has gone meanwhile")
            return self._lease_now(session, message, memory)

    def _lease_now(self, session: Session, message: protocol.Lease, memory: Memory) -> Answer:
        start, stop = self._range(memory, message.offset, message.length)
        if memory.dead:
            raise LookupError("the memory has ended")
        if not memory.shared:
            if message.write and (memory.sealed or session.number != memory.maker):
                raise PermissionError(
                    "only its maker maps this memory writable, and only before it is sealed"
                )
            if not message.write and not memory.sealed and session.number != memory.maker:
                raise PermissionError("the memory is not sealed yet, so it is lent to its maker only")
        if len(session.leases) >= self._config.leases:
            raise QuotaExceeded(f"a client holds {self._config.leases} leases at most")
        lease = self._world.make_lease(session, memory, start, stop, message.write)
        extents = lease.extents()
        reply = protocol.Leased(
            message.id,
            lease.number,
            memory.size_bytes,
            memory.extent_bytes,
            extents[0].index,
            [extent.serial for extent in extents],
            memory.sealed,
        )
        return reply, [f"x{extent.serial}{'w' if message.write else 'r'}" for extent in extents]

    def _release(self, session: Session, message: protocol.Release) -> Answer:
        lease = session.leases.get(message.lease)
        if lease is not None:
            whole = message.length == protocol.WHOLE
            stop = lease.memory.padded_bytes if whole else message.offset + message.length
            if message.offset % PAGE or stop % PAGE:
                raise ValueError("a lease is given back by pages")
            if lease.splits(message.offset, stop) and len(lease.spans) >= _MAX_GIVEN_PARTS:
                raise QuotaExceeded(
                    f"a lease has {_MAX_GIVEN_PARTS} parts at most: give back from an end of one"
                )
            self._world.cut_lease(lease, message.offset, stop)
        # One that was revoked at the same moment is gone, which is what was wanted.
        return protocol.Done(message.id), []

    def _holders(self, session: Session, message: protocol.Holders) -> Answer | Coroutine[None, None, Answer]:
        memory = self._memory(session, message.handle, Rights.LEND)
        # A look at all of many thousands would keep others waiting.
        shown = list(itertools.islice(memory.leases, _MAX_HOLDERS))
        if len(shown) > _HOLDERS_AT_ONCE:
            return self._many_holders(session, message, memory, shown)
        found = [row for lease in shown for row in self._holder_rows(lease)]
        return self._holder_list(message, memory, shown, found)

    async def _many_holders(
        self, session: Session, message: protocol.Holders, memory: Memory, shown: list[Lease]
    ) -> Answer:
        found: list[protocol.Holder] = []

        def look() -> Iterator[None]:
            for index, lease in enumerate(shown, 1):
                found.extend(self._holder_rows(lease))
                if index % _HOLDERS_AT_ONCE == 0:
                    yield

        await self._turns.run(session.uid, look())
        return self._holder_list(message, memory, shown, found)

    @staticmethod
    def _holder_rows(lease: Lease) -> list[protocol.Holder]:
        session = lease.session
        return [
            protocol.Holder(
                session.number,
                session.pid,
                session.uid,
                start,
                stop - start,
                lease.write,
                session.port is not None,
            )
            for start, stop in lease.spans
        ]

    @staticmethod
    def _holder_list(
        message: protocol.Holders, memory: Memory, shown: list[Lease], found: list[protocol.Holder]
    ) -> Answer:
        more = max(0, len(found) - _MAX_HOLDERS) + max(0, len(memory.leases) - len(shown))
        return protocol.HolderList(message.id, found[:_MAX_HOLDERS], more), []

    async def _revoke(self, session: Session, message: protocol.Revoke) -> Answer:
        memory = self._memory(session, message.handle, Rights.LEND)
        start, stop = self._range(memory, message.offset, message.length)
        if message.client:
            chosen = self._world.sessions.get(message.client)
            sessions = [chosen] if chosen is not None else []
        else:
            had = [
                each for index in memory.within(start, stop) for each in memory.extents[index].given.values()
            ]
            holders = [*(lease.session for lease in memory.leases), *had]
            sessions = [each for each in dict.fromkeys(holders) if each is not None and each is not session]
        reply = await self._revoker.revoke(
            memory,
            start,
            stop,
            sessions,
            deadline_ms=message.deadline_ms,
            certain=message.certain,
            everybody=not message.client,
            request=message.id,
        )
        return reply, []

    # Snapshots

    async def _deposit(self, session: Session, message: protocol.Deposit, descriptors: list[int]) -> Answer:
        try:
            bank = self._bank(session, message.bank, Rights.WRITE)
            self._room(session)
            for descriptor in descriptors:
                objects.check_layer(descriptor)
            size_bytes = await asyncio.to_thread(self._size, [os.dup(each) for each in descriptors])
            if session.number not in self._world.sessions or bank.dead:
                raise LookupError("the bank, or the client, has gone meanwhile")
            self._room(session)
        except BaseException:
            discard(descriptors)
            raise
        snapshot = self._world.add_snapshot(bank, descriptors, size_bytes)
        crash_point("deposit:kept")
        rights = ALL_RIGHTS & ~(Rights.WRITE | Rights.LEND)
        return protocol.Handle(message.id, self._give(session, snapshot, rights), int(rights)), []

    @staticmethod
    def _size(descriptors: list[int]) -> int:
        """Verify a snapshot whole; takes the descriptors. For any thread."""
        if not descriptors:
            raise Malformed("a snapshot has at least one layer")
        snapshot = _native.Snapshot.from_fds(descriptors)
        try:
            return snapshot.size
        finally:
            snapshot.close()

    def _fetch(self, session: Session, message: protocol.Fetch) -> Answer:
        snapshot = cast("SnapshotObject", session.grip(message.handle, Rights.READ, "snapshot"))
        return protocol.Layers(message.id, message.handle), [layer.key for layer in snapshot.layers]

    def _grant(self, session: Session, message: protocol.Grant) -> Answer:
        snapshot = cast("SnapshotObject", session.grip(message.handle, Rights.SNAPSHOT, "snapshot"))
        bank = self._bank(session, message.bank, Rights.WRITE)
        self._room(session)
        granted = self._world.grant(snapshot, bank)
        rights = ALL_RIGHTS & ~(Rights.WRITE | Rights.LEND)
        handle = self._give(session, granted, rights)
        return protocol.Handle(message.id, handle, int(rights)), [layer.key for layer in granted.layers]

    # Factories

    def _makefactory(self, session: Session, message: protocol.MakeFactory) -> Answer:
        bank = self._bank(session, message.bank, Rights.WRITE)
        self._room(session)
        factory = self._world.make_factory(bank)
        rights = ALL_RIGHTS & ~(Rights.LEND | Rights.SNAPSHOT)
        return protocol.Handle(message.id, self._give(session, factory, rights), int(rights)), []

    def _put(self, session: Session, message: protocol.Put) -> Answer:
        factory = cast("Factory", session.grip(message.handle, Rights.WRITE, "factory"))
        snapshot = cast("SnapshotObject", session.grip(message.snapshot, Rights.READ, "snapshot"))
        if snapshot.bank is not factory.bank:
            raise PermissionError("a version is paid for by the bank of its factory: take a grant first")
        self._world.put_version(factory, snapshot)
        return protocol.Layers(message.id, message.handle, factory.version), []

    def _current(self, session: Session, message: protocol.Current) -> Answer:
        factory = cast("Factory", session.grip(message.handle, Rights.READ, "factory"))
        if factory.current is None:
            raise LookupError("the factory has no version yet")
        handle = self._give(session, factory.current, Rights.READ | Rights.SNAPSHOT)
        self._announcer.asked(session, factory)
        reply = protocol.Layers(message.id, handle, factory.version)
        return reply, [layer.key for layer in factory.current.layers]

    def _subscribe(self, session: Session, message: protocol.Subscribe) -> Answer:
        factory = cast("Factory", session.grip(message.handle, Rights.READ, "factory"))
        if message.on:
            self._announcer.subscribe(session, factory, message.handle)
        else:
            self._announcer.unsubscribe(session, factory)
        return protocol.Done(message.id), []

    # Names and tokens

    def _publish(self, session: Session, message: protocol.Publish) -> Answer:
        rights = Rights(message.rights)
        target = session.grip(message.handle, rights | Rights.PUBLISH)
        if message.users is not None and len(message.users) > 1024:
            raise ValueError("a list of at most 1024 users")
        if message.name in self._world.names:
            raise FileExistsError(f"the name {message.name!r} is taken")
        if sum(1 for entry in self._world.names.values() if entry.owner == session.uid) >= self._config.names:
            raise QuotaExceeded(f"a user has {self._config.names} names at most")
        self._world.add_name(message.name, Name(target, rights, message.users, session.uid))
        return protocol.Done(message.id), []

    def _unpublish(self, session: Session, message: protocol.Unpublish) -> Answer:
        target = session.grip(message.handle, Rights.PUBLISH)
        entry = self._world.names.get(message.name)
        if entry is None or entry.target is not target:
            raise LookupError(f"no name {message.name!r} of this object")
        self._world.drop_name(message.name)
        return protocol.Done(message.id), []

    def _open(self, session: Session, message: protocol.Open) -> Answer:
        entry = self._world.names.get(message.name)
        # A name that one may not open and one that is not there look the same.
        if entry is None or entry.target.dead or (entry.users is not None and session.uid not in entry.users):
            raise LookupError(f"no name {message.name!r}")
        handle = self._give(session, entry.target, entry.rights)
        return protocol.Handle(message.id, handle, int(entry.rights)), []

    def _export(self, session: Session, message: protocol.Export) -> Answer:
        rights = Rights(message.rights)
        target = session.grip(message.handle, rights)
        if isinstance(target, Bank):
            raise TypeError("a bank has no descriptor; publish it under a name")
        token = self._world.add_token(target, rights)
        return protocol.Done(message.id), [f"t{token.number}"]

    def _import(self, session: Session, message: protocol.Import, descriptors: list[int]) -> Answer:
        try:
            if len(descriptors) != 1:
                raise Malformed("Import comes with one descriptor")
            # Only of a memfd is anything asked: fstat of a file of FUSE would wait for whoever serves it.
            objects.seals(descriptors[0])
            status = os.fstat(descriptors[0])
            token = self._world.tokens_by_identity.get((status.st_dev, status.st_ino))
        finally:
            discard(descriptors)
        if token is None or token.target.dead:
            raise LookupError("the descriptor stands for nothing")
        handle = self._give(session, token.target, token.rights)
        return protocol.Handle(message.id, handle, int(token.rights)), []

    # Endings

    async def _destroy(self, session: Session, message: protocol.Destroy) -> Answer:
        held = session.grips.get(message.handle)
        if held is not None and held.target.dead and Rights.DESTROY in held.rights:
            # It has ended already; so it is when a restart comes between the end and the answer.
            return protocol.Revoked(message.id, []), []
        target = session.grip(message.handle, Rights.DESTROY)
        freed, outcomes = 0, []
        if isinstance(target, Memory):
            done = await self._revoker.reclaim(target, message.deadline_ms)
            freed, outcomes = done.freed_bytes, done.outcomes
        elif isinstance(target, Bank):
            if target.parent is None or target.name:
                raise PermissionError("the bank of a user is not destroyed")
            freed, outcomes = await self._destroy_bank(target, message.deadline_ms)
        else:
            self._world.end(target)
        return protocol.Revoked(message.id, outcomes[:_MAX_HOLDERS], freed_bytes=freed), []

    async def _destroy_bank(self, bank: Bank, deadline_ms: int) -> tuple[int, list[protocol.Outcome]]:
        """Reclaim all that a bank and those below it pay for."""
        before = bank.used.bytes
        banks = list(bank.below())
        for each in banks:
            each.dead = True
        for name in [name for name, entry in self._world.names.items() if entry.target in banks]:
            self._world.drop_name(name)
        ended = [held for held in self._world.objects.values() if held.bank in banks]
        memories = [held for held in ended if isinstance(held, Memory)]
        for held in ended:
            if not isinstance(held, Memory):
                self._world.end(held)
        done = await asyncio.gather(*(self._revoker.reclaim(each, deadline_ms) for each in memories))
        for token in [each for each in self._world.tokens.values() if each.bank in banks]:
            self._world.end(token)
        for each in reversed(banks):
            self._world.settle(each)
        return before - bank.used.bytes, [outcome for each in done for outcome in each.outcomes]
