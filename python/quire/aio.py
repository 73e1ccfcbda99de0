"""The broker's client for asyncio: the same objects and calls as `quire.client`, awaited.

Leases are served by a thread, not by the event loop, so a loop that is busy does not lose them.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from quire.broker.borrowed import Borrowed, Lease
from quire.broker.lending import copy_region
from quire.broker.link import Link
from quire.broker.operations import Handle, Operations, Survey, Taken
from quire.broker.protocol import Rights

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from types import TracebackType
    from typing import Self

    from quire.broker.operations import Result, Steps
    from quire.broker.protocol import Description, Holder
    from quire.region import Region
    from quire.snapshot import Snapshot

__all__ = ["Client", "connect"]


async def connect(path: str | os.PathLike[str], *, timeout: float = 10.0) -> Client:
    """Connect to a broker.

    Args:
        path: Where it listens.
        timeout: In seconds: for its answer, and for coming back after it was restarted.

    Raises:
        OSError: Nobody listens there.
        Stalled: It does not answer.
        QuireError: It refuses.
    """
    borrowed = Borrowed()
    link = await asyncio.to_thread(Link, os.fspath(path), timeout, borrowed.event)
    return Client(borrowed, link)


class Client:
    """A connection to a broker, for one event loop.

    Methods, arguments and errors are those of `quire.client`.

    Made by `connect`. ``async with`` closes it.
    """

    def __init__(self, borrowed: Borrowed, link: Link) -> None:
        """Take a link over."""
        self._borrowed = borrowed
        self._operations = Operations(borrowed)
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._versions: dict[int, asyncio.Queue[int]] = {}
        borrowed.link = link
        borrowed.on_version = self._announced

    async def _run(self, steps: Steps[Result]) -> Result:
        try:
            step = next(steps)
            while True:
                try:
                    # Submitting may wait for room; the reply is waited for without a thread.
                    if self._link.has_room:
                        future = self._link.submit(*step)
                    else:
                        future = await asyncio.to_thread(self._link.submit, *step)
                    answer = await asyncio.wrap_future(future)
                except Exception as error:  # noqa: BLE001 - raised again by the operation
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result

    @property
    def bank(self) -> Handle:
        """The bank of this user."""
        return Handle(self._link.welcome.bank, Rights.READ | Rights.WRITE | Rights.PUBLISH)

    @property
    def number(self) -> int:
        """What the broker calls this client."""
        return self._link.welcome.client

    async def ping(self) -> None:
        """Wait for an answer to nothing."""
        await self._run(self._operations.ping())

    async def make_bank(
        self,
        limit_bytes: int,
        *,
        parent: Handle | None = None,
        limit_objects: int = 1 << 20,
        limit_descriptors: int = 1 << 20,
    ) -> Handle:
        """Open a bank below another."""
        steps = self._operations.make_bank(parent or self.bank, limit_bytes, limit_objects, limit_descriptors)
        return await self._run(steps)

    async def limit_bank(
        self,
        bank: Handle,
        limit_bytes: int,
        *,
        limit_objects: int = 1 << 20,
        limit_descriptors: int = 1 << 20,
    ) -> None:
        """Change the limits of a bank."""
        steps = self._operations.limit_bank(bank, limit_bytes, limit_objects, limit_descriptors)
        await self._run(steps)

    async def survey(self) -> Survey:
        """List every client, bank, object and lease; for administrators."""
        return await self._run(self._operations.survey())

    async def administer(self, number: int) -> Handle:
        """Make a handle of anything that `survey` lists; for administrators."""
        return await self._run(self._operations.administer(number))

    async def describe(self, handle: Handle) -> Description:
        """Tell what a handle stands for."""
        return await self._run(self._operations.describe(handle))

    async def make(
        self, size_bytes: int, *, bank: Handle | None = None, extent_bytes: int = 0, shared: bool = False
    ) -> Handle:
        """Make zero-filled memory to be lent."""
        return await self._run(self._operations.make(bank or self.bank, size_bytes, extent_bytes, shared))

    async def seal(self, handle: Handle) -> None:
        """Fix who can write."""
        await self._run(self._operations.seal(handle))

    async def memory(
        self, size_bytes: int, *, bank: Handle | None = None, extent_bytes: int = 0
    ) -> tuple[Handle, Lease]:
        """Make memory that only this client writes, ready to be lent."""
        handle = await self.make(size_bytes, bank=bank, extent_bytes=extent_bytes)
        try:
            lease = await self.lease(handle, write=True)
            await self.seal(handle)
        except BaseException:
            await self.destroy(handle)
            raise
        return handle, lease

    async def lend(
        self,
        region: Region,
        offset: int = 0,
        length: int | None = None,
        *,
        bank: Handle | None = None,
        extent_bytes: int = 0,
        discard: bool = False,
    ) -> Handle:
        """Make memory to be lent of what a region shows. A thread copies it."""
        start, size = region._range(offset, length)
        handle, lease = await self.memory(size, bank=bank, extent_bytes=extent_bytes)
        try:
            try:
                await asyncio.to_thread(copy_region, lease, region, start, discard)
            finally:
                await self.give_back(lease)
        except BaseException:
            await self.destroy(handle)
            raise
        return handle

    async def lease(
        self, handle: Handle, offset: int = 0, length: int | None = None, write: bool = False
    ) -> Lease:
        """Have memory lent and mapped. ``close`` of a lease blocks for a round trip; use `give_back`."""
        return await self._run(self._operations.lease(handle, offset, length, write))

    async def give_back(self, lease: Lease) -> None:
        """Close a lease without blocking the loop."""
        await asyncio.to_thread(lease.close)

    async def holders(self, handle: Handle) -> list[Holder]:
        """Tell who holds leases of memory."""
        return await self._run(self._operations.holders(handle))

    async def revoke(
        self,
        handle: Handle,
        offset: int = 0,
        length: int | None = None,
        *,
        client: int | None = None,
        deadline_ms: int = 100,
        certain: bool = False,
    ) -> Taken:
        """Take memory back."""
        steps = self._operations.revoke(handle, offset, length, client, deadline_ms, certain)
        return await self._run(steps)

    async def deposit(self, snapshot: Snapshot, *, bank: Handle | None = None) -> Handle:
        """Leave a snapshot with the broker."""
        return await self._run(self._operations.deposit(snapshot, bank or self.bank))

    async def fetch(self, handle: Handle) -> Snapshot:
        """Get a snapshot, verified."""
        return await self._run(self._operations.fetch(handle))

    async def grant(self, handle: Handle, *, bank: Handle | None = None) -> tuple[Handle, Snapshot]:
        """Take a snapshot over."""
        return await self._run(self._operations.grant(handle, bank or self.bank))

    async def make_factory(self, *, bank: Handle | None = None) -> Handle:
        """Make a snapshot factory."""
        return await self._run(self._operations.make_factory(bank or self.bank))

    async def put(self, factory: Handle, snapshot: Snapshot, *, bank: Handle | None = None) -> int:
        """Make a snapshot the factory's current version."""
        return await self._run(self._operations.put(factory, snapshot, bank or self.bank))

    async def current(self, factory: Handle) -> tuple[int, Handle, Snapshot]:
        """Get the factory's current version."""
        return await self._run(self._operations.current(factory))

    async def versions(self, factory: Handle) -> AsyncIterator[tuple[int, Handle, Snapshot]]:
        """Iterate over the factory's versions as they come, the present one first; who is slow skips some.

        Yields:
            What `current` returns. The handle is the caller's to close.
        """
        told: asyncio.Queue[int] = asyncio.Queue()
        self._versions[factory.number] = told
        try:
            await self._run(self._operations.subscribe(factory, True))
            seen = 0
            while True:
                await told.get()
                version, handle, snapshot = await self.current(factory)
                if version > seen:
                    seen = version
                    yield version, handle, snapshot
                else:
                    snapshot.close()
                    await self.close_handle(handle)
        finally:
            del self._versions[factory.number]
            await self._run(self._operations.subscribe(factory, False))

    def _announced(self, handle: int, version: int) -> None:
        """In the link's thread."""
        told = self._versions.get(handle)
        if told is not None:
            self._loop.call_soon_threadsafe(told.put_nowait, version)

    async def publish(
        self, handle: Handle, name: str, rights: Rights = Rights.READ, users: Iterable[int] | None = None
    ) -> None:
        """Give an object a name."""
        await self._run(
            self._operations.publish(handle, name, rights, None if users is None else list(users))
        )

    async def unpublish(self, handle: Handle, name: str) -> None:
        """Withdraw a name."""
        await self._run(self._operations.unpublish(handle, name))

    async def open(self, name: str) -> Handle:
        """Get a handle of what was published under a name."""
        return await self._run(self._operations.open(name))

    async def weaken(self, handle: Handle, rights: Rights) -> Handle:
        """Make a second handle with fewer rights."""
        return await self._run(self._operations.weaken(handle, rights))

    async def export_fd(self, handle: Handle, rights: Rights) -> int:
        """Make a descriptor that stands for the object."""
        return await self._run(self._operations.export(handle, rights))

    async def import_fd(self, descriptor: int) -> Handle:
        """Make a handle of a descriptor that another client exported."""
        return await self._run(self._operations.import_(descriptor))

    async def close_handle(self, handle: Handle) -> None:
        """Give a handle up."""
        await self._run(self._operations.close(handle))

    async def destroy(self, handle: Handle, *, deadline_ms: int = 100) -> Taken:
        """End an object, or a bank with everything that it pays for."""
        return await self._run(self._operations.destroy(handle, deadline_ms))

    async def close(self) -> None:
        """Give everything back and end the connection. Idempotent."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        for lease in self._borrowed.all():
            lease.close()
        self._link.close()

    async def __aenter__(self) -> Self:
        """Return the client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        await self.close()
