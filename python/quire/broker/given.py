"""Who was given a descriptor of an extent, at any time since it was made or moved.

A client that gives a lease back may keep the mapping or the descriptor, and so may a child of it after it has
ended. So it is remembered, until the extent is moved to other pages, that it may have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.broker.journal import Journal
    from quire.broker.objects import Extent
    from quire.broker.sessions import Session

__all__ = ["ENDED", "enter", "forget", "lent", "outlives", "renew"]

ENDED = 0
"""Stands for all sessions that have ended."""


def enter(extent: Extent, number: int, session: Session | None) -> None:
    """Say what the journal says.

    Args:
        extent: Was lent.
        number: Of a session, or ENDED.
        session: The same, if it has not ended.
    """
    extent.given[number] = session
    if session is not None:
        session.given.add(extent)


def lent(journal: Journal, extent: Extent, session: Session) -> None:
    """A session is given a descriptor."""
    if session.number not in extent.given:
        enter(extent, session.number, session)
        journal.put(f"e{extent.serial}.{session.number}", True)


def renew(journal: Journal, extent: Extent) -> None:
    """The extent is other pages now, which those get who have a lease."""
    forget(journal, extent)
    for lease in extent.leases:
        lent(journal, extent, lease.session)


def forget(journal: Journal, extent: Extent) -> None:
    """The pages are gone, whoever had them."""
    for number, session in extent.given.items():
        if session is not None:
            session.given.discard(extent)
        journal.put(f"e{extent.serial}.{number}", None)
    extent.given.clear()


def outlives(journal: Journal, session: Session) -> None:
    """A session ends; children of its process may not have."""
    for extent in session.given:
        del extent.given[session.number]
        journal.put(f"e{extent.serial}.{session.number}", None)
        if ENDED not in extent.given:
            extent.given[ENDED] = None
            journal.put(f"e{extent.serial}.{ENDED}", True)
    session.given.clear()
