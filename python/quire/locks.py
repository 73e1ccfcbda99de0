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


class _GateState:
    """Who is inside a gate, and who waits."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        # Thread identity to how often it is inside.
        self.depths: dict[int, int] = {}
        self.running = False
        self.waiting_snapshots = 0
        self.waiting_writers = 0
        # Snapshots that have ended; a writer that has waited through one goes before the next.
        self.turn = 0
        self.owed_writers = 0


class WritingGate(_Fresh):
    """Many writers inside, or one snapshot running.

    A writer that comes while a snapshot waits or runs waits for it, so writers cannot starve snapshots; one
    that has waited for a snapshot goes in before the next, so snapshots cannot starve writers.
    """

    _state: _GateState

    def _reset(self) -> None:
        self._state = _GateState()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be inside; blocks while a snapshot waits or runs. Who is inside already goes in at once."""
        state = self._state
        me = threading.get_ident()
        self._enter(state, me)
        try:
            yield
        finally:
            # In a child that was forked inside the block the gate is new and nobody is inside.
            if state is self._state:
                with state.changed:
                    state.depths[me] -= 1
                    if not state.depths[me]:
                        del state.depths[me]
                        state.changed.notify_all()

    @staticmethod
    def _enter(state: _GateState, me: int) -> None:
        with state.changed:
            if me not in state.depths:
                turn = state.turn
                state.waiting_writers += 1
                try:
                    while state.running or (state.waiting_snapshots and state.turn == turn):
                        state.changed.wait()
                finally:
                    state.waiting_writers -= 1
                    if state.turn != turn:
                        state.owed_writers -= 1
                        state.changed.notify_all()
                state.depths[me] = 0
            state.depths[me] += 1

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until nobody is inside, and keep writers out meanwhile.

        Raises:
            RuntimeError: The calling thread is inside itself, so the wait would never end.
        """
        state = self._state
        with state.changed:
            if threading.get_ident() in state.depths:
                raise RuntimeError(
                    "this thread is inside writing(): leave the block before taking a snapshot"
                )
            state.waiting_snapshots += 1
            try:
                while state.running or state.depths or state.owed_writers:
                    state.changed.wait()
                state.running = True
            finally:
                state.waiting_snapshots -= 1
                state.changed.notify_all()
        try:
            yield
        finally:
            if state is self._state:
                with state.changed:
                    state.running = False
                    state.turn += 1
                    state.owed_writers = state.waiting_writers
                    state.changed.notify_all()


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
        return self._owner == threading.get_ident()

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
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                # After a fork inside the block the child has a lock of its own.
                if lock is self._lock:
                    self._owner = None
