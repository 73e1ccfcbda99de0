"""Taking memory back: asking first, then moving everybody else and cutting the old pages off.

``docs/broker.md`` has the whole sequence and why no byte is lost in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import TYPE_CHECKING

from quire.broker import given, objects
from quire.broker.crashpoints import crash_point
from quire.broker.inspection import holding
from quire.broker.leases import MAX_PARTS
from quire.broker.protocol import (
    CutEvent,
    HoldEvent,
    MoveEvent,
    Outcome,
    Revoked,
    RevokeEvent,
    UnholdEvent,
)
from quire.errors import NotImmutable, QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from quire.broker.banks import Bank
    from quire.broker.leases import Lease
    from quire.broker.objects import Extent, Memory
    from quire.broker.protocol import Message
    from quire.broker.sessions import Session
    from quire.broker.world import World

__all__ = ["Revoker"]

# Several times what a client needs to map a MiB with all its pages.
_MAP_MIB_MS = 2
_log = logging.getLogger("quire.broker")


class Revoker:
    """Takes memory back on behalf of the broker."""

    def __init__(self, world: World, reserve: Bank, *, move_ms: int, policy: str) -> None:
        """Prepare.

        Args:
            world: The state.
            reserve: Pays for the second copy of an extent while it is moved, where nobody else can.
            move_ms: How long a client may take to move, in milliseconds, before it is cut off too.
            policy: What is done to a client that did not comply: ``cut``, ``disconnect`` or ``kill``.
        """
        self._world = world
        self._reserve = reserve
        self._move_ms = move_ms
        self._policy = policy
        self._serial = 0
        self._waiting: dict[int, tuple[Session, asyncio.Future[bool]]] = {}
        self._locks: dict[int, asyncio.Lock] = {}
        self.tasks: set[asyncio.Task[Revoked]] = set()

    # Asking

    def acknowledged(self, session: Session, serial: int, done: bool) -> None:
        """A client answers an event; an answer to what it was not asked is ignored."""
        owner, future = self._waiting.get(serial, (None, None))
        if owner is session and future is not None and not future.done():
            future.set_result(done)

    def lost(self, session: Session) -> None:
        """A client's connection has closed: it will not answer."""
        for owner, future in list(self._waiting.values()):
            if owner is session and not future.done():
                future.set_result(False)

    def _ask(
        self, session: Session, event: Callable[[int], Message], descriptors: list[int]
    ) -> asyncio.Future[bool]:
        """Send an event; the future is true when the client has done it. Descriptors are given away."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if session.port is None:
            for descriptor in descriptors:
                os.close(descriptor)
            future.set_result(False)
            return future
        self._serial += 1
        serial = self._serial
        self._waiting[serial] = session, future
        future.add_done_callback(lambda _: self._waiting.pop(serial, None))
        session.port.post(event(serial), descriptors)
        return future

    def _ask_with(
        self, session: Session, event: Callable[[int], Message], extent: Extent, write: bool
    ) -> asyncio.Future[bool]:
        """Send an event with a descriptor of an extent; with none left, the client has not done it."""
        try:
            descriptor = extent.open_for(write)
        except OSError:
            _log.exception("no descriptor to move client %d with", session.number)
            future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            future.set_result(False)
            return future
        return self._ask(session, event, [descriptor])

    @staticmethod
    async def _answers(
        asked: dict[Session, list[asyncio.Future[bool]]], deadline_ms: int
    ) -> dict[Session, str]:
        """Wait for everybody; tell of each session that did not comply why."""
        futures = [future for each in asked.values() for future in each]
        if futures:
            await asyncio.wait(futures, timeout=deadline_ms / 1000)
        failed = {}
        for session, each in asked.items():
            if not all(future.done() for future in each):
                failed[session] = f"did not answer within {deadline_ms} ms"
            elif not all(future.result() for future in each):
                failed[session] = "is not connected, or refused"
            for future in each:
                future.cancel()
        return failed

    # Taking back

    def lock(self, memory: Memory) -> asyncio.Lock:
        """What is held while extents of a memory object are taken back or moved."""
        return self._locks.setdefault(memory.number, asyncio.Lock())

    async def revoke(
        self,
        memory: Memory,
        start: int,
        stop: int,
        sessions: Iterable[Session],
        *,
        deadline_ms: int,
        certain: bool,
        everybody: bool = False,
        request: int = 0,
    ) -> Revoked:
        """Take a range of memory back from sessions; everybody else keeps it, at the same addresses.

        Args:
            memory: What was lent.
            start: First byte of the range, page aligned.
            stop: Its end, exclusive, page aligned.
            sessions: From whom.
            deadline_ms: How long they may take to comply.
            certain: Cut off also those that seem to have complied, and whoever had it before.
            everybody: Whether those count too whose session has ended.
            request: The id for the reply.

        Returns:
            What happened to each, and what was copied for the others.
        """
        async with self.lock(memory):
            targets = {
                session: leases
                for session in sessions
                if (
                    leases := [
                        each
                        for each in session.leases.values()
                        if each.memory is memory and each.overlap(start, stop)
                    ]
                )
            }
            if any(
                lease.splits(start, stop) and len(lease.spans) >= MAX_PARTS
                for leases in targets.values()
                for lease in leases
            ):
                raise QuotaExceeded(f"a lease has {MAX_PARTS} parts at most: take a larger range back")
            had: dict[int, Session | None] = {}
            for index in memory.within(start, stop):
                had |= memory.extents[index].given
            # Who has no lease any more has nothing to be asked for, but may have kept it.
            before: dict[Session, list[Lease]] = {
                session: [] for session in sessions if session not in targets and session.number in had
            }
            failed = await self._request(targets, start, stop, deadline_ms)
            unseen = await self._check(memory, targets, failed, start, stop)
            hidden: dict[Session, str] = {}
            await self._check(memory, before, hidden, start, stop)
            outcomes = []
            for session, leases in targets.items():
                if session not in failed:
                    for lease in leases:
                        self._world.cut_lease(lease, start, stop)
            self._world.commit()
            crash_point("revoke:released")
            failed |= hidden
            cut = dict(failed)
            forced = certain and bool(before or (everybody and given.ENDED in had))
            if certain:
                cut |= {session: "was cut off to be certain" for session in targets if session not in failed}
            moved_bytes = 0
            kept: dict[Session | None, str] = {}
            if cut or forced:
                moved_bytes, kept = await self._cut_off(memory, start, stop, set(cut))
            for session in [*targets, *hidden]:
                offset, length = start, stop - start
                if session in kept:
                    result, why = "kept", kept[session]
                elif session in cut:
                    result, why = "cut", cut[session]
                    first, last = memory.within(start, stop)[0], memory.within(start, stop)[-1]
                    offset = first * memory.extent_bytes
                    length = min((last + 1) * memory.extent_bytes, memory.padded_bytes) - offset
                else:
                    result, why = ("acknowledged", unseen[session]) if session in unseen else ("released", "")
                ended = self._punish(session) if session in failed else ""
                outcomes.append(Outcome(session.number, result, offset, length, why, ended))
            if forced and None in kept:
                outcomes.append(
                    Outcome(given.ENDED, "kept", start, stop - start, f"whoever had it before: {kept[None]}")
                )
            return Revoked(request, outcomes, moved_bytes=moved_bytes)

    async def _request(
        self, targets: dict[Session, list[Lease]], start: int, stop: int, deadline_ms: int
    ) -> dict[Session, str]:
        """Ask sessions to unmap; tell who did not, and why."""
        asked: dict[Session, list[asyncio.Future[bool]]] = {}
        for session, leases in targets.items():
            asked[session] = []
            for lease in leases:
                for a, b in lease.overlap(start, stop):
                    number = lease.number

                    def event(serial: int, number: int = number, a: int = a, b: int = b) -> Message:
                        return RevokeEvent(serial, number, a, b - a, deadline_ms)

                    asked[session].append(self._ask(session, event, []))
        crash_point("revoke:asked")
        return await self._answers(asked, deadline_ms)

    async def _check(
        self,
        memory: Memory,
        targets: dict[Session, list[Lease]],
        failed: dict[Session, str],
        start: int,
        stop: int,
    ) -> dict[Session, str]:
        """Look in /proc at those who say that they complied; adds the liars to ``failed``.

        Returns:
            Those that could not be looked at, with the reason.
        """
        unseen = {}
        touched = [memory.extents[index] for index in memory.within(start, stop)]
        asked = {lease for leases in targets.values() for lease in leases}
        kept_by_process: dict[int, list[Lease]] = {}
        for lease in memory.leases:
            if lease not in asked:
                kept_by_process.setdefault(lease.session.pid, []).append(lease)
        for session in targets:
            if session in failed:
                continue
            if session.pidfd < 0:
                unseen[session] = "its process could not be identified"
                continue
            # Other connections of the same process may keep what they have.
            keeps = kept_by_process.get(session.pid, ())
            ranges = {}
            for extent in touched:
                begin, end = extent.start, extent.start + extent.length
                gone = [(max(begin, start), min(end, stop))]
                for lease in keeps:
                    gone = [rest for part in gone for rest in _without(part, lease.spans)]
                ranges[extent.identity()] = [(a - begin, b - begin) for a, b in gone]
            found = await asyncio.to_thread(holding, session.pid, session.pidfd, ranges)
            if not found.seen:
                unseen[session] = "its /proc may not be read"
            elif found.what:
                failed[session] = f"said that it complied, but {found.what}"
        return unseen

    async def _cut_off(
        self, memory: Memory, start: int, stop: int, offenders: set[Session]
    ) -> tuple[int, dict[Session | None, str]]:
        """Move everybody but the offenders off the extents that a range touches, and truncate the old ones.

        Returns:
            The bytes that were copied, and the offenders from whom some could not be taken, with the reason;
            None stands for those who are not known.
        """
        moved = 0
        kept: dict[Session | None, str] = {}
        for index in memory.within(start, stop):
            extent = memory.extents[index]
            try:
                moved += await self._replace(extent, offenders)
            except (QuotaExceeded, OSError, NotImmutable) as error:
                if memory.dead:
                    break
                kept |= dict.fromkeys([*offenders, None], f"the others could not be moved: {error}")
        return moved, kept

    def _payer(self, extent: Extent, offenders: set[Session]) -> Bank:
        """Charge whoever pays for the second copy: an offender, the lender, or the broker's reserve.

        Raises:
            QuotaExceeded: None of them can.
        """
        for bank in [*(session.home for session in offenders), extent.memory.bank]:
            with contextlib.suppress(QuotaExceeded):
                bank.charge(extent.cost)
                return bank
        self._reserve.charge(extent.cost)
        return self._reserve

    async def _replace(self, extent: Extent, offenders: set[Session]) -> int:
        """Give everybody but the offenders a fresh copy of an extent, at the same addresses."""
        payer = self._payer(extent, offenders)
        fresh = -1
        try:
            writers = {
                lease.session for lease in extent.leases if lease.write and lease.session not in offenders
            }
            held = {
                session: [self._ask(session, lambda serial: HoldEvent(serial, extent.serial), [])]
                for session in writers
            }
            stalled = await self._answers(held, self._move_ms)
            try:
                fresh, huge = await asyncio.to_thread(
                    objects.copy_extent, extent.descriptor, extent.length, len(extent.leases)
                )
                crash_point("move:copied")
                if extent.memory.shared:
                    objects.seal_extent(fresh, 0)
                self._world.keeper.keep(f"x{extent.serial}.{extent.generation + 1}", fresh)
                crash_point("move:kept")
            except BaseException:
                for session in writers:
                    if session.port is not None:
                        session.port.post(UnholdEvent(extent.serial), [])
                raise
        except BaseException:
            if fresh >= 0:
                os.close(fresh)
            payer.discharge(extent.cost)
            raise
        # From here on the fresh copy is the extent; a restart goes on where the journal says.
        old, old_key = extent.descriptor, extent.key
        extent.descriptor, extent.huge = fresh, huge
        extent.generation += 1
        self._world.put_extent(extent)
        self._world.journal.put(f"v{extent.serial}", extent.generation - 1)
        self._cut_leases(extent, offenders | set(stalled))
        given.renew(self._world.journal, extent)
        self._world.commit()
        crash_point("move:decided")
        await self.finish_move(extent, old, old_key)
        payer.discharge(extent.cost)
        return extent.length

    def _cut_leases(self, extent: Extent, sessions: set[Session]) -> None:
        """Take an extent out of the leases of sessions, and tell them."""
        for lease in [each for each in extent.leases if each.session in sessions]:
            for a, b in lease.overlap(extent.start, extent.start + extent.length):
                if lease.session.port is not None:
                    lease.session.port.post(CutEvent(lease.number, a, b - a), [])
            self._world.cut_lease(lease, extent.start, extent.start + extent.length)

    async def finish_move(self, extent: Extent, old: int, old_key: str) -> None:
        """Move everybody who has a lease of an extent to its descriptor, then end the old one.

        Args:
            extent: Its descriptor is the fresh copy already.
            old: What it was before; closed at the end.
            old_key: What that is kept as.
        """
        asked: dict[Session, list[asyncio.Future[bool]]] = {}
        # Sealed already: a restart came after the writers had moved, and they could not do it again.
        writers_moved = objects.seals(extent.descriptor) & objects.F_SEAL_FUTURE_WRITE
        for session, write in {(lease.session, lease.write) for lease in extent.leases}:
            if write and writers_moved:
                if session.port is not None:
                    session.port.post(UnholdEvent(extent.serial), [])
                continue

            def event(serial: int, write: bool = write) -> Message:
                return MoveEvent(serial, extent.serial, write, extent.huge)

            asked.setdefault(session, []).append(self._ask_with(session, event, extent, write))
        crash_point("move:asked")
        # They share the processors, and each has to map every page.
        mapping_ms = len(asked) * (extent.length >> 20) * _MAP_MIB_MS
        stalled = await self._answers(asked, self._move_ms + mapping_ms)
        crash_point("move:answered")
        self._cut_leases(extent, set(stalled))
        self._world.commit()
        damaged = False
        if extent.memory.sealed or extent.memory.shared:
            try:
                objects.seal_extent(
                    extent.descriptor, 0 if extent.memory.shared else objects.F_SEAL_FUTURE_WRITE
                )
            except NotImmutable:
                damaged = True
        await asyncio.to_thread(os.ftruncate, old, 0)
        crash_point("move:truncated")
        self._world.drop_move(extent, old_key, old)
        self._world.commit()
        crash_point("move:finished")
        if damaged:
            # Its writer has sealed it against being taken back: nobody but him may have it.
            self._world.end(extent.memory)

    def _punish(self, session: Session) -> str:
        """Do to an offender what the policy says besides; return what was done."""
        if self._policy == "kill" and session.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(session.pidfd, signal.SIGKILL)
                return "killed"
        if self._policy in ("disconnect", "kill") and session.port is not None:
            session.port.drop("it did not give memory back when it was asked to")
            return "disconnected"
        return ""

    # Ending memory

    def reclaim(self, memory: Memory, deadline_ms: int = 100) -> asyncio.Task[Revoked]:
        """End memory: ask its lessees to let go, then cut it off whoever has not."""
        task = asyncio.get_running_loop().create_task(self._reclaim(memory, deadline_ms))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _reclaim(self, memory: Memory, deadline_ms: int) -> Revoked:
        memory.dead = True
        async with self.lock(memory):
            if memory.number not in self._world.objects:
                return Revoked(0, [])
            everything = memory.padded_bytes
            targets: dict[Session, list[Lease]] = {}
            for lease in memory.leases:
                targets.setdefault(lease.session, []).append(lease)
            failed = await self._request(targets, 0, everything, deadline_ms)
            outcomes = [
                Outcome(
                    session.number,
                    "cut" if session in failed else "acknowledged",
                    0,
                    everything,
                    failed.get(session, ""),
                )
                for session in targets
            ]
            for lease in memory.leases:
                if lease.session in failed and lease.session.port is not None:
                    for start, stop in lease.spans:
                        lease.session.port.post(CutEvent(lease.number, start, stop - start), [])
            # Giving pages back takes milliseconds. What is sealed against it is for free_memory to deal with.
            for extent in memory.extents:
                with contextlib.suppress(PermissionError):
                    await asyncio.to_thread(os.ftruncate, extent.descriptor, 0)
            freed = self._world.free_memory(memory)
            self._world.commit()
            crash_point("reclaim:freed")
        self._locks.pop(memory.number, None)
        return Revoked(0, outcomes, freed_bytes=freed)


def _without(part: tuple[int, int], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A range less other ranges."""
    parts = [part]
    for start, stop in spans:
        parts = [
            piece
            for a, b in parts
            for piece in ((a, min(b, start)), (max(a, stop), b))
            if piece[0] < piece[1]
        ]
    return parts
