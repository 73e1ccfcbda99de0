"""Connecting to a broker: memory that is lent, granted, accounted for and taken back.

Needs the extra ``broker`` (msgspec). ``docs/broker.md`` tells what each object is.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING, Concatenate

from quire.broker.borrowed import Borrowed, Lease
from quire.broker.lending import copy_region
from quire.broker.link import Link
from quire.broker.operations import Handle, Operations, present
from quire.closing import Closing

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.broker.operations import Arguments, Result, Steps
    from quire.region import Region

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


def _blocking(
    operation: Callable[Concatenate[Operations, Arguments], Steps[Result]],
) -> Callable[Concatenate[Client, Arguments], Result]:
    """Make the method that carries an operation out."""

    def method(self: Client, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return self._run(operation(self._operations, *args, **kwargs))

    present(method, operation, __name__)
    return method


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
        self._versions: dict[int, Callable[[int], object]] = {}
        self._borrowed.on_version = self._announced
        self._told: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._teller: threading.Thread | None = None
        self._link = Link(os.fspath(path), timeout, self._borrowed.event)
        self._borrowed.link = self._link
        self._operations = Operations(self._borrowed, self._link)
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
        return self._operations.bank

    @property
    def number(self) -> int:
        """What the broker calls this client, in `holders` and in what a revocation answers."""
        return self._link.welcome.client

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    ping = _blocking(Operations.ping)
    make_bank = _blocking(Operations.make_bank)
    limit_bank = _blocking(Operations.limit_bank)
    survey = _blocking(Operations.survey)
    administer = _blocking(Operations.administer)
    describe = _blocking(Operations.describe)
    make = _blocking(Operations.make)
    seal = _blocking(Operations.seal)

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

    lease = _blocking(Operations.lease)
    holders = _blocking(Operations.holders)
    revoke = _blocking(Operations.revoke)
    deposit = _blocking(Operations.deposit)
    fetch = _blocking(Operations.fetch)
    grant = _blocking(Operations.grant)
    make_factory = _blocking(Operations.make_factory)
    put = _blocking(Operations.put)
    current = _blocking(Operations.current)

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

    publish = _blocking(Operations.publish)
    unpublish = _blocking(Operations.unpublish)
    open = _blocking(Operations.open)
    weaken = _blocking(Operations.weaken)
    export_fd = _blocking(Operations.export_fd)
    import_fd = _blocking(Operations.import_fd)
    close_handle = _blocking(Operations.close_handle)
    destroy = _blocking(Operations.destroy)

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
