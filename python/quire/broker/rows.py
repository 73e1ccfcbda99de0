"""What the broker tells its administrators of: one row for each client, bank, object and lease."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeVar

    from quire.broker.world import World

    Thing = TypeVar("Thing")

__all__ = ["PAGE_ROWS", "BankRow", "ClientRow", "LeaseRow", "ObjectRow", "page"]

PAGE_ROWS = 100
"""Of one reply: with names of 255 bytes in each they still fit into a frame."""


class ClientRow(msgspec.Struct, frozen=True):
    """A client, connected or one that may come back."""

    number: int
    pid: int
    uid: int
    connected: bool
    bank: int
    """The bank of its user."""
    handles: int
    leases: int
    leased_bytes: int
    """Of all its leases; a page that is in two of them counts twice."""
    requests: int
    """Since it, or the broker, was started."""


class BankRow(msgspec.Struct, frozen=True):
    """A bank; amounts are bytes, objects, descriptors."""

    number: int
    parent: int
    """0 for the root."""
    name: str
    """What the broker calls it, or the first name that it was published under; empty if it has none."""
    used: list[int]
    limit: list[int]


class ObjectRow(msgspec.Struct, frozen=True):
    """Memory, a snapshot, a factory, or a token: a descriptor that was exported."""

    number: int
    kind: str
    bank: int
    """Where it was made. Layers of a snapshot may be paid for by another bank."""
    size_bytes: int
    name: str
    """The first name that it was published under; empty if it has none."""
    references: int
    """Handles, names and exported descriptors."""
    leases: int
    clients: int
    """That hold these leases."""


class LeaseRow(msgspec.Struct, frozen=True):
    """A part of a lease: one whose middle was taken back has two rows."""

    number: int
    object: int
    client: int
    offset: int
    length: int
    write: bool


def _after(things: Mapping[int, Thing], after: int) -> tuple[list[Thing], bool]:
    """Those with the smallest numbers above one, and whether there are more."""
    numbers = heapq.nsmallest(PAGE_ROWS + 1, (number for number in things if number > after))
    return [things[number] for number in numbers[:PAGE_ROWS]], len(numbers) > PAGE_ROWS


def _names(world: World) -> dict[int, str]:
    """The first name of each object that has one."""
    names: dict[int, str] = {}
    for name, entry in world.names.items():
        names.setdefault(entry.target.number, name)
    return names


def page(
    world: World, what: str, after: int
) -> tuple[list[ClientRow] | list[BankRow] | list[ObjectRow] | list[LeaseRow], bool]:
    """List a part of what there is, in the order of the numbers.

    Args:
        world: The broker's state.
        what: ``clients``, ``banks``, ``objects`` or ``leases``.
        after: Begin with what has a larger number than this.

    Returns:
        The rows, and whether more follow. All rows of a lease are on one page.

    Raises:
        ValueError: ``what`` is none of these.
    """
    if what == "clients":
        sessions, more = _after(world.sessions, after)
        return [
            ClientRow(
                session.number,
                session.pid,
                session.uid,
                session.port is not None,
                session.home.number,
                len(session.grips),
                len(session.leases),
                sum(stop - start for lease in session.leases.values() for start, stop in lease.spans),
                session.requests,
            )
            for session in sessions
        ], more
    if what == "banks":
        names = _names(world)
        banks, more = _after(world.banks, after)
        return [
            BankRow(
                bank.number,
                bank.parent.number if bank.parent is not None else 0,
                bank.name or names.get(bank.number, ""),
                list(bank.used),
                list(bank.limit),
            )
            for bank in banks
        ], more
    if what == "objects":
        names = _names(world)
        objects, more = _after(world.objects | world.tokens, after)
        rows = []
        for held in objects:
            leases = getattr(held, "leases", ())
            rows.append(
                ObjectRow(
                    held.number,
                    held.kind,
                    held.bank.number,
                    getattr(held, "size_bytes", 0),
                    names.get(held.number, ""),
                    held.references,
                    len(leases),
                    len({lease.session for lease in leases}),
                )
            )
        return rows, more
    if what == "leases":
        return _leases(world, after)
    raise ValueError(f"clients, banks, objects or leases can be listed, not {what!r}")


def _leases(world: World, after: int) -> tuple[list[LeaseRow], bool]:
    leases, more = _after(world.leases, after)
    rows: list[LeaseRow] = []
    for lease in leases:
        if rows and len(rows) + len(lease.spans) > PAGE_ROWS:
            return rows, True
        # Of a lease in very many pieces the first are told; the frame has an end.
        rows += [
            LeaseRow(
                lease.number, lease.memory.number, lease.session.number, start, stop - start, lease.write
            )
            for start, stop in lease.spans[: 4 * PAGE_ROWS]
        ]
    return rows, more
