"""Sessions: what a client holds, whether or not it is connected at the moment."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol, TypeAlias

from quire.broker.protocol import Rights

if TYPE_CHECKING:
    from quire.broker.banks import Bank
    from quire.broker.leases import Lease
    from quire.broker.objects import Extent, Held
    from quire.broker.protocol import Message

    Target: TypeAlias = Bank | Held

__all__ = ["Grip", "Session", "digest"]


def digest(token: bytes) -> bytes:
    """What is kept of a session's token: who reads the journal cannot take a session over."""
    return hashlib.sha256(token).digest()


class Grip:
    """One handle: an object and what may be done with it."""

    __slots__ = ("rights", "target")

    def __init__(self, target: Target, rights: Rights) -> None:
        """Hold an object."""
        self.target = target
        self.rights = rights


class Port(Protocol):
    """How events reach a client; the server's connections are ports."""

    def post(self, message: Message, descriptors: list[int]) -> None:
        """Send an event; the descriptors are the port's from now on, whatever happens."""

    def drop(self, why: str) -> None:
        """Close the connection."""


class Session:
    """A client. Its handles are numbers that mean something on its own connection only.

    A session outlives its connection only as long as the client may come back: after the broker was
    restarted, and while its process still lives and may still have leases mapped.
    """

    def __init__(self, number: int, token_digest: bytes, pid: int, uid: int, home: Bank) -> None:
        """Start with no handles.

        Args:
            number: Names it in the protocol and the journal.
            token_digest: Of the secret that the client shows when it comes back.
            pid: Of the peer, as the kernel says.
            uid: Of the peer, as the kernel says.
            home: The bank of its user.
        """
        self.number = number
        self.token_digest = token_digest
        self.pid = pid
        self.uid = uid
        self.home = home
        self.grips: dict[int, Grip] = {}
        self.next_handle = 1
        self.leases: dict[int, Lease] = {}
        # Since this broker was started; for administrators.
        self.requests = 0
        self.subscriptions: dict[Held, int] = {}
        self.replies: dict[int, tuple[int, bytes, list[str]]] = {}
        # The connection, for whoever sends events; None while there is none.
        self.port: Port | None = None
        self.pidfd = -1
        # What it made, sealed against being taken back, and lost: stays charged until its process has ended.
        self.stuck: list[Extent] = []
        # What it was given a descriptor of, and may still have.
        self.given: set[Extent] = set()

    def grip(self, handle: int, rights: Rights, kind: str = "") -> Target:
        """Look a handle up.

        Raises:
            LookupError: This session has no such handle.
            PermissionError: It lacks a right.
            TypeError: It stands for something of another kind.
        """
        held = self.grips.get(handle)
        if held is None or held.target.dead:
            raise LookupError(f"no handle {handle}")
        if kind and held.target.kind != kind:
            raise TypeError(f"handle {handle} is a {held.target.kind}, not a {kind}")
        missing = rights & ~held.rights
        if missing:
            raise PermissionError(f"handle {handle} lacks the right {missing.name or int(missing)}")
        return held.target
