"""What clients ask of a broker, without waiting: each operation is a generator of steps.

`quire.client` runs them by blocking, `quire.aio` by awaiting; the signatures and docstrings of their methods
are here. A step is a request; what is sent back into the generator is its result.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

from quire import _native
from quire.broker import protocol
from quire.broker.borrowed import Borrowed, Lease
from quire.broker.protocol import Rights
from quire.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from quire.broker.link import Link
    from quire.broker.rows import BankRow, ClientRow, LeaseRow, ObjectRow

    Arguments = ParamSpec("Arguments")
    Result = TypeVar("Result")
    Steps: TypeAlias = Generator["Step", Any, Result]

__all__ = ["Handle", "Operations", "Step", "Survey", "Taken", "present"]


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


def present(method: Callable[..., Any], operation: Callable[..., Steps[Any]], module: str) -> None:
    """Give a method that carries an operation out its name, signature and docstring.

    Args:
        method: Of a class ``Client``.
        operation: Of `Operations`.
        module: The one that the class is in.
    """
    functools.update_wrapper(method, operation, assigned=("__name__", "__doc__"))
    del method.__wrapped__  # type: ignore[attr-defined]
    method.__module__, method.__qualname__ = module, f"Client.{operation.__name__}"
    told = inspect.signature(operation)
    result = str(told.return_annotation).removeprefix("Steps[").removesuffix("]")
    method.__signature__ = told.replace(return_annotation=result)  # type: ignore[attr-defined]


class Operations:
    """The steps of every operation of one client."""

    def __init__(self, borrowed: Borrowed, link: Link) -> None:
        """Keep leases in ``borrowed``, of the session of a link."""
        self._borrowed = borrowed
        self._link = link

    @property
    def bank(self) -> Handle:
        """The bank of this user; it pays where no other is named."""
        return Handle(self._link.welcome.bank, Rights.READ | Rights.WRITE | Rights.PUBLISH)

    @staticmethod
    def _handle(reply: protocol.Handle) -> Handle:
        return Handle(reply.handle, Rights(reply.rights))

    def ping(self) -> Steps[None]:
        """Wait for an answer to nothing."""
        yield Step(protocol.Ping, {})

    def make_bank(
        self,
        limit_bytes: int,
        *,
        parent: Handle | None = None,
        limit_objects: int = 1 << 20,
        limit_descriptors: int = 1 << 20,
    ) -> Steps[Handle]:
        """Open a bank below another; what it pays for counts for both.

        Args:
            limit_bytes: The most that it may pay for.
            parent: The bank above; this user's by default. Needs WRITE.
            limit_objects: Likewise.
            limit_descriptors: Likewise.
        """
        parent = parent or self.bank
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
        self,
        bank: Handle,
        limit_bytes: int,
        *,
        limit_objects: int = 1 << 20,
        limit_descriptors: int = 1 << 20,
    ) -> Steps[None]:
        """Change the limits of a bank. Needs DESTROY, which its maker and administrators have.

        Args:
            bank: The bank.
            limit_bytes: The most that it may pay for.
            limit_objects: Likewise.
            limit_descriptors: Likewise.

        Raises:
            QuotaExceeded: It pays for more than that already.
        """
        fields = {
            "handle": bank.number,
            "limit_bytes": limit_bytes,
            "limit_objects": limit_objects,
            "limit_descriptors": limit_descriptors,
        }
        yield Step(protocol.LimitBank, fields)

    def survey(self) -> Steps[Survey]:
        """List every client, bank, object and lease. For administrators: root and the broker's own user.

        It takes several requests, so what changes meanwhile may be in one list and not in another.

        Raises:
            PermissionError: This process runs as somebody else.
        """
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
        """Make a handle of anything that `survey` lists. For administrators.

        Args:
            number: Of a bank, memory, a snapshot or a factory.

        Returns:
            A handle with the rights to end it, of memory also to take it back; of a bank also to make others
            below it. None lets anybody read what is in it.
        """
        return self._handle((yield Step(protocol.Administer, {"number": number})))

    def describe(self, handle: Handle) -> Steps[protocol.Description]:
        """Tell what a handle stands for, in the broker's words; of a bank also what is used and the limits.

        ``kind`` is ``bank``, ``memory``, ``snapshot`` or ``factory``. It is the broker that says so, so a
        handle whose kind is ``factory`` is one: it gives out nothing but verified snapshots.
        """
        described: protocol.Description = yield Step(protocol.Describe, {"handle": handle.number})
        return described

    def make(
        self, size_bytes: int, *, bank: Handle | None = None, extent_bytes: int = 0, shared: bool = False
    ) -> Steps[Handle]:
        """Make zero-filled memory to be lent; its bank pays for all of it at once.

        Args:
            size_bytes: At least 1.
            bank: Who pays; this user's bank by default.
            extent_bytes: The grain in which access can be taken away by force, a multiple of the page; 0 is
                64 MiB, or more for memory past 4 GiB.
            shared: Let every holder of WRITE map it writable. Otherwise only this client can, until `seal`;
                others may have it after that, read-only.

        Raises:
            QuotaExceeded: The bank, or one above it, has too little left.
            OSError: The machine has too little memory.
        """
        bank = bank or self.bank
        fields = {
            "bank": bank.number,
            "size_bytes": size_bytes,
            "extent_bytes": extent_bytes,
            "shared": shared,
        }
        return self._handle((yield Step(protocol.Make, fields)))

    def seal(self, handle: Handle) -> Steps[None]:
        """Fix who can write: those who have it mapped writable now. It can be lent to others afterwards."""
        yield Step(protocol.Seal, {"handle": handle.number})

    def lease(
        self, handle: Handle, offset: int = 0, length: int | None = None, write: bool = False
    ) -> Steps[Lease]:
        """Have memory lent and mapped; it can be taken back at any time.

        Whoever has the handle may read all of the extents that the range touches.

        Args:
            handle: Needs READ, or WRITE for ``write``.
            offset: In bytes, of any alignment.
            length: In bytes; None is up to the end.
            write: Map it writable.
        """
        if length is None:
            length = protocol.WHOLE

        def enter(reply: protocol.Leased, descriptors: list[int]) -> Lease:
            size = min(length, reply.size_bytes - offset)
            return self._borrowed.enter(reply, descriptors, offset, size, write)

        fields = {"handle": handle.number, "offset": offset, "length": length, "write": write}
        lease: Lease = yield Step(protocol.Lease, fields, (), enter)
        return lease

    def holders(self, handle: Handle) -> Steps[list[protocol.Holder]]:
        """Tell who holds leases of memory, 500 at most. Needs LEND."""
        reply: protocol.HolderList = yield Step(protocol.Holders, {"handle": handle.number})
        return reply.holders

    def revoke(
        self,
        handle: Handle,
        offset: int = 0,
        length: int | None = None,
        *,
        client: int | None = None,
        deadline_ms: int = 100,
        certain: bool = False,
    ) -> Steps[Taken]:
        """Take memory back; everybody else keeps it, at the same addresses, without a fault.

        Args:
            handle: Needs LEND.
            offset: In bytes; widened to pages.
            length: In bytes; None is up to the end.
            client: From whom; None is everybody but this client.
            deadline_ms: How long they may take to comply before they are cut off.
            certain: Cut off those who comply as well. A process that forked, or passed its descriptors on,
                can keep what it says it gave back; this takes it.

        Returns:
            What happened to each; see `quire.broker.protocol.Outcome`. A client that was cut off has lost
            whole extents, which may be more than was asked for.
        """
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

    def deposit(self, snapshot: Snapshot, *, bank: Handle | None = None) -> Steps[Handle]:
        """Leave a snapshot with the broker. The bank pays for layers that nobody pays for yet.

        Holes in its layers are filled first, so sparse snapshots grow to their full size.

        Raises:
            NotImmutable: A layer is a file.
        """
        bank = bank or self.bank
        core = snapshot._lend()
        layers = core.layer_fds()
        for descriptor in layers:
            _fill(descriptor)
        return self._handle((yield Step(protocol.Deposit, {"bank": bank.number}, layers)))

    def fetch(self, handle: Handle) -> Steps[Snapshot]:
        """Get a snapshot, verified. Needs READ. Its bank goes on paying."""
        snapshot: Snapshot = yield Step(protocol.Fetch, {"handle": handle.number}, (), _assembled)
        return snapshot

    def grant(self, handle: Handle, *, bank: Handle | None = None) -> Steps[tuple[Handle, Snapshot]]:
        """Take a snapshot over: from now on this bank pays, and nobody can take it back. Needs SNAPSHOT.

        Returns:
            A handle of its own, and the snapshot, verified.
        """
        bank = bank or self.bank

        def finish(reply: protocol.Handle, descriptors: list[int]) -> tuple[Handle, Snapshot]:
            return self._handle(reply), _assembled(reply, descriptors)

        fields = {"handle": handle.number, "bank": bank.number}
        granted: tuple[Handle, Snapshot] = yield Step(protocol.Grant, fields, (), finish)
        return granted

    def make_factory(self, *, bank: Handle | None = None) -> Steps[Handle]:
        """Make a snapshot factory."""
        bank = bank or self.bank
        return self._handle((yield Step(protocol.MakeFactory, {"bank": bank.number})))

    def put(self, factory: Handle, snapshot: Snapshot, *, bank: Handle | None = None) -> Steps[int]:
        """Make a snapshot the factory's current version; never waits for any reader. Needs WRITE.

        Args:
            factory: The factory.
            snapshot: Is deposited first.
            bank: Pays for it; must be the factory's.

        Returns:
            The version's number; the first is 1.
        """
        bank = bank or self.bank
        handle = yield from self.deposit(snapshot, bank=bank)
        try:
            reply: protocol.Layers = yield Step(
                protocol.Put, {"handle": factory.number, "snapshot": handle.number}
            )
        finally:
            yield Step(protocol.Close, {"handle": handle.number})
        return reply.version

    def current(self, factory: Handle) -> Steps[tuple[int, Handle, Snapshot]]:
        """Get the factory's current version: number, handle, snapshot, verified. Needs READ."""

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

    def publish(
        self, handle: Handle, name: str, rights: Rights = Rights.READ, users: Iterable[int] | None = None
    ) -> Steps[None]:
        """Give an object a name under which others get a handle. Needs PUBLISH and the rights given.

        Args:
            handle: The object.
            name: 1 to 255 bytes.
            rights: What whoever opens it may do.
            users: Who may open it, by user id; None is everybody who may connect.

        Raises:
            FileExistsError: The name is taken.
        """
        chosen = None if users is None else list(users)
        yield Step(
            protocol.Publish, {"handle": handle.number, "name": name, "rights": int(rights), "users": chosen}
        )

    def unpublish(self, handle: Handle, name: str) -> Steps[None]:
        """Withdraw a name; handles that were opened by it stay."""
        yield Step(protocol.Unpublish, {"handle": handle.number, "name": name})

    def open(self, name: str) -> Steps[Handle]:
        """Get a handle of what was published under a name."""
        return self._handle((yield Step(protocol.Open, {"name": name})))

    def weaken(self, handle: Handle, rights: Rights) -> Steps[Handle]:
        """Make a second handle with fewer rights."""
        return self._handle((yield Step(protocol.Weaken, {"handle": handle.number, "rights": int(rights)})))

    def export_fd(self, handle: Handle, rights: Rights) -> Steps[int]:
        """Make a descriptor that stands for the object, to be passed to another process.

        Returns:
            A descriptor that is the caller's. Whoever has it can `import_fd` it, any number of times, until
            the object is destroyed.
        """

        def finish(_reply: protocol.Done, descriptors: list[int]) -> int:
            return descriptors[0]

        descriptor: int = yield Step(
            protocol.Export, {"handle": handle.number, "rights": int(rights)}, (), finish
        )
        return descriptor

    def import_fd(self, descriptor: int) -> Steps[Handle]:
        """Make a handle of a descriptor that another client exported; it stays the caller's."""
        return self._handle((yield Step(protocol.Import, {}, (descriptor,))))

    def close_handle(self, handle: Handle) -> Steps[None]:
        """Give a handle up. An object that nobody has a handle, name or descriptor of ends."""
        yield Step(protocol.Close, {"handle": handle.number})

    def destroy(self, handle: Handle, *, deadline_ms: int = 100) -> Steps[Taken]:
        """End an object, or a bank with everything that it pays for. Needs DESTROY.

        Lent memory is asked for first and then cut off whoever has not given it back. Snapshots stay with
        those who have them mapped.
        """
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
