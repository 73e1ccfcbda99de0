"""The two locks of quire. A forked child gets fresh ones, whoever held them in the parent."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["WriterLock", "WritingGate"]

# How long who waits goes on without looking, in seconds.
_GLANCE = 0.1


class _Fresh:
    """A lock whose state is made anew in a forked child."""

    _all: ClassVar[weakref.WeakSet[_Fresh]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._reset()
        self._all.add(self)

    def _reset(self) -> None:
        raise NotImplementedError

    @classmethod
    def _reset_all(cls) -> None:
        for lock in list(cls._all):
            lock._reset()


os.register_at_fork(after_in_child=_Fresh._reset_all)


class _Token:
    """One call that waits at a gate or is inside; it counts until it ends or its frame is gone."""

    __slots__ = ("__weakref__", "active", "thread", "turn")

    def __init__(self) -> None:
        self.active = True
        self.thread = threading.get_ident()
        self.turn = 0


class _Tokens:
    """Tokens by weak reference, so that a call cut short by an exception anywhere leaves nothing behind."""

    __slots__ = ("_references",)

    def __init__(self) -> None:
        self._references: list[weakref.ref[_Token]] = []

    def add(self, token: _Token) -> None:
        self._references.append(weakref.ref(token))

    def remove(self, token: _Token) -> None:
        self._references = [
            reference
            for reference in self._references
            if (other := reference()) is not None and other is not token
        ]

    def holds(self, token: _Token) -> bool:
        return any(reference() is token for reference in self._references)

    def __iter__(self) -> Iterator[_Token]:
        for reference in self._references:
            token = reference()
            if token is not None and token.active:
                yield token

    def __bool__(self) -> bool:
        return any(True for _ in self)


class _GateState:
    """Who is inside a gate, and who waits."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = _Tokens()
        self.running = _Tokens()
        self.waiting_snapshots = _Tokens()
        self.waiting_writers = _Tokens()
        # Snapshots that have ended; a writer that has waited through one goes before the next.
        self.turn = 0
        self._sleepers: list[threading.Lock] = []

    def may_write(self, token: _Token) -> bool:
        return not self.running and (token.turn < self.turn or not self.waiting_snapshots)

    def may_run(self) -> bool:
        owed = any(writer.turn < self.turn for writer in self.waiting_writers)
        return not (self.running or self.inside or owed)

    def sleeper(self) -> threading.Lock:
        """A lock that the next change releases; call with the lock held."""
        sleeper = threading.Lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        return sleeper

    def wake(self) -> None:
        """Let all that wait look again; call with the lock held."""
        sleepers, self._sleepers = self._sleepers, []
        for sleeper in sleepers:
            sleeper.release()


class WritingGate(_Fresh):
    """Many writers inside, or one snapshot running.

    A writer that comes while a snapshot waits or runs waits for it, so writers cannot starve snapshots; one
    that has waited for a snapshot goes in before the next, so snapshots cannot starve writers.

    A signal handler may raise between any two instructions. So nothing here is counted up and down: what
    holds is derived from tokens that live in the frames of the calls, and the only lock is taken by ``with``,
    which an exception cannot split from its release. A wake-up that is lost this way costs a glance.
    """

    _state: _GateState

    def _reset(self) -> None:
        self._state = _GateState()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be inside; blocks while a snapshot waits or runs. Who is inside already goes in at once."""
        state = self._state
        token = _Token()
        try:
            with state.lock:
                token.turn = state.turn
                nested = any(other.thread == token.thread for other in state.inside)
                (state.inside if nested else state.waiting_writers).add(token)
            while not nested:
                with state.lock:
                    if state.may_write(token):
                        state.inside.add(token)
                        state.waiting_writers.remove(token)
                        # A snapshot may have waited for this one only.
                        state.wake()
                        break
                    sleeper = state.sleeper()
                sleeper.acquire(timeout=_GLANCE)
            yield
        finally:
            self._leave(state, token)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until nobody is inside, and keep writers out meanwhile.

        Raises:
            RuntimeError: The calling thread is inside itself, so the wait would never end.
        """
        state = self._state
        token = _Token()
        try:
            with state.lock:
                if any(other.thread == token.thread for other in state.inside):
                    raise RuntimeError(
                        "this thread is inside writing(): leave the block before taking a snapshot"
                    )
                state.waiting_snapshots.add(token)
            while True:
                with state.lock:
                    if state.may_run():
                        state.running.add(token)
                        state.waiting_snapshots.remove(token)
                        break
                    sleeper = state.sleeper()
                sleeper.acquire(timeout=_GLANCE)
            yield
        finally:
            self._leave(state, token)

    def _leave(self, state: _GateState, token: _Token) -> None:
        token.active = False
        # In a child forked inside the block the gate is new; the old one's lock may be held for ever.
        if state is not self._state:
            return
        with state.lock:
            state.turn += state.running.holds(token)
            for tokens in (state.inside, state.running, state.waiting_snapshots, state.waiting_writers):
                tokens.remove(token)
            state.wake()


class WriterLock(_Fresh):
    """One writer at a time; a thread that takes it twice is told instead of waiting for itself."""

    _lock: threading.Lock
    _owner: int | None

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._owner = None

    @property
    def mine(self) -> bool:
        """Whether the calling thread holds it."""
        # An exception out of a signal handler may have kept the owner from being forgotten.
        return self._owner == threading.get_ident() and self._lock.locked()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock; blocks while another thread does.

        Raises:
            RuntimeError: The calling thread holds it already.
        """
        if self.mine:
            raise RuntimeError("this thread is inside unprotected() already")
        lock = self._lock
        with lock:
            try:
                self._owner = threading.get_ident()
                yield
            finally:
                # After a fork inside the block the child has a lock of its own.
                if lock is self._lock:
                    self._owner = None
