"""Memory is taken back from whoever has it, and nobody else notices."""

import os
import pathlib
import signal
import threading

import numpy as np
import pytest
from brokers import Child, children, inside, until
from support import PAGE, pattern

import quire
from quire.broker.protocol import Rights

MIB = 1 << 20
SIZE = 8 * MIB

# Acknowledges every revocation and unmaps nothing.
LIAR = """
from quire.broker import borrowed
borrowed.Lease._take_away = lambda self, start, stop: None
"""
# Keeps the descriptors too.
HOARDER = """
kept = []
_map = borrowed.Lease._map
def keep(self, descriptors):
    kept.extend(map(os.dup, descriptors))
    _map(self, descriptors)
borrowed.Lease._map = keep
"""

# Leaves what is lent to its children.
INHERITED = "from quire.broker import area; area.Area._dont_fork = staticmethod(lambda *a: None)"
# Has the memfd that it was given, and seals it against being truncated.
SELFISH = """
import fcntl
def seal(reply, fds):
    fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    globals().update(kept=fds)
h = c.make(2**20)
c._link.submit(protocol.Lease, dict(handle=h.number, offset=0, length=2**20, write=True), (), seal).result()
"""


@pytest.fixture
def broker_settings() -> dict[str, int]:
    return {"move_ms": 5000}


@pytest.fixture
def memory(owner):
    handle, lease = owner.memory(SIZE, extent_bytes=2 * MIB)
    with lease.writing() as rw:
        rw[:] = pattern(SIZE, 9)
    owner.publish(handle, "memory")
    return handle, lease


def borrow(child: Child, first: str = "") -> int:
    """Lease all of it in a child; return the client's number."""
    child(first)
    child("lease = c.lease(c.open('memory')); a = lease.array('u1'); total = int(a.sum())")
    return child("c.number")


def outcomes(taken) -> dict[int, str]:
    return {outcome.client: outcome.result for outcome in taken.outcomes}


def test_who_complies_is_seen_to_have_complied(broker, owner, memory) -> None:
    handle, _ = memory
    with children(broker.path, 2) as (child, other):
        number, _ = borrow(child), borrow(other)
        child(
            "told = []; lease.on_revoke(lambda offset, length: told.append((offset, length, int(a.sum()))))"
        )
        total = child("total")
        assert outcomes(owner.revoke(handle, client=number, deadline_ms=5000)) == {number: "released"}
        assert child("told") == [(0, SIZE, total)]
        with pytest.raises(AssertionError, match="Revoked"):
            child("lease[0]")
        with pytest.raises(AssertionError, match="Revoked"):
            child("lease.array('u1')")
        assert other("int(a.sum())") == total
        assert child("lease.address") == child("a.ctypes.data")


def test_a_touch_after_revocation_is_sigbus(broker, owner, memory) -> None:
    with children(broker.path, 1) as (child,):
        borrow(child)
        owner.revoke(memory[0], deadline_ms=5000)
        child.begin("a[0]")
        assert child.process.wait(10) == -signal.SIGBUS


def test_part_of_a_lease_is_taken_back(broker, owner, memory) -> None:
    handle, lease = memory
    with children(broker.path, 1) as (child,):
        number = borrow(child)
        assert outcomes(owner.revoke(handle, 3 * MIB + 5, MIB, client=number, deadline_ms=5000)) == {
            number: "released"
        }
        assert child("lease.held") == [(0, 3 * MIB), (4 * MIB + PAGE, SIZE)]
        assert child("lease[3 * 2**20 - 1]") == lease[3 * MIB - 1]
        with pytest.raises(AssertionError, match="Revoked"):
            child("lease[3 * 2**20:3 * 2**20 + 1]")
        with lease.writing() as rw:
            rw[0] = 1
        assert child("int(a[0])") == 1


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (LIAR, "still maps"),
        (LIAR + HOARDER, "still maps"),
        ("from quire.broker import borrowed" + HOARDER, "descriptor"),
    ],
    ids=["keeps mapping", "keeps both", "keeps descriptors"],
)
def test_liars_are_found_out_and_cut_off(broker, owner, memory, first, why) -> None:
    handle, _ = memory
    with children(broker.path, 2) as (liar, other):
        number, _ = borrow(liar, first), borrow(other)
        total = other("int(a.sum())")
        addresses = other("lease.address")
        before = other("faults()")
        taken = owner.revoke(handle, client=number, deadline_ms=5000)
        assert outcomes(taken) == {number: "cut"}
        assert why in taken.outcomes[0].why
        assert taken.moved_bytes == SIZE
        assert other("int(a.sum())") == total
        assert other("lease.address") == addresses
        assert other("faults()") - before < SIZE // PAGE // 4
        if "still maps" in why:
            liar.begin("a[0]")
            assert liar.process.wait(10) == -signal.SIGBUS
        else:
            assert liar("[os.fstat(fd).st_size for fd in kept]") == [0] * 4


def test_a_stopped_client_is_cut_off(broker, owner, memory) -> None:
    handle, lease = memory
    with children(broker.path, 2) as (stopped, other):
        number, _ = borrow(stopped), borrow(other)
        stopped.stop()
        taken = owner.revoke(handle, client=number, deadline_ms=20)
        assert outcomes(taken) == {number: "cut"}
        assert "did not answer" in taken.outcomes[0].why
        with lease.writing() as rw:
            rw[3] = 99
        assert other("int(a[3])") == 99
        os.kill(stopped.pid, signal.SIGCONT)
        # It finds out when it looks, and goes on otherwise.
        stopped("c.ping()")
        assert stopped("lease.held") == []


def test_a_part_is_taken_by_force_and_the_rest_stays(broker, owner, memory) -> None:
    handle, lease = memory
    with children(broker.path, 2) as (liar, other):
        number, _ = borrow(liar, LIAR), borrow(other)
        taken = owner.revoke(handle, 3 * MIB, MIB, client=number)
        (outcome,) = taken.outcomes
        assert (outcome.result, outcome.offset, outcome.length) == ("cut", 2 * MIB, 2 * MIB)
        assert liar("int(a[0])") == lease[0]
        assert liar("int(a[4 * 2**20])") == lease[4 * MIB]
        with lease.writing() as rw:
            rw[3 * MIB] = rw[3 * MIB] ^ 255
        assert other("int(a[3 * 2**20])") == lease[3 * MIB]
        liar.begin("a[3 * 2**20]")
        assert liar.process.wait(10) == -signal.SIGBUS


def test_certainty_reaches_a_forked_child(broker, owner, memory) -> None:
    """A child that was forked before holds the memory where nobody looks; cutting off takes it anyway."""
    handle, _ = memory
    with children(broker.path, 1) as (child,):
        number = borrow(
            child, "from quire.broker import area; area.Area._dont_fork = staticmethod(lambda *a: None)"
        )
        child("r, w = os.pipe(); pid = os.fork()\nif pid == 0:\n    os.read(r, 1); a[0]; os._exit(0)")
        # The fork has no mapping through the client, and the client complies.
        assert outcomes(owner.revoke(handle, client=number, deadline_ms=5000)) == {number: "released"}
        taken = owner.revoke(handle, client=number, certain=True)
        assert taken.outcomes == []
        number = borrow(child)
        taken = owner.revoke(handle, client=number, certain=True)
        assert outcomes(taken) == {number: "cut"}
        child("os.write(w, b'x')")
        assert child("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == -signal.SIGBUS


def test_a_stopped_client_learns_that_memory_was_destroyed(broker, owner, memory) -> None:
    handle, _ = memory
    with children(broker.path, 1) as (stopped,):
        borrow(stopped)
        stopped.stop()
        taken = owner.destroy(handle, deadline_ms=20)
        assert "cut" in outcomes(taken).values()
        assert taken.freed_bytes == SIZE
        os.kill(stopped.pid, signal.SIGCONT)
        stopped("c.ping()")
        assert stopped("lease.held") == []


@pytest.mark.parametrize("policy", ["disconnect", "kill"])
def test_policies(tmp_path: pathlib.Path, policy) -> None:
    with inside(tmp_path / "broker", policy=policy) as broker, quire.connect(broker.path) as owner:
        handle, _ = owner.memory(MIB)
        owner.publish(handle, "memory")
        with children(broker.path, 1) as (liar,):
            number = borrow(liar, LIAR)
            (outcome,) = owner.revoke(handle, client=number).outcomes
            if policy == "kill":
                assert outcome.ended == "killed"
                assert liar.process.wait(10) == -signal.SIGKILL
            else:
                assert outcome.ended == "disconnected"


def test_writers_lose_no_byte_while_memory_is_moved(broker, owner) -> None:
    handle, lease = owner.memory(4 * MIB, extent_bytes=MIB)
    owner.publish(handle, "memory")
    stop = threading.Event()
    written = np.zeros(4 * MIB // 8, np.uint64)

    def write() -> None:
        rng = np.random.default_rng(5)
        while not stop.is_set():
            where = rng.integers(0, len(written), 64)
            value = rng.integers(1, 1 << 60)
            with lease.writing() as rw:
                view = rw.array("u8")
                view[where] = value
                del view
            written[where] = value

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with children(broker.path, 3) as (liar, *others):
            for child in others:
                borrow(child)
            for _ in range(5):
                number = borrow(liar, LIAR)
                assert outcomes(owner.revoke(handle, client=number)) == {number: "cut"}
            stop.set()
            thread.join()
            assert np.array_equal(lease.array("u8"), written)
            for child in others:
                assert child("a.tobytes() == lease[:]")
                assert child("int(lease.array('u8').sum())") == int(written.sum())
    finally:
        stop.set()
        thread.join()


def test_a_writer_that_does_not_leave_is_cut_off_too(tmp_path: pathlib.Path) -> None:
    with inside(tmp_path / "broker", move_ms=500) as broker, quire.connect(broker.path) as owner:
        handle, _ = owner.memory(MIB)
        owner.publish(handle, "memory", Rights.READ | Rights.LEND)
        with children(broker.path, 2) as (liar, other), quire.connect(broker.path) as lender:
            del handle
            number = borrow(liar, LIAR)
            borrow(other)
            lease = owner._borrowed.all()[0]
            with lease.writing():
                taken = lender.revoke(lender.open("memory"), client=number)
                assert outcomes(taken) == {number: "cut"}
            until(lambda: lease.revoked)
            assert other("int(a.sum())") == 0
        assert broker.audit() == []


def test_all_at_once(broker, owner, memory) -> None:
    handle, lease = memory
    with children(broker.path, 4) as clients:
        for index, child in enumerate(clients):
            borrow(child, LIAR if index == 0 else "")
        results = outcomes(owner.revoke(handle, deadline_ms=5000))
        assert sorted(results.values()) == ["cut", "released", "released", "released"]
        assert not lease.revoked
        assert owner.holders(handle)[0].client == owner.number
        assert len(owner.holders(handle)) == 1


def test_with_no_memory_to_move_to_the_answer_says_so(tmp_path: pathlib.Path) -> None:
    with inside(tmp_path / "broker", limit_bytes=4 * MIB, reserve_bytes=PAGE) as broker:
        with quire.connect(broker.path) as owner, children(broker.path, 2) as (liar, other):
            handle, lease = owner.memory(4 * MIB)
            owner.publish(handle, "memory")
            number, _ = borrow(liar, LIAR), borrow(other)
            (outcome,) = owner.revoke(handle, client=number).outcomes
            assert outcome.result == "kept"
            assert "bytes left" in outcome.why
            assert other("int(a.sum())") == 0
            assert not lease.revoked
            # Destroying it needs no memory.
            assert owner.destroy(handle).freed_bytes == 4 * MIB
        assert broker.audit() == []


def test_who_disconnects_without_unmapping_is_not_forgotten(broker, owner, memory) -> None:
    handle, _ = memory
    with children(broker.path, 1) as (child,):
        number = borrow(child, LIAR)
        child("c._link._closing.set(); c._link._sock.shutdown(socket.SHUT_RDWR)")
        broker.wait(lambda world: world.sessions[number].port is None)
        assert [holder.connected for holder in owner.holders(handle)] == [True, False]
        assert outcomes(owner.revoke(handle, client=number)) == {number: "cut"}
        child.begin("a[0]")
        assert child.process.wait(10) == -signal.SIGBUS


def test_a_maker_that_seals_against_truncation_goes_on_paying(broker, owner) -> None:
    with children(broker.path, 1) as (child,):
        child(SELFISH)
        with pytest.raises(AssertionError, match="NotImmutable"):
            child("c.seal(h)")
        child("c.destroy(h); 0")
        assert child("c.describe(c.bank).used") == [MIB, 0, 1]
        assert broker.audit() == []
        child.process.kill()
        broker.wait(lambda world: not world.sessions or len(world.sessions) == 1)
    assert owner.describe(owner.bank).used == [0, 0, 0]


def test_many_clients_one_revoked_politely_and_one_by_force(tmp_path: pathlib.Path) -> None:
    """The proof of the whole in small; ``benches`` has it with 64 clients and a gigabyte."""
    size = 32 * MIB
    with inside(tmp_path / "broker", move_ms=10_000) as broker, quire.connect(broker.path) as owner:
        handle, lease = owner.memory(size, extent_bytes=8 * MIB)
        with lease.writing() as rw:
            rw[:] = pattern(size, 4)
        owner.publish(handle, "memory")
        with children(broker.path, 10) as (polite, liar, *others):
            first, second = borrow(polite), borrow(liar, LIAR)
            for child in others:
                borrow(child)
            for child in others:
                child("int(a[::4096].sum())")
            faults = [child("faults()") for child in others]
            # What asking costs by itself.
            baseline = [child("faults()") - before for child, before in zip(others, faults, strict=True)]
            faults = [child("faults()") for child in others]
            assert outcomes(owner.revoke(handle, client=first, deadline_ms=5000)) == {first: "released"}
            assert outcomes(owner.revoke(handle, client=second)) == {second: "cut"}
            for child, before, own in zip(others, faults, baseline, strict=True):
                child("total2 = int(a[::4096].sum())")
                assert child("faults()") - before <= max(2 * own, 8), "pages had to be faulted in again"
            whole = int(lease.array("u1").sum())
            assert {child("int(a.sum())") for child in others} == {whole}
        assert broker.audit() == []


@pytest.mark.parametrize("certain", [False, True])
def test_who_gives_a_lease_back_and_keeps_the_mapping_is_found_out(broker, owner, memory, certain) -> None:
    handle, lease = memory
    with children(broker.path, 2) as (child, other):
        number, _ = borrow(child, LIAR), borrow(other)
        child("lease.close()")
        assert number not in {holder.client for holder in owner.holders(handle)}
        taken = owner.revoke(handle, client=number, deadline_ms=5000, certain=certain)
        assert outcomes(taken) == {number: "cut"}
        (outcome,) = taken.outcomes
        assert "still maps" in outcome.why
        assert other("int(a.sum())") == int(lease.array("u1").sum())
        child.begin("a[0]")
        assert child.process.wait(10) == -signal.SIGBUS
        assert outcomes(owner.revoke(handle, 0, 1, deadline_ms=5000)) == {other("c.number"): "released"}


def test_certainty_reaches_children_of_who_has_ended(broker, owner, memory) -> None:
    handle, _ = memory
    with children(broker.path, 1) as (child,):
        child(INHERITED)
        borrow(child)
        grandchild = child(
            "(lambda pid: pid or (lambda: [signal.pause() for _ in iter(int, 1)])())(os.fork())"
        )
        number = child("c.number")
    broker.wait(lambda world: number not in world.sessions)
    assert owner.revoke(handle, deadline_ms=5000).moved_bytes == 0
    assert owner.revoke(handle, deadline_ms=5000, certain=True).moved_bytes == SIZE
    maps = pathlib.Path(f"/proc/{grandchild}/maps").read_text()
    descriptors = [
        os.open(f"/proc/{grandchild}/map_files/{line.split()[0]}", os.O_RDONLY)
        for line in maps.splitlines()
        if "quire-lease" in line and os.getuid() == 0
    ]
    os.kill(grandchild, signal.SIGKILL)
    assert [os.fstat(each).st_size for each in descriptors] == [0] * len(descriptors)
    for each in descriptors:
        os.close(each)
    # What was moved was given to nobody since.
    assert owner.revoke(handle, deadline_ms=5000, certain=True).moved_bytes == 0
