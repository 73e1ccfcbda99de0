"""What clients ask of a broker, without waiting: each operation is a generator of steps.

`quire.client` runs them by blocking, `quire.aio` by awaiting. A step is a request; what is sent back into the
generator is its result.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from quire import _native
from quire.broker import protocol
from quire.broker.borrowed import Borrowed, Lease
from quire.broker.protocol import Rights
from quire.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from quire.broker.rows import BankRow, ClientRow, LeaseRow, ObjectRow

    Result = TypeVar("Result")
    Steps: TypeAlias = Generator["Step", Any, Result]

__all__ = ["Handle", "Operations", "Step", "Survey", "Taken"]


class Handle(NamedTuple):
    """A capability of one client: it means nothing to anybody else."""

    number: int
    rights: Rights


class Step(NamedTuple):
    """One request."""

    kind: type[protocol.Request]
    fields: Mapping[str, object]
    descriptors: Sequence[int] = ()
    finish: Callable[[Any, list[int]], Any] | None = None


class Taken(NamedTuple):
    """What a revocation or a destruction did."""

    outcomes: list[protocol.Outcome]
    freed_bytes: int
    moved_bytes: int


class Survey(NamedTuple):
    """Everything that a broker knows of; each list in the order of the numbers."""

    clients: list[ClientRow]
    banks: list[BankRow]
    objects: list[ObjectRow]
    leases: list[LeaseRow]


class Operations:
    """The steps of every operation of one client."""

    def __init__(self, borrowed: Borrowed) -> None:
        """Keep leases in ``borrowed``."""
        self._borrowed = borrowed

    @staticmethod
    def _handle(reply: protocol.Handle) -> Handle:
        return Handle(reply.handle, Rights(reply.rights))

    def ping(self) -> Steps[None]:
        """Nothing."""
        yield Step(protocol.Ping, {})

    def make_bank(
        self, parent: Handle, limit_bytes: int, limit_objects: int, limit_descriptors: int
    ) -> Steps[Handle]:
        """Make a bank."""
        return self._handle(
            (
                yield Step(
                    protocol.MakeBank,
                    {
                        "bank": parent.number,
                        "limit_bytes": limit_bytes,
                        "limit_objects": limit_objects,
                        "limit_descriptors": limit_descriptors,
                    },
                )
            )
        )

    def limit_bank(
        self, bank: Handle, limit_bytes: int, limit_objects: int, limit_descriptors: int
    ) -> Steps[None]:
        """Change the limits of a bank."""
        fields = {
            "handle": bank.number,
            "limit_bytes": limit_bytes,
            "limit_objects": limit_objects,
            "limit_descriptors": limit_descriptors,
        }
        yield Step(protocol.LimitBank, fields)

    def survey(self) -> Steps[Survey]:
        """Everything that there is."""
        found = Survey([], [], [], [])
        for what in Survey._fields:
            rows: list[Any] = getattr(found, what)
            more = True
            while more:
                fields = {"what": what, "after": rows[-1].number if rows else 0}
                reply: protocol.Listed = yield Step(protocol.List, fields)
                new = getattr(reply, what)
                rows += new
                more = reply.more and bool(new)
        return found

    def administer(self, number: int) -> Steps[Handle]:
        """A handle of anything."""
        return self._handle((yield Step(protocol.Administer, {"number": number})))

    def describe(self, handle: Handle) -> Steps[protocol.Description]:
        """Look at a handle."""
        described: protocol.Description = yield Step(protocol.Describe, {"handle": handle.number})
        return described

    def make(self, bank: Handle, size_bytes: int, extent_bytes: int, shared: bool) -> Steps[Handle]:
        """Make memory."""
        fields = {
            "bank": bank.number,
            "size_bytes": size_bytes,
            "extent_bytes": extent_bytes,
            "shared": shared,
        }
        return self._handle((yield Step(protocol.Make, fields)))

    def seal(self, handle: Handle) -> Steps[None]:
        """Let nobody map it writable any more."""
        yield Step(protocol.Seal, {"handle": handle.number})

    def lease(self, handle: Handle, offset: int, length: int | None, write: bool) -> Steps[Lease]:
        """Have a range lent and mapped."""
        if length is None:
            length = protocol.WHOLE

        def enter(reply: protocol.Leased, descriptors: list[int]) -> Lease:
            size = min(length, reply.size_bytes - offset)
            return self._borrowed.enter(reply, descriptors, offset, size, write)

        fields = {"handle": handle.number, "offset": offset, "length": length, "write": write}
        lease: Lease = yield Step(protocol.Lease, fields, (), enter)
        return lease

    def holders(self, handle: Handle) -> Steps[list[protocol.Holder]]:
        """Who holds leases."""
        reply: protocol.HolderList = yield Step(protocol.Holders, {"handle": handle.number})
        return reply.holders

    def revoke(
        self,
        handle: Handle,
        offset: int,
        length: int | None,
        client: int | None,
        deadline_ms: int,
        certain: bool,
    ) -> Steps[Taken]:
        """Take a range back."""
        fields = {
            "handle": handle.number,
            "offset": offset,
            "length": protocol.WHOLE if length is None else length,
            "client": client or 0,
            "deadline_ms": deadline_ms,
            "certain": certain,
        }
        reply: protocol.Revoked = yield Step(protocol.Revoke, fields)
        return Taken(reply.outcomes, reply.freed_bytes, reply.moved_bytes)

    def deposit(self, snapshot: Snapshot, bank: Handle) -> Steps[Handle]:
        """Leave a snapshot, whose holes are filled first: what the broker keeps is paid for in full."""
        core = snapshot._lend()
        layers = core.layer_fds()
        for descriptor in layers:
            _fill(descriptor)
        return self._handle((yield Step(protocol.Deposit, {"bank": bank.number}, layers)))

    def fetch(self, handle: Handle) -> Steps[Snapshot]:
        """A snapshot, verified."""
        snapshot: Snapshot = yield Step(protocol.Fetch, {"handle": handle.number}, (), _assembled)
        return snapshot

    def grant(self, handle: Handle, bank: Handle) -> Steps[tuple[Handle, Snapshot]]:
        """Take a snapshot over."""

        def finish(reply: protocol.Handle, descriptors: list[int]) -> tuple[Handle, Snapshot]:
            return self._handle(reply), _assembled(reply, descriptors)

        fields = {"handle": handle.number, "bank": bank.number}
        granted: tuple[Handle, Snapshot] = yield Step(protocol.Grant, fields, (), finish)
        return granted

    def make_factory(self, bank: Handle) -> Steps[Handle]:
        """Make a factory."""
        return self._handle((yield Step(protocol.MakeFactory, {"bank": bank.number})))

    def put(self, factory: Handle, snapshot: Snapshot, bank: Handle) -> Steps[int]:
        """Deposit a snapshot and make it the current version."""
        handle = yield from self.deposit(snapshot, bank)
        try:
            reply: protocol.Layers = yield Step(
                protocol.Put, {"handle": factory.number, "snapshot": handle.number}
            )
        finally:
            yield Step(protocol.Close, {"handle": handle.number})
        return reply.version

    def current(self, factory: Handle) -> Steps[tuple[int, Handle, Snapshot]]:
        """The current version, verified."""

        def finish(reply: protocol.Layers, descriptors: list[int]) -> tuple[int, Handle, Snapshot]:
            handle = Handle(reply.handle, Rights.READ | Rights.SNAPSHOT)
            return reply.version, handle, _assembled(reply, descriptors)

        found: tuple[int, Handle, Snapshot] = yield Step(
            protocol.Current, {"handle": factory.number}, (), finish
        )
        return found

    def subscribe(self, factory: Handle, on: bool) -> Steps[None]:
        """Be told of versions."""
        yield Step(protocol.Subscribe, {"handle": factory.number, "on": on})

    def publish(self, handle: Handle, name: str, rights: Rights, users: list[int] | None) -> Steps[None]:
        """Give a name."""
        yield Step(
            protocol.Publish, {"handle": handle.number, "name": name, "rights": int(rights), "users": users}
        )

    def unpublish(self, handle: Handle, name: str) -> Steps[None]:
        """Withdraw a name."""
        yield Step(protocol.Unpublish, {"handle": handle.number, "name": name})

    def open(self, name: str) -> Steps[Handle]:
        """Open a name."""
        return self._handle((yield Step(protocol.Open, {"name": name})))

    def weaken(self, handle: Handle, rights: Rights) -> Steps[Handle]:
        """Make a weaker handle."""
        return self._handle((yield Step(protocol.Weaken, {"handle": handle.number, "rights": int(rights)})))

    def export(self, handle: Handle, rights: Rights) -> Steps[int]:
        """Make a descriptor that stands for an object."""

        def finish(_reply: protocol.Done, descriptors: list[int]) -> int:
            return descriptors[0]

        descriptor: int = yield Step(
            protocol.Export, {"handle": handle.number, "rights": int(rights)}, (), finish
        )
        return descriptor

    def import_(self, descriptor: int) -> Steps[Handle]:
        """Make a handle of such a descriptor."""
        return self._handle((yield Step(protocol.Import, {}, (descriptor,))))

    def close(self, handle: Handle) -> Steps[None]:
        """Give a handle up."""
        yield Step(protocol.Close, {"handle": handle.number})

    def destroy(self, handle: Handle, deadline_ms: int) -> Steps[Taken]:
        """End an object or a bank."""
        reply: protocol.Revoked = yield Step(
            protocol.Destroy, {"handle": handle.number, "deadline_ms": deadline_ms}
        )
        return Taken(reply.outcomes, reply.freed_bytes, reply.moved_bytes)


def _assembled(_reply: object, descriptors: list[int]) -> Snapshot:
    """Verify the layers that came; they are taken."""
    return Snapshot._wrap(_native.Snapshot.from_fds(descriptors))


def _fill(descriptor: int) -> None:
    """Allocate the holes of a sealed layer; its content is the same afterwards."""
    status = os.fstat(descriptor)
    if status.st_blocks * 512 < status.st_size:
        writable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(writable, 0, status.st_size)
        finally:
            os.close(writable)
