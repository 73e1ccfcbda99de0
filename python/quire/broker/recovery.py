"""Building the world again from the journal and the descriptors that were kept."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from quire.broker import given
from quire.broker.banks import Amount, Bank
from quire.broker.leases import Lease
from quire.broker.objects import OBJECT, Extent, Factory, Held, Layer, Memory, SnapshotObject
from quire.broker.protocol import Rights
from quire.broker.sessions import Grip, Session
from quire.broker.world import Name, Token

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from quire.broker.sessions import Target
    from quire.broker.world import World

__all__ = ["restore"]

_log = logging.getLogger("quire.broker")


def restore(world: World, found: dict[str, int]) -> dict[Extent, tuple[int, str]]:
    """Fill an empty world with what the journal says.

    Descriptors that no entry names belong to something that was never finished, or was ended already: they
    are truncated where that is possible, and closed.

    Args:
        world: Its journal has been read.
        found: The descriptors that were kept, by name; taken.

    Returns:
        The extents in the middle of a move, with the descriptor that they had before and what it is kept as.
    """
    entries = world.journal.entries
    world.last = entries.get("q", 0)
    used: set[str] = set()

    def take(name: str) -> int:
        used.add(name)
        return found[name]

    for key, (above, limit, name) in sorted(_each(entries, "b")):
        parent = world.banks[above] if above else None
        world.banks[key] = Bank(key, Amount(*limit), parent, name)
        if parent is not None:
            parent.charge(OBJECT)
    # Leases, names and handles point at objects, objects at layers.
    for key, (payer,) in _each(entries, "y"):
        layer = Layer(key, take(f"y{key}"), world.banks[payer])
        layer.payer.charge(layer.cost)
        world.layers[key] = layer
        world.layers_by_identity[layer.identity] = layer
    factories = []
    for key, state in sorted(_each(entries, "o")):
        bank = world.banks[state[1]]
        if state[0] == "memory":
            memory = Memory(key, bank, state[2], state[3], shared=state[5], maker=state[6])
            memory.sealed = state[4]
            bank.charge(memory.cost)
            world.objects[key] = memory
        elif state[0] == "snapshot":
            bank.charge(OBJECT)
            world.objects[key] = SnapshotObject(
                key, bank, [world.layers[each] for each in state[3]], state[2]
            )
        else:
            bank.charge(OBJECT)
            factory = Factory(key, bank, state[2])
            world.objects[key] = factory
            factories.append((factory, state[3]))
    for factory, current in factories:
        snapshot = world.objects.get(current)
        if isinstance(snapshot, SnapshotObject):
            world.show(factory, snapshot)
            world.refer(snapshot)
    moving = _extents(world, take)
    _sessions(world, take)
    for name, (kind, number, rights, users, owner) in _named(entries):
        target = _target(world, kind, number)
        assert target is not None, f"the name {name!r} stands for nothing"
        entry = Name(target, Rights(rights), users, owner)
        world.enter_name(name, entry)
    for key, (number, rights) in _each(entries, "t"):
        held = world.objects[number]
        held.bank.charge(Amount(0, 1, 1))
        world.enter_token(Token(key, held.bank, held, Rights(rights), take(f"t{key}")))
    _end_what_nobody_has(world)
    for name in set(found) - used:
        descriptor = found.pop(name)
        if name.startswith("x"):
            try:
                os.ftruncate(descriptor, 0)
            except PermissionError:
                _log.warning("memory that was being ended cannot be truncated: its maker has sealed it")
        world.keeper.forget(name)
        os.close(descriptor)
    return moving


def _end_what_nobody_has(world: World) -> None:
    """End what was being ended: memory that was truncated already, and what has no handle, name or token."""
    for held in list(world.objects.values()):
        cut = isinstance(held, Memory) and any(not os.fstat(each.descriptor).st_size for each in held.extents)
        if cut or not held.references:
            world.end(held)


def _extents(world: World, take: Callable[[str], int]) -> dict[Extent, tuple[int, str]]:
    """Give memory its extents; return those in the middle of a move."""
    entries = world.journal.entries
    moving = {}
    for key, (number, index, generation) in sorted(_each(entries, "x"), key=lambda item: item[1][:2]):
        memory = world.objects[number]
        assert isinstance(memory, Memory)
        extent = Extent(memory, index, key, take(f"x{key}.{generation}"))
        extent.generation = generation
        memory.extents.append(extent)
        world.extents[key] = extent
        before = entries.get(f"v{key}")
        if before is not None:
            name = f"x{key}.{before}"
            moving[extent] = take(name), name
    return moving


def _sessions(world: World, take: Callable[[str], int]) -> None:
    """Restore who holds what."""
    entries = world.journal.entries
    for key, (token_digest, pid, uid, home) in _each(entries, "s"):
        session = Session(key, token_digest, pid, uid, world.banks[home])
        world.sessions[key] = session
        world.sessions_by_digest[token_digest] = session
    for name, value in entries.items():
        if name[0] not in "ehr":
            continue
        owner, _, number = name[1:].partition(".")
        if name[0] == "e":
            given.enter(world.extents[int(owner)], int(number), world.sessions.get(int(number)))
            continue
        session = world.sessions[int(owner)]
        if name[0] == "r":
            session.replies[int(number)] = value[0], value[1], value[2]
        else:
            # Handles outlive what they stood for: their numbers must not come to mean something else.
            target = _target(world, value[0], value[1]) or _gone(world)
            world.hold(session, int(number), Grip(target, Rights(value[2])))
    for key, (number, owner, spans, write) in _each(entries, "l"):
        memory = world.objects[number]
        assert isinstance(memory, Memory)
        session = world.sessions[owner]
        lease = Lease(key, memory, session, [(start, stop) for start, stop in spans], write)
        session.leases[key] = lease
        world.leases[key] = lease
    for key, (bank_number, length, generation, maker) in _each(entries, "z"):
        memory = Memory(0, world.banks[bank_number], length, length, shared=False, maker=maker)
        extent = Extent(memory, 0, key, take(f"x{key}.{generation}"))
        extent.generation = generation
        memory.bank.charge(extent.cost)
        world.sessions[maker].stuck.append(extent)


def _each(entries: dict[str, Any], letter: str) -> list[tuple[int, list[Any]]]:
    """The entries of one kind, with their numbers."""
    return [(int(key[1:]), value) for key, value in entries.items() if key[0] == letter and key[1:].isdigit()]


def _named(entries: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    return [(key[1:], value) for key, value in entries.items() if key[0] == "n"]


def _target(world: World, kind: str, number: int) -> Target | None:
    return world.banks.get(number) if kind == "b" else world.objects.get(number)


def _gone(world: World) -> Held:
    """What a handle of something that has ended stands for."""
    held = Held(0, next(iter(world.banks.values())))
    held.dead = True
    return held
