"""Who is served in which order, on a clock that only work moves."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from quire.broker import turns

TURN = turns._TURN_NS


class Machine:
    """A clock, and what was served."""

    def __init__(self) -> None:
        self.now = 0
        self.order: list[str] = []
        self.spent: dict[str, int] = {}
        self.turns = turns.Turns(lambda: self.now)

    def run(self, begin: Callable[[], None], busy: Callable[[], bool]) -> None:
        async def all_of_it() -> None:
            begin()
            while busy():
                await asyncio.sleep(0)

        asyncio.run(all_of_it())


class Scripted:
    """A connection with so many frames, each of which takes so long."""

    def __init__(
        self,
        machine: Machine,
        uid: int,
        name: str,
        frames: int,
        nanoseconds: int,
        then: Callable[[], None] = int,
    ) -> None:
        self.machine, self.uid, self.name = machine, uid, name
        self.frames, self.nanoseconds, self.then = frames, nanoseconds, then

    def serve(self, until: int) -> bool:
        machine = self.machine
        while self.frames:
            self.frames -= 1
            machine.order.append(self.name)
            machine.now += self.nanoseconds
            machine.spent[self.name] = machine.spent.get(self.name, 0) + self.nanoseconds
            self.then()
            if machine.now >= until:
                break
        return self.frames > 0


def served(machine: Machine, *ones: Scripted) -> str:
    """Let them join in this order, serve all, return the order."""

    def begin() -> None:
        for one in ones:
            machine.turns.join(one)

    machine.run(begin, lambda: any(one.frames for one in ones))
    assert not any(machine.turns.waits(one) for one in ones)
    return "".join(machine.order)


def test_users_take_turns_however_many_connections_they_have() -> None:
    machine = Machine()
    many = [Scripted(machine, 1, "m", 5, TURN) for _ in range(20)]
    few = Scripted(machine, 2, "f", 3, TURN)
    assert served(machine, *many, few) == "mf" * 3 + "m" * 97


def test_connections_of_a_user_take_turns() -> None:
    machine = Machine()
    ones = [Scripted(machine, 1, name, 3, TURN) for name in "abc"]
    assert served(machine, *ones) == "abc" * 3


def test_cheap_frames_are_served_together_up_to_the_length_of_a_turn() -> None:
    machine = Machine()
    a, b = (Scripted(machine, uid, name, 10, TURN // 4) for uid, name in ((1, "a"), (2, "b")))
    assert served(machine, a, b) == "aaaabbbb" * 2 + "aabb"


@pytest.mark.parametrize("uid", [1, 2], ids=["of the same user", "of another user"])
def test_what_is_shared_is_time_not_frames(uid: int) -> None:
    """Whose frames take ten times as long has a tenth as many served."""
    machine = Machine()
    dear = Scripted(machine, 1, "d", 20, 10 * TURN)
    cheap = Scripted(machine, uid, "c", 100, TURN)
    order = served(machine, dear, cheap)
    assert order[:13] == "d" + "c" * 10 + "dc"
    while_both = order[: order.rindex("c")]
    assert abs(while_both.count("d") * 10 - while_both.count("c")) <= 10


def test_who_comes_anew_goes_before_all_who_took_more() -> None:
    machine = Machine()
    late = Scripted(machine, 9, "L", 1, TURN)

    def then() -> None:
        if len(machine.order) == 30:
            machine.turns.join(late)

    busy = [Scripted(machine, uid, str(uid), 20, 3 * TURN, then) for uid in range(4)]
    served(machine, *busy, *[])
    at = machine.order.index("L")
    # Those that stand at the same tag came before.
    assert at <= 30 + len(busy)


def test_being_away_earns_nothing() -> None:
    machine = Machine()
    busy = Scripted(machine, 1, "b", 100, TURN)
    back = Scripted(machine, 2, "r", 1, TURN)

    def then() -> None:
        if len(machine.order) == 60:
            back.frames = 40
            machine.turns.join(back)

    busy.then = then
    order = served(machine, back, busy)
    assert order[:3] in ("rbb", "brb")
    # It is not given the sixty turns that it did not use.
    assert "rrr" not in order[:140]
    assert order[60:130].count("r") in range(33, 38)


def test_a_closed_loop_of_dear_requests_does_not_escape_its_share() -> None:
    """It never has two requests waiting, and still pays for the one before."""
    machine = Machine()
    dear = Scripted(machine, 1, "d", 1, 8 * TURN)

    def ask_again() -> None:
        if machine.order[-1] == "c" and machine.order.count("c") % 2 and not dear.frames:
            dear.frames = 1
            machine.turns.join(dear)

    cheap = Scripted(machine, 2, "c", 160, TURN, ask_again)
    order = served(machine, dear, cheap)
    assert 160 / 8 - 1 <= order.count("d") <= 160 / 8 + 2


def test_joining_while_one_is_served() -> None:
    """Neither the same one nor another of its user is lost or served twice over."""
    machine = Machine()
    other = Scripted(machine, 1, "o", 1, TURN)
    one = Scripted(machine, 1, "x", 2, TURN)

    def then() -> None:
        machine.turns.join(one)
        machine.turns.join(other)

    one.then = then
    assert served(machine, one, other) == "xox"


def test_who_arrives_when_nobody_waits_is_served_at_once_and_only_the_first() -> None:
    machine = Machine()
    ones = [Scripted(machine, 1, name, 1, TURN) for name in "abc"]
    at_once: list[str] = []

    async def run() -> None:
        machine.now = 10 * TURN
        for one in ones:
            machine.turns.arrive(one)
        at_once.extend(machine.order)
        while any(one.frames for one in ones):
            await asyncio.sleep(0)
        # It has rested no time since.
        ones[0].frames = 1
        machine.turns.arrive(ones[0])
        assert machine.turns.waits(ones[0])
        while ones[0].frames:
            await asyncio.sleep(0)
        machine.now += 2 * TURN
        ones[1].frames = 1
        machine.turns.arrive(ones[1])
        assert not machine.turns.waits(ones[1])

    asyncio.run(run())
    assert at_once == ["a"]
    assert "".join(machine.order) == "abcab"


def test_a_failure_does_not_stop_the_turns_of_others() -> None:
    machine = Machine()
    told: list[str] = []

    def fail() -> None:
        raise RuntimeError("a bug")

    bad = Scripted(machine, 1, "b", 1, TURN, fail)
    good = Scripted(machine, 2, "g", 3, TURN)

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: told.append(str(context["exception"]))
        )
        machine.turns.join(bad)
        machine.turns.join(good)
        while good.frames:
            await asyncio.sleep(0)

    asyncio.run(run())
    assert machine.order == ["b", "g", "g", "g"]
    assert told == ["a bug"]


def test_a_chore_is_done_in_the_turns_of_its_user() -> None:
    machine = Machine()
    honest = Scripted(machine, 2, "h", 6, TURN)

    def steps() -> Iterator[None]:
        for _ in range(6):
            machine.order.append("c")
            machine.now += TURN
            yield

    async def run() -> None:
        done = machine.turns.run(1, steps())
        machine.turns.join(honest)
        await done

    asyncio.run(run())
    assert "".join(machine.order) == "ch" * 6


def test_what_a_chore_raises_is_told() -> None:
    machine = Machine()

    def steps() -> Iterator[None]:
        yield
        raise OSError(5, "it failed")

    async def run() -> None:
        await machine.turns.run(1, steps())

    with pytest.raises(OSError, match="it failed"):
        asyncio.run(run())


def test_nothing_is_remembered_of_who_is_gone() -> None:
    """Also while somebody else is never idle."""
    machine = Machine()
    gone: list[weakref.ref[Scripted]] = []
    left: list[int] = []

    def then() -> None:
        if busy.frames % 2:
            short = Scripted(machine, 1, "s", 1, TURN)
            gone.append(weakref.ref(short))
            machine.turns.join(short)
        if busy.frames == 1:
            gc.collect()
            left.append(sum(each() is not None for each in gone))

    busy = Scripted(machine, 1, "b", 2000, TURN, then)
    served(machine, busy)
    assert len(gone) == 1000
    assert left[0] < 2 * turns._TAGS + 10
