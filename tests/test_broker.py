"""What honest clients get from a broker."""

import asyncio
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest
from brokers import children, daemon, inside
from support import PAGE, pattern

import quire
from quire import aio, client
from quire.broker.protocol import Rights

MIB = 1 << 20


def filled(owner: client.Client, size: int, **options: int) -> tuple:
    """Memory with a pattern in it."""
    handle, lease = owner.memory(size, **options)
    data = pattern(size, 1)
    with lease.writing() as rw:
        rw[:] = data
    return handle, lease, data


def test_memory_is_lent_and_written_through(owner, other) -> None:
    handle, lease, data = filled(owner, 3 * MIB + 5, extent_bytes=MIB)
    owner.publish(handle, "memory")
    borrowed = other.lease(other.open("memory"))
    assert np.array_equal(borrowed.array("u1"), data)
    with lease.writing() as rw:
        rw[7] = 77
    assert borrowed[7] == 77
    with pytest.raises(PermissionError), borrowed.writing():
        pass
    assert not borrowed.array("u1").flags.writeable


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (5, 4096), (4095, 2), (MIB - 1, 2), (MIB + 3, MIB), (0, None)]
)
def test_leases_of_any_size_and_alignment_on_the_same_pages(owner, other, offset, length) -> None:
    handle, _, data = filled(owner, 3 * MIB, extent_bytes=MIB)
    owner.publish(handle, "memory")
    opened = other.open("memory")
    whole = other.lease(opened)
    lease = other.lease(opened, offset, length)
    stop = None if length is None else offset + length
    assert lease[:] == data[offset:stop].tobytes()
    assert lease.array("u1").tobytes() == lease[:] == lease.read(0, lease.size)
    lease.close()
    assert whole[:] == data.tobytes()


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (MIB, 1), (5, MIB), (MIB + 1, None)])
def test_ranges_outside_are_refused(owner, offset, length) -> None:
    handle, _ = owner.memory(MIB)
    with pytest.raises(ValueError, match="not within"):
        owner.lease(handle, offset, length)


def test_a_lease_gives_only_the_extents_that_it_touches(broker) -> None:
    with quire.connect(broker.path) as owner, children(broker.path, 1) as (child,):
        handle, _, _ = filled(owner, 3 * MIB, extent_bytes=MIB)
        owner.publish(handle, "memory")
        child("h = c.open('memory')")
        number = child(
            "c._link.submit(protocol.Lease, {'handle': h.number, 'offset': 2**20, 'length': 5}, (), "
            "lambda reply, fds: (len(fds), os.fstat(fds[0]).st_size)).result()"
        )
        assert number == (1, MIB)


def test_handles_mean_nothing_to_others(owner, other) -> None:
    handle, _ = owner.memory(PAGE)
    with pytest.raises(LookupError):
        other.lease(handle)
    with pytest.raises(LookupError):
        other.open("memory")


def test_handles_are_only_weakened(owner, other) -> None:
    handle, _ = owner.memory(PAGE)
    weak = owner.weaken(handle, Rights.READ)
    with pytest.raises(PermissionError):
        owner.weaken(weak, Rights.READ | Rights.LEND)
    with pytest.raises(PermissionError):
        owner.publish(weak, "memory")
    with pytest.raises(PermissionError):
        owner.revoke(weak)
    with pytest.raises(PermissionError):
        owner.destroy(weak)
    publisher = owner.weaken(handle, Rights.PUBLISH)
    with pytest.raises(PermissionError):
        owner.publish(publisher, "memory", Rights.READ)
    owner.publish(handle, "memory", Rights.READ)
    opened = other.open("memory")
    with pytest.raises(PermissionError):
        other.weaken(opened, Rights.DESTROY)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_list_says_who_may_open_a_name() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with inside(pathlib.Path(folder) / "broker") as broker, quire.connect(broker.path) as owner:
            handle, _ = owner.memory(PAGE)
            owner.publish(handle, "few", users=[12345])
            with children(broker.path, 1, uid=12345) as (child,):
                assert child("c.lease(c.open('few')).size") == PAGE
            refused = pytest.raises(AssertionError, match="no name 'few'")
            with children(broker.path, 1, uid=12346) as (child,), refused:
                child("c.open('few')")
            with pytest.raises(LookupError):
                owner.open("few")


def test_a_name_is_taken_once_and_withdrawn(owner, other) -> None:
    handle, _ = owner.memory(PAGE)
    owner.publish(handle, "memory")
    with pytest.raises(FileExistsError):
        other.publish(other.make(PAGE), "memory")
    opened = other.open("memory")
    owner.unpublish(handle, "memory")
    with pytest.raises(LookupError):
        other.open("memory")
    assert other.describe(opened).kind == "memory"


def test_a_descriptor_stands_for_an_object(owner, other) -> None:
    handle, _, data = filled(owner, PAGE)
    token = owner.export_fd(handle, Rights.READ)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [token])
        os.close(token)
        _, (received,), _, _ = socket.recv_fds(theirs, 1, 1)
    opened = other.import_fd(received)
    assert other.lease(opened)[:] == data.tobytes()
    assert opened.rights == Rights.READ
    owner.destroy(handle)
    with pytest.raises(LookupError):
        other.import_fd(received)
    os.close(received)


def test_what_nobody_names_ends(broker, owner) -> None:
    handle = owner.make(MIB)
    token = owner.export_fd(handle, Rights.READ)
    owner.publish(handle, "memory", Rights.PUBLISH)
    owner.close_handle(handle)
    os.close(token)
    opened = owner.open("memory")
    owner.unpublish(opened, "memory")
    owner.close_handle(opened)
    # The broker holds the descriptor that stands for it, for whoever may have it.
    assert owner.describe(owner.bank).used[0] == MIB
    (end,) = broker.do(lambda: list(broker.server.world.tokens.values()))
    broker.do(lambda: broker.server.world.end(end))
    broker.wait(lambda world: not world.objects)
    assert owner.describe(owner.bank).used == [0, 0, 0]


def test_banks_nest_and_bound(owner) -> None:
    bank = owner.make_bank(10 * MIB)
    inner = owner.make_bank(100 * MIB, parent=bank)
    first = owner.make(6 * MIB, bank=inner)
    assert owner.describe(inner).used == [6 * MIB, 1, 1]
    assert owner.describe(bank).used == [6 * MIB, 2, 1]
    with pytest.raises(quire.QuotaExceeded, match="bytes left"):
        owner.make(5 * MIB, bank=inner)
    owner.make(4 * MIB, bank=bank)
    assert owner.describe(bank).used[0] == 10 * MIB
    owner.destroy(first)
    assert owner.describe(inner).used == [0, 0, 0]


def test_limits_on_objects_and_descriptors(owner) -> None:
    bank = owner.make_bank(MIB, limit_objects=2)
    owner.make(PAGE, bank=bank)
    owner.make(PAGE, bank=bank)
    with pytest.raises(quire.QuotaExceeded, match="objects"):
        owner.make(PAGE, bank=bank)
    bank = owner.make_bank(MIB, limit_descriptors=3)
    with pytest.raises(quire.QuotaExceeded, match="descriptors"):
        owner.make(4 * PAGE, bank=bank, extent_bytes=PAGE)


def test_concurrent_makers_never_pass_a_limit(owner) -> None:
    bank = owner.make_bank(8 * MIB)
    made, refused = [], []

    def make() -> None:
        try:
            made.append(owner.make(3 * MIB, bank=bank))
        except quire.QuotaExceeded as error:
            refused.append(error)

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (2, 4)


def test_destroying_a_bank_takes_everything_back(owner, other) -> None:
    bank = owner.make_bank(100 * MIB)
    inner = owner.make_bank(50 * MIB, parent=bank)
    handle, lease = owner.memory(4 * MIB, bank=inner)
    owner.publish(handle, "memory")
    borrowed = other.lease(other.open("memory"))
    segment = quire.Segment(MIB)
    segment.array("u1")[:] = 1
    kept = owner.deposit(segment.snapshot(), bank=bank)
    used = owner.describe(bank).used[0]
    taken = owner.destroy(bank, deadline_ms=5000)
    assert taken.freed_bytes == used
    assert owner.describe(owner.bank).used == [0, 0, 0]
    assert borrowed.revoked
    assert lease.revoked
    for gone in (kept, handle, inner, bank):
        with pytest.raises(LookupError):
            owner.describe(gone)
    segment.close()


def versions(count: int) -> tuple[quire.Segment, list[quire.Snapshot]]:
    """A segment with snapshots of it, of which each has two pages more than the last."""
    segment = quire.Segment(64 * PAGE)
    segment.array("u1")[:] = pattern(64 * PAGE, 3)
    made = [segment.snapshot()]
    for version in range(1, count):
        segment.array("u1")[version * 2 * PAGE : (version * 2 + 2) * PAGE] = version
        made.append(segment.snapshot())
    return segment, made


def test_shared_layers_are_paid_for_once_and_divergence_by_who_writes(owner) -> None:
    segment, snapshots = versions(2)
    first, second = owner.make_bank(MIB), owner.make_bank(MIB)
    owner.deposit(snapshots[0], bank=first)
    whole = owner.describe(first).used
    owner.deposit(snapshots[1], bank=second)
    assert owner.describe(first).used == whole
    changed = owner.describe(second).used[0]
    assert 2 * PAGE <= changed <= 4 * PAGE
    segment.close()


def test_a_grant_moves_the_charge(owner, other) -> None:
    segment, (snapshot,) = versions(1)
    handle = owner.deposit(snapshot, bank=(lender := owner.make_bank(MIB)))
    owner.publish(handle, "snapshot", Rights.READ | Rights.SNAPSHOT)
    paid = owner.describe(lender).used[0]
    assert paid > 64 * PAGE
    receiver = other.make_bank(MIB)
    granted, received = other.grant(other.open("snapshot"), bank=receiver)
    received.verify()
    with received.map() as mapping, snapshot.map() as original:
        assert mapping[:] == original[:]
    assert owner.describe(lender).used[0] == 0
    assert other.describe(receiver).used[0] == paid
    owner.destroy(handle)
    assert other.fetch(granted).size == 64 * PAGE
    other.destroy(granted)
    assert other.describe(receiver).used == [0, 0, 0]
    segment.close()


def test_a_grant_that_cannot_be_paid_changes_nothing(owner) -> None:
    segment, (snapshot,) = versions(1)
    handle = owner.deposit(snapshot, bank=(lender := owner.make_bank(MIB)))
    before = owner.describe(lender).used
    with pytest.raises(quire.QuotaExceeded):
        owner.grant(handle, bank=owner.make_bank(8 * PAGE))
    assert owner.describe(lender).used == before
    segment.close()


def test_who_uses_layers_pays_when_the_payer_goes(owner) -> None:
    segment, snapshots = versions(2)
    first, second = owner.make_bank(MIB), owner.make_bank(MIB)
    base = owner.deposit(snapshots[0], bank=first)
    upper = owner.deposit(snapshots[1], bank=second)
    owner.destroy(base)
    assert owner.describe(first).used == [0, 0, 0]
    assert owner.describe(second).used[0] > 64 * PAGE
    owner.fetch(upper).verify()
    segment.close()


def test_sparse_snapshots_are_paid_for_in_full(owner) -> None:
    with quire.Segment(MIB) as segment:
        segment[5] = 1
        handle = owner.deposit(segment.snapshot())
        assert owner.describe(owner.bank).used[0] >= MIB
        owner.fetch(handle).verify()


def test_a_factory_gives_verified_versions(owner, other) -> None:
    segment, snapshots = versions(3)
    factory = owner.make_factory()
    owner.publish(factory, "factory")
    opened = other.open("factory")
    assert other.describe(opened).kind == "factory"
    with pytest.raises(LookupError, match="no version"):
        other.current(opened)
    with pytest.raises(PermissionError):
        other.put(opened, snapshots[0])
    seen = []
    arrived = threading.Semaphore(0)

    def on_version(_number: int) -> None:
        version, handle, snapshot = other.current(opened)
        snapshot.verify()
        seen.append((version, snapshot.layers))
        other.close_handle(handle)
        arrived.release()

    other.subscribe(opened, on_version)
    for version, snapshot in enumerate(snapshots, 1):
        assert owner.put(factory, snapshot) == version
        assert arrived.acquire(timeout=10)
    assert [version for version, _ in seen] == [1, 2, 3]
    other.unsubscribe(opened)
    segment.close()


def test_a_subscriber_that_does_not_ask_is_told_once(owner, other) -> None:
    segment, snapshots = versions(3)
    factory = owner.make_factory()
    owner.publish(factory, "factory")
    told = []
    arrived = threading.Semaphore(0)
    other.subscribe(other.open("factory"), lambda version: (told.append(version), arrived.release()))
    for snapshot in snapshots:
        owner.put(factory, snapshot)
    assert arrived.acquire(timeout=10)
    other.ping()
    assert told == [1]
    segment.close()


def test_shared_memory_has_many_writers(owner, other) -> None:
    handle = owner.make(PAGE, shared=True)
    owner.publish(handle, "memory", Rights.READ | Rights.WRITE)
    mine, theirs = owner.lease(handle, write=True), other.lease(other.open("memory"), write=True)
    with mine.writing() as a, theirs.writing() as b:
        a[0], b[1] = 1, 2
    assert mine[:2] == theirs[:2] == b"\1\2"
    with pytest.raises(ValueError, match="shared memory stays writable"):
        owner.seal(handle)


def test_memory_that_is_not_sealed_is_its_makers_only(owner, other) -> None:
    handle = owner.make(PAGE)
    owner.publish(handle, "memory", Rights.READ | Rights.WRITE)
    opened = other.open("memory")
    for write in (False, True):
        with pytest.raises(PermissionError):
            other.lease(opened, write=write)
    owner.seal(handle)
    assert other.lease(opened)[0] == 0
    for who, what in ((owner, handle), (other, opened)):
        with pytest.raises(PermissionError):
            who.lease(what, write=True)


def test_asyncio(broker) -> None:
    async def run() -> None:
        async with await aio.connect(broker.path) as owner, await aio.connect(broker.path) as other:
            handle, lease = await owner.memory(2 * MIB)
            with lease.writing() as rw:
                rw[5] = 55
            await owner.publish(handle, "memory")
            borrowed = await other.lease(await other.open("memory"), 5, 10)
            assert borrowed[0] == 55
            await asyncio.gather(*(other.ping() for _ in range(100)))
            taken = await owner.revoke(handle, deadline_ms=5000)
            assert [outcome.client for outcome in taken.outcomes] == [other.number]
            assert borrowed.revoked
            segment, snapshots = versions(2)
            factory = await owner.make_factory()
            await owner.publish(factory, "factory")
            opened = await other.open("factory")
            await owner.put(factory, snapshots[0])
            seen = []
            async for version, _, snapshot in other.versions(opened):
                seen.append(version)
                snapshot.close()
                if version == 2:
                    break
                await owner.put(factory, snapshots[1])
            assert seen == [1, 2]
            segment.close()

    asyncio.run(run())


def test_a_forked_child_has_no_part_in_it(owner) -> None:
    handle, lease, _ = filled(owner, PAGE)
    child = os.fork()
    if child == 0:
        try:
            owner.describe(handle)
        except quire.ForkedError:
            # The memory is not there either.
            lease._area.view(0, 1, False)[0]
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    owner.ping()


def test_a_client_that_ends_leaves_nothing(broker) -> None:
    with children(broker.path, 1) as (child,):
        child("x = c.memory(3 * 2**20)")
        child("c.publish(x[0], 'gone')")
        assert broker.do(lambda: len(broker.server.world.leases)) == 1
        child.process.kill()
        broker.wait(lambda world: not world.leases and not world.sessions)
    # What it published stays: others may be about to open it. Its bank pays.
    with quire.connect(broker.path) as later:
        handle = later.open("gone")
        assert later.lease(handle).size == 3 * MIB
    assert broker.audit() == []


def test_the_command(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "broker"
    with daemon(path, "--limit", "16M") as process:
        with quire.connect(path) as connected:
            assert connected.describe(connected.bank).limit[0] == 16 * MIB
            with pytest.raises(quire.QuotaExceeded):
                connected.make(17 * MIB)
        process.terminate()
        assert process.wait(20) == 0
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        quire.connect(path)


def test_without_msgspec_it_says_what_to_install() -> None:
    program = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "msgspec" else found(name, *rest)
import quire
try:
    quire.connect
except quire.Unsupported as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "install quire[broker]" in done.stdout


def test_a_folder_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    argv = [sys.executable, "-m", "quire", "broker", "--socket", str(tmp_path / "no" / "broker")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "bind" in done.stderr
    assert str(tmp_path / "no") in done.stderr


def test_two_brokers_do_not_share_a_path(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "broker"
    with daemon(path):
        second = subprocess.run(
            [sys.executable, "-m", "quire", "broker", "--socket", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 1
        assert "listens" in second.stderr


def test_a_forked_child_may_close_what_it_inherited_and_the_parent_keeps_it(broker) -> None:
    with quire.connect(broker.path) as client:
        handle, lease = client.memory(PAGE)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                client.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert lease[0] == 0
        assert [holder.client for holder in client.holders(handle)] == [client.number]
        client.ping()
