"""Whose turn it is: users get equal shares of the loop's time, and so do the connections of a user.

This is start-time fair queueing (Goyal, Vin, Cheng 1996). Each one has a tag: the time that has been spent
on it, on a clock that stands at the tag of whoever is served. Whoever has the least tag is next, and one who
was not there begins at the clock. So it goes before all who have taken more than their share, and being away
earns nothing. What work costs need not be known beforehand: it is measured.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Chore", "FairQueue", "Ready", "Turns"]

# A turn ends with the step in which this is over.
_TURN_NS = 50_000
# A pass ends with the turn in which this is over: then the loop looks who has come meanwhile.
_PASS_NS = 50_000
# So many more tags than the last time are kept before those are looked for that mean nothing any more.
_TAGS = 64

Key = TypeVar("Key")


class Ready(Protocol):
    """Somebody who may have something to do: a connection with frames, or a `Chore`."""

    uid: int

    def serve(self, until_ns: int) -> bool:
        """Do one step, and more as long as there is time.

        Args:
            until_ns: On the clock of the turns.

        Returns:
            Whether there is more to do.
        """


class FairQueue(Generic[Key]):
    """Who waits, in the order of what they have cost."""

    def __init__(self) -> None:
        """Start with nobody."""
        self._heap: list[tuple[int, int, Key]] = []
        self._tags: dict[Key, int] = {}
        self._most = _TAGS
        self._clock = 0
        self._order = itertools.count()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._heap)

    def push(self, key: Key) -> None:
        """Let somebody wait who does not."""
        tag = max(self._tags.get(key, 0), self._clock)
        heapq.heappush(self._heap, (tag, next(self._order), key))

    def pop(self) -> Key:
        """Take whose turn it is out."""
        self._clock, _, key = heapq.heappop(self._heap)
        return key

    def charge(self, key: Key, cost: int) -> None:
        """Count what the turn of whoever was taken out last has cost, before it is pushed again."""
        self._tags[key] = self._clock + cost
        if len(self._tags) > self._most:
            self._tags = {each: tag for each, tag in self._tags.items() if tag > self._clock}
            self._most = 2 * len(self._tags) + _TAGS


class Turns:
    """Serves a little for each in passes of the event loop.

    So a frame waits for the turn that others have at the moment and for one look of the loop, however many
    connections other users have open, however much they send and however long it takes.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """Start with nobody.

        Args:
            clock: In nanoseconds.
        """
        self._clock = clock
        self._users: FairQueue[int] = FairQueue()
        self._own: dict[int, FairQueue[Ready]] = {}
        self._waiting: set[Ready] = set()
        self._scheduled = False
        # Who is being served, and whether it joins meanwhile.
        self._served: Ready | None = None
        # When the last turn was over.
        self._rested = 0
        self._again = False

    def join(self, one: Ready) -> None:
        """Let somebody have a turn; without effect while it waits for one."""
        self._enter(one)
        self._schedule()

    def arrive(self, one: Ready) -> None:
        """Let somebody have a turn: at once, if the loop had nothing to do until now.

        Whoever comes in the same look of the loop waits for this one turn only.
        """
        self._enter(one)
        now = self._clock()
        if not self._scheduled and now - self._rested > _TURN_NS:
            try:
                self._rested = self._turn(now)
            finally:
                self._schedule()
        else:
            self._schedule()

    def _enter(self, one: Ready) -> None:
        if one is self._served:
            self._again = True
            return
        if one in self._waiting:
            return
        self._waiting.add(one)
        own = self._own.get(one.uid)
        if own is None:
            own = self._own[one.uid] = FairQueue()
            self._users.push(one.uid)
        own.push(one)

    def waits(self, one: Ready) -> bool:
        """Whether somebody has joined and not had its turn yet."""
        return one in self._waiting

    def run(self, uid: int, steps: Iterator[object]) -> asyncio.Future[None]:
        """Do something for a user step by step, in its turns; what the steps raise is the future's."""
        chore = Chore(uid, steps, self._clock)
        self.join(chore)
        return chore.done

    def _schedule(self) -> None:
        if self._users and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        """Give turns until the time of a pass is over."""
        self._scheduled = False
        now = self._clock()
        end = now + _PASS_NS
        try:
            while self._users and now < end:
                now = self._turn(now)
        finally:
            self._rested = now
            self._schedule()

    def _turn(self, began: int) -> int:
        """Give whoever is next a turn; return when it was over."""
        uid = self._users.pop()
        # It stays there as long as the user has something waiting, this one included.
        own = self._own[uid]
        one = self._served = own.pop()
        self._waiting.discard(one)
        self._again = False
        more = False
        try:
            more = one.serve(began + _TURN_NS)
        finally:
            self._served = None
            now = self._clock()
            own.charge(one, now - began)
            self._users.charge(uid, now - began)
            if more or self._again:
                self._waiting.add(one)
                own.push(one)
            if own:
                self._users.push(uid)
            else:
                del self._own[uid]
        return now


class Chore:
    """Work for a user that nobody sends frames for, such as ending what a client has left."""

    def __init__(self, uid: int, steps: Iterator[object], clock: Callable[[], int]) -> None:
        """Take the steps over; each leaves everything whole."""
        self.uid = uid
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._steps = steps
        self._clock = clock

    def serve(self, until_ns: int) -> bool:
        """Do a step, and more as long as there is time."""
        try:
            next(self._steps)
            while self._clock() < until_ns:
                next(self._steps)
        except StopIteration:
            self._finish(None)
            return False
        except Exception as error:  # noqa: BLE001 - told to whoever waits for it
            self._finish(error)
            return False
        return True

    def _finish(self, error: Exception | None) -> None:
        if self.done.cancelled():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
