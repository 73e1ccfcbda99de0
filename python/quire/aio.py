"""The broker's client for asyncio: the same objects and calls as `quire.client`, awaited.

Leases are served by a thread, not by the event loop, so a loop that is busy does not lose them.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Concatenate

from quire.broker.borrowed import Borrowed, Lease
from quire.broker.lending import copy_region
from quire.broker.link import Link
from quire.broker.operations import Handle, Operations, present

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from types import TracebackType
    from typing import Self

    from quire.broker.operations import Arguments, Result, Steps
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


def _awaited(
    operation: Callable[Concatenate[Operations, Arguments], Steps[Result]],
) -> Callable[Concatenate[Client, Arguments], Coroutine[Any, Any, Result]]:
    """Make the method that carries an operation out."""

    async def method(self: Client, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return await self._run(operation(self._operations, *args, **kwargs))

    present(method, operation, __name__)
    return method


class Client:
    """A connection to a broker, for one event loop.

    Methods, arguments and errors are those of `quire.client`.

    Made by `connect`. ``async with`` closes it.
    """

    def __init__(self, borrowed: Borrowed, link: Link) -> None:
        """Take a link over."""
        self._borrowed = borrowed
        self._operations = Operations(borrowed, link)
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
        return self._operations.bank

    @property
    def number(self) -> int:
        """What the broker calls this client."""
        return self._link.welcome.client

    ping = _awaited(Operations.ping)
    make_bank = _awaited(Operations.make_bank)
    limit_bank = _awaited(Operations.limit_bank)
    survey = _awaited(Operations.survey)
    administer = _awaited(Operations.administer)
    describe = _awaited(Operations.describe)
    make = _awaited(Operations.make)
    seal = _awaited(Operations.seal)

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

    lease = _awaited(Operations.lease)

    async def give_back(self, lease: Lease) -> None:
        """Close a lease without blocking the loop."""
        await asyncio.to_thread(lease.close)

    holders = _awaited(Operations.holders)
    revoke = _awaited(Operations.revoke)
    deposit = _awaited(Operations.deposit)
    fetch = _awaited(Operations.fetch)
    grant = _awaited(Operations.grant)
    make_factory = _awaited(Operations.make_factory)
    put = _awaited(Operations.put)
    current = _awaited(Operations.current)

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

    publish = _awaited(Operations.publish)
    unpublish = _awaited(Operations.unpublish)
    open = _awaited(Operations.open)
    weaken = _awaited(Operations.weaken)
    export_fd = _awaited(Operations.export_fd)
    import_fd = _awaited(Operations.import_fd)
    close_handle = _awaited(Operations.close_handle)
    destroy = _awaited(Operations.destroy)

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
