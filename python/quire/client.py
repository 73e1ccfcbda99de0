"""Connecting to a broker: memory that is lent, granted, accounted for and taken back.

Needs the extra ``broker`` (msgspec). ``docs/broker.md`` tells what each object is.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING

from quire.broker.borrowed import Borrowed, Lease
from quire.broker.lending import copy_region
from quire.broker.link import Link
from quire.broker.operations import Handle, Operations, Survey, Taken
from quire.broker.protocol import Rights
from quire.closing import Closing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from quire.broker.operations import Result, Steps
    from quire.broker.protocol import Description, Holder
    from quire.region import Region
    from quire.snapshot import Snapshot

__all__ = ["Client", "connect"]


def connect(path: str | os.PathLike[str], *, timeout: float = 10.0) -> Client:
    """Connect to a broker; blocks until it has answered.

    Args:
        path: Where it listens.
        timeout: In seconds: for its answer, and for coming back after it was restarted.

    Raises:
        OSError: Nobody listens there.
        Stalled: It does not answer.
        QuireError: It refuses.
    """
    return Client(path, timeout=timeout)


class Client(Closing):
    """A connection to a broker. Any thread may use it; every method blocks until the broker has answered.

    When the broker is restarted the client comes back by itself: what was being asked is answered then, and
    handles and leases are as they were. When it does not come back, or has forgotten this client, every
    method raises Revoked; what is mapped stays mapped.

    Every method raises Revoked when the connection has ended, ForkedError in a forked child, QuotaExceeded
    where a limit or a bank is exhausted, PermissionError where a handle lacks a right, and LookupError for a
    handle or name that is not there.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 10.0) -> None:
        """Connect; the same as `connect`."""
        self._borrowed = Borrowed()
        self._operations = Operations(self._borrowed)
        self._versions: dict[int, Callable[[int], object]] = {}
        self._borrowed.on_version = self._announced
        self._told: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._teller: threading.Thread | None = None
        self._link = Link(os.fspath(path), timeout, self._borrowed.event)
        self._borrowed.link = self._link
        self._closed = False

    def _run(self, steps: Steps[Result]) -> Result:
        """Carry the steps of an operation out."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._link.ask(*step)
                except Exception as error:  # noqa: BLE001 - raised again by the operation
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result

    @property
    def bank(self) -> Handle:
        """The bank of this user; it pays where no other is named."""
        return Handle(self._link.welcome.bank, Rights.READ | Rights.WRITE | Rights.PUBLISH)

    @property
    def number(self) -> int:
        """What the broker calls this client, in `holders` and in what a revocation answers."""
        return self._link.welcome.client

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def ping(self) -> None:
        """Wait for an answer to nothing."""
        self._run(self._operations.ping())

    def make_bank(
        self,
        limit_bytes: int,
        *,
        parent: Handle | None = None,
        limit_objects: int = 1 << 20,
        limit_descriptors: int = 1 << 20,
    ) -> Handle:
        """Open a bank below another; what it pays for counts for both.

        Args:
            limit_bytes: The most that it may pay for.
            parent: The bank above; this user's by default. Needs WRITE.
            limit_objects: Likewise.
            limit_descriptors: Likewise.
        """
        steps = self._operations.make_bank(parent or self.bank, limit_bytes, limit_objects, limit_descriptors)
        return self._run(steps)

    def limit_bank(
        self,
        bank: Handle,
        limit_bytes: int,
        *,
        limit_objects: int = 1 << 20,
        limit_descriptors: int = 1 << 20,
    ) -> None:
        """Change the limits of a bank. Needs DESTROY, which its maker and administrators have.

        Args:
            bank: The bank.
            limit_bytes: The most that it may pay for.
            limit_objects: Likewise.
            limit_descriptors: Likewise.

        Raises:
            QuotaExceeded: It pays for more than that already.
        """
        steps = self._operations.limit_bank(bank, limit_bytes, limit_objects, limit_descriptors)
        self._run(steps)

    def survey(self) -> Survey:
        """List every client, bank, object and lease. For administrators: root and the broker's own user.

        It takes several requests, so what changes meanwhile may be in one list and not in another.

        Raises:
            PermissionError: This process runs as somebody else.
        """
        return self._run(self._operations.survey())

    def administer(self, number: int) -> Handle:
        """Make a handle of anything that `survey` lists. For administrators.

        Args:
            number: Of a bank, memory, a snapshot or a factory.

        Returns:
            A handle with the rights to end it, of memory also to take it back; of a bank also to make others
            below it. None lets anybody read what is in it.
        """
        return self._run(self._operations.administer(number))

    def describe(self, handle: Handle) -> Description:
        """Tell what a handle stands for, in the broker's words; of a bank also what is used and the limits.

        ``kind`` is ``bank``, ``memory``, ``snapshot`` or ``factory``. It is the broker that says so, so a
        handle whose kind is ``factory`` is one: it gives out nothing but verified snapshots.
        """
        return self._run(self._operations.describe(handle))

    def make(
        self, size_bytes: int, *, bank: Handle | None = None, extent_bytes: int = 0, shared: bool = False
    ) -> Handle:
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
        return self._run(self._operations.make(bank or self.bank, size_bytes, extent_bytes, shared))

    def seal(self, handle: Handle) -> None:
        """Fix who can write: those who have it mapped writable now. It can be lent to others afterwards."""
        self._run(self._operations.seal(handle))

    def memory(
        self, size_bytes: int, *, bank: Handle | None = None, extent_bytes: int = 0
    ) -> tuple[Handle, Lease]:
        """Make memory that only this client writes, ready to be lent: `make`, `lease`, `seal` in one.

        Returns:
            The handle, and a lease of all of it for writing.
        """
        handle = self.make(size_bytes, bank=bank, extent_bytes=extent_bytes)
        try:
            lease = self.lease(handle, write=True)
            self.seal(handle)
        except BaseException:
            self.destroy(handle)
            raise
        return handle, lease

    def lend(
        self,
        region: Region,
        offset: int = 0,
        length: int | None = None,
        *,
        bank: Handle | None = None,
        extent_bytes: int = 0,
        discard: bool = False,
    ) -> Handle:
        """Make memory to be lent of what a region shows. Nobody can write to it, this client neither.

        The range is filled and copied before anybody can lease it; blocks for so long. Taking the memory back
        or destroying it does nothing to the region, and the region's pages may come and go. What the source
        shows later does not appear in it.

        Args:
            region: Shared or not.
            offset: Start in bytes.
            length: Length in bytes, at least 1; None is all from the offset on.
            bank: Pays for the copy; this user's bank by default. The region's own pages are this process's.
            extent_bytes: As for `make`.
            discard: Drop the region's windows in the range as they are copied: then there is one copy in the
                end, and the region fills them again when they are touched.

        Returns:
            A handle with all rights; `publish` it, for instance.

        Raises:
            PageError: The region could not be filled. Nothing is left behind, as with the others.
            QuotaExceeded: The bank, or one above it, has too little left; nothing was filled.
            Revoked: The bank was destroyed meanwhile.
            ValueError: The range is empty or outside the region, or the region is closed.
        """
        start, size = region._range(offset, length)
        handle, lease = self.memory(size, bank=bank, extent_bytes=extent_bytes)
        try:
            with lease:
                copy_region(lease, region, start, discard)
        except BaseException:
            self.destroy(handle)
            raise
        return handle

    def lease(self, handle: Handle, offset: int = 0, length: int | None = None, write: bool = False) -> Lease:
        """Have memory lent and mapped; it can be taken back at any time.

        Whoever has the handle may read all of the extents that the range touches.

        Args:
            handle: Needs READ, or WRITE for ``write``.
            offset: In bytes, of any alignment.
            length: In bytes; None is up to the end.
            write: Map it writable.
        """
        return self._run(self._operations.lease(handle, offset, length, write))

    def holders(self, handle: Handle) -> list[Holder]:
        """Tell who holds leases of memory, 500 at most. Needs LEND."""
        return self._run(self._operations.holders(handle))

    def revoke(
        self,
        handle: Handle,
        offset: int = 0,
        length: int | None = None,
        *,
        client: int | None = None,
        deadline_ms: int = 100,
        certain: bool = False,
    ) -> Taken:
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
        return self._run(self._operations.revoke(handle, offset, length, client, deadline_ms, certain))

    def deposit(self, snapshot: Snapshot, *, bank: Handle | None = None) -> Handle:
        """Leave a snapshot with the broker. The bank pays for layers that nobody pays for yet.

        Holes in its layers are filled first, so sparse snapshots grow to their full size.

        Raises:
            NotImmutable: A layer is a file.
        """
        return self._run(self._operations.deposit(snapshot, bank or self.bank))

    def fetch(self, handle: Handle) -> Snapshot:
        """Get a snapshot, verified. Needs READ. Its bank goes on paying."""
        return self._run(self._operations.fetch(handle))

    def grant(self, handle: Handle, *, bank: Handle | None = None) -> tuple[Handle, Snapshot]:
        """Take a snapshot over: from now on this bank pays, and nobody can take it back. Needs SNAPSHOT.

        Returns:
            A handle of its own, and the snapshot, verified.
        """
        return self._run(self._operations.grant(handle, bank or self.bank))

    def make_factory(self, *, bank: Handle | None = None) -> Handle:
        """Make a snapshot factory."""
        return self._run(self._operations.make_factory(bank or self.bank))

    def put(self, factory: Handle, snapshot: Snapshot, *, bank: Handle | None = None) -> int:
        """Make a snapshot the factory's current version; never waits for any reader. Needs WRITE.

        Args:
            factory: The factory.
            snapshot: Is deposited first.
            bank: Pays for it; must be the factory's.

        Returns:
            The version's number; the first is 1.
        """
        return self._run(self._operations.put(factory, snapshot, bank or self.bank))

    def current(self, factory: Handle) -> tuple[int, Handle, Snapshot]:
        """Get the factory's current version: number, handle, snapshot, verified. Needs READ."""
        return self._run(self._operations.current(factory))

    def subscribe(self, factory: Handle, callback: Callable[[int], object]) -> None:
        """Have a function called with the number of each new version, the present one first. Needs READ.

        After a call the next one comes only when `current` was asked for, so who is slow skips versions.
        It runs in a thread of its own and may use the client.
        """
        self._versions[factory.number] = callback
        if self._teller is None:
            self._teller = threading.Thread(target=self._tell, name="quire-versions", daemon=True)
            self._teller.start()
        self._run(self._operations.subscribe(factory, True))

    def unsubscribe(self, factory: Handle) -> None:
        """End a subscription."""
        self._run(self._operations.subscribe(factory, False))
        self._versions.pop(factory.number, None)

    def _announced(self, handle: int, version: int) -> None:
        self._told.put((handle, version))

    def _tell(self) -> None:
        while (told := self._told.get()) is not None:
            callback = self._versions.get(told[0])
            if callback is not None:
                callback(told[1])

    def publish(
        self, handle: Handle, name: str, rights: Rights = Rights.READ, users: Iterable[int] | None = None
    ) -> None:
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
        self._run(self._operations.publish(handle, name, rights, chosen))

    def unpublish(self, handle: Handle, name: str) -> None:
        """Withdraw a name; handles that were opened by it stay."""
        self._run(self._operations.unpublish(handle, name))

    def open(self, name: str) -> Handle:
        """Get a handle of what was published under a name."""
        return self._run(self._operations.open(name))

    def weaken(self, handle: Handle, rights: Rights) -> Handle:
        """Make a second handle with fewer rights."""
        return self._run(self._operations.weaken(handle, rights))

    def export_fd(self, handle: Handle, rights: Rights) -> int:
        """Make a descriptor that stands for the object, to be passed to another process.

        Returns:
            A descriptor that is the caller's. Whoever has it can `import_fd` it, any number of times, until
            the object is destroyed.
        """
        return self._run(self._operations.export(handle, rights))

    def import_fd(self, descriptor: int) -> Handle:
        """Make a handle of a descriptor that another client exported; it stays the caller's."""
        return self._run(self._operations.import_(descriptor))

    def close_handle(self, handle: Handle) -> None:
        """Give a handle up. An object that nobody has a handle, name or descriptor of ends."""
        self._run(self._operations.close(handle))

    def destroy(self, handle: Handle, *, deadline_ms: int = 100) -> Taken:
        """End an object, or a bank with everything that it pays for. Needs DESTROY.

        Lent memory is asked for first and then cut off whoever has not given it back. Snapshots stay with
        those who have them mapped.
        """
        return self._run(self._operations.destroy(handle, deadline_ms))

    def close(self) -> None:
        """Give everything back and end the connection. Idempotent.

        Arrays of leases must not be touched afterwards.
        """
        if self._closed:
            return
        self._closed = True
        for lease in self._borrowed.all():
            lease.close()
        self._link.close()
        if self._teller is not None:
            self._told.put(None)
            if self._teller is not threading.current_thread():
                self._teller.join()
