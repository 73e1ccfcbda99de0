"""The snapshot factory's subscriptions: telling of new versions without ever waiting for anybody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.broker.protocol import VersionEvent

if TYPE_CHECKING:
    from quire.broker.objects import Factory
    from quire.broker.sessions import Session
    from quire.broker.world import World

__all__ = ["Announcer"]


class Announcer:
    """Tells subscribers of versions.

    A subscriber has at most one announcement that it has not answered by asking for the current version, and
    hears of the next one after that. So a slow subscriber costs the owner nothing, and the broker one number.
    """

    def __init__(self, world: World) -> None:
        """Listen to a world."""
        self._world = world
        # What each subscriber was told last, and whether it has asked since.
        self._told: dict[tuple[int, int], int] = {}

    def announce(self, factory: Factory) -> None:
        """Tell everybody who is to be told now."""
        for session in self._world.sessions.values():
            if factory in session.subscriptions and (session.number, factory.number) not in self._told:
                self._tell(session, factory)

    def _tell(self, session: Session, factory: Factory) -> None:
        if session.port is not None:
            self._told[session.number, factory.number] = factory.version
            session.port.post(VersionEvent(session.subscriptions[factory], factory.version), [])

    def asked(self, session: Session, factory: Factory) -> None:
        """A session has asked for the current version and is to be told of the next one."""
        self._told.pop((session.number, factory.number), None)

    def subscribe(self, session: Session, factory: Factory, handle: int) -> None:
        """Tell a session of versions, the present one first if there is one."""
        session.subscriptions[factory] = handle
        self._told.pop((session.number, factory.number), None)
        if factory.version:
            self._tell(session, factory)

    def unsubscribe(self, session: Session, factory: Factory) -> None:
        """Tell it no more."""
        session.subscriptions.pop(factory, None)
        self._told.pop((session.number, factory.number), None)

    def lost(self, session: Session) -> None:
        """Forget what a session was told: its connection has closed."""
        for key in [key for key in self._told if key[0] == session.number]:
            del self._told[key]
