"""Clients that do what they should not. Others are served on, and nothing is lost or leaked."""

import array
import contextlib
import os
import pathlib
import resource
import signal
import socket
import threading

import pytest
from brokers import Raw, children, inside, until
from support import PAGE, descriptor_count

import quire
from quire.broker import protocol
from quire.broker.penalties import Penalties
from quire.broker.protocol import Rights
from quire.broker.rates import Rate

MIB = 1 << 20


@pytest.fixture
def broker_settings() -> dict[str, int]:
    return {"frame_seconds": 1}


@pytest.fixture(autouse=True)
def close_raw():
    yield
    while Raw.made:
        Raw.made.pop().sock.close()


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\0" * 64,
    b"QB\x01\x00\xff\xff\xff\xff",
    b"QB\x01\xff\x00\x00\x00\x00",
    b"QB\x09\x00\x00\x00\x00\x00",
    protocol.encode(protocol.Done(1)),
    protocol.encode(protocol.Hello(1, 1)),
    b"QB\x01\x00\x04\x00\x00\x00\xdd\xff\xff\xff",
    b"QB\x01\x00\xff\xff\x00\x00" + b"\x91" * 65535,
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_ends_its_own_connection(broker, owner, data) -> None:
    raw = Raw(broker.path)
    raw.sock.sendall(data)
    assert raw.is_cut_off()
    owner.ping()


def test_nothing_comes_before_hello(broker, owner) -> None:
    raw = Raw(broker.path, hello=False)
    raw.send(protocol.Ping(1))
    assert raw.is_cut_off()
    owner.ping()


def test_another_version_is_told(broker) -> None:
    raw = Raw(broker.path, hello=False)
    reply = raw.ask(protocol.Hello(1, 99))
    assert isinstance(reply, protocol.Fault)
    assert reply.fault == "unsupported"
    raw.sock.close()


@pytest.mark.parametrize("sent", [b"", b"Q", b"QB\x01\x00\x10\x00\x00\x00", b"QB\x01\x00\x10\x00\x00\x00abc"])
def test_who_stalls_is_cut_off_and_nobody_waits(broker, owner, sent) -> None:
    raw = Raw(broker.path, hello=not sent)
    if sent:
        raw.sock.close()
        raw = Raw(broker.path)
        raw.sock.sendall(sent)
        owner.ping()
        assert raw.is_cut_off()
    else:
        silent = Raw(broker.path, hello=False)
        owner.ping()
        assert silent.is_cut_off()
        # Who has said hello may be silent for as long as it likes.
        assert isinstance(raw.ask(protocol.Ping(2)), protocol.Done)
        raw.sock.close()


def kinds() -> list[int]:
    """Descriptors of kinds that a broker has no use for; the caller closes them."""
    read, write = os.pipe()
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.write(unsealed, b"x" * PAGE)
    return [read, write, unsealed, os.open("/dev/null", os.O_RDWR), os.open("/", os.O_RDONLY), os.eventfd(1)]


def test_descriptors_that_nobody_asked_for(broker, owner) -> None:
    raw = Raw(broker.path)
    before = descriptor_count()
    opened = kinds()
    bank = raw.welcome.bank
    for descriptors in ([each] for each in opened):
        assert raw.ask(protocol.Deposit(2, bank), descriptors).fault in ("notimmutable", "malformed")
        assert raw.ask(protocol.Import(3), descriptors).fault in ("notimmutable", "unknown")
    assert raw.ask(protocol.Deposit(4, bank), opened).fault == "notimmutable"
    assert raw.ask(protocol.Deposit(5, bank)).fault == "malformed"
    assert raw.ask(protocol.Import(6)).fault == "malformed"
    raw.sock.sendmsg([b"Q"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", opened * 20))])
    raw.sock.sendall(b"B")
    assert raw.is_cut_off()
    other = Raw(broker.path)
    # Ping takes none.
    other.send(protocol.Ping(1), opened)
    assert other.is_cut_off()
    for each in opened:
        os.close(each)
    owner.ping()
    until(lambda: descriptor_count() <= before)


def test_who_breaks_the_protocol_waits_when_it_comes_back(broker, owner) -> None:
    """Others of its user are served on; a connection that it makes is not read for a while."""
    for _ in range(2):
        raw = Raw(broker.path)
        raw.sock.sendall(b"garbage!")
        assert raw.is_cut_off()
    assert broker.do(lambda: broker.server._penalties.wait_seconds(os.getuid())) > 0
    assert broker.do(lambda: broker.server._penalties.wait_seconds(os.getuid() + 1)) == 0
    late = Raw(broker.path, hello=False)
    broker.wait(lambda _world: len(broker.server._connections) == 2)
    held_off = broker.do(lambda: [each._paused for each in broker.server._connections])
    assert sorted(held_off) == [False, True]
    owner.ping()
    assert late.ask(protocol.Hello(1, 1)).client > 0


def test_a_rate_counts_what_requests_cost() -> None:
    now = [0.0]
    rate = Rate(1000.0, lambda: now[0])
    # A tenth of a second's may be saved.
    assert rate.take(100, 0) == 0
    assert rate.take(1, 0) == pytest.approx(0.001)
    now[0] += 0.011
    assert rate.take(9, 9 * 25_000) == 0, "one that takes its time costs one"
    assert rate.take(1, 50 * 25_000) == pytest.approx(0.049)
    now[0] += 60
    assert rate.take(101, 0) == pytest.approx(0.001), "no more than a tenth of a second's is saved"


def test_a_long_list_of_holders_is_made_in_several_turns(owner) -> None:
    handle, own = owner.memory(PAGE)
    leases = [owner.lease(handle) for _ in range(100)]
    listed = owner.holders(handle)
    assert len(listed) == 101
    assert all((row.client, row.offset, row.length) == (owner.number, 0, PAGE) for row in listed)
    assert [row.write for row in listed] == [True] + [False] * 100
    for lease in (own, *leases):
        lease.close()
    assert owner.holders(handle) == []


def test_penalties_grow_and_are_forgotten() -> None:
    now = [100.0]
    penalties = Penalties(lambda: now[0])
    waits = []
    for _ in range(7):
        penalties.offended(1)
        waits.append(round(penalties.wait_seconds(1), 3))
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert penalties.wait_seconds(2) == 0
    now[0] += 0.75
    assert penalties.wait_seconds(1) == pytest.approx(0.25)
    now[0] += 9.0
    penalties.offended(2)
    assert penalties.wait_seconds(1) == 0
    penalties.offended(1)
    assert penalties.wait_seconds(1) == 1.0, "it came back too early to be forgotten"
    now[0] += 11.0
    penalties.offended(2)
    assert set(penalties._terms) == {2}


def test_layers_that_may_cost_more_or_come_twice(broker) -> None:
    raw = Raw(broker.path)
    bank = raw.welcome.bank
    with quire.Segment(MIB) as segment:
        segment[5] = 1
        layers = segment.snapshot()._lend().layer_fds()
        assert "holes" in raw.ask(protocol.Deposit(1, bank), layers).message
        for layer in layers:
            writable = os.open(f"/proc/self/fd/{layer}", os.O_RDWR)
            os.posix_fallocate(writable, 0, os.fstat(layer).st_size)
            os.close(writable)
        assert raw.ask(protocol.Deposit(2, bank), layers * 2).fault == "malformed"
    raw.sock.close()


def test_a_million_handles(tmp_path: pathlib.Path) -> None:
    with inside(tmp_path / "broker", handles=50, leases=10, names=5) as broker:
        with quire.connect(broker.path) as client, quire.connect(broker.path) as other:
            handle, lease = client.memory(PAGE)
            for number in range(5):
                client.publish(handle, f"name {number}")
            with pytest.raises(quire.QuotaExceeded, match="5 names"):
                client.publish(handle, "one more")
            leases = [client.lease(handle) for _ in range(9)]
            with pytest.raises(quire.QuotaExceeded, match="10 leases"):
                client.lease(handle)
            assert len(leases) == 9
            for _ in range(48):
                client.weaken(handle, Rights.READ)
            with pytest.raises(quire.QuotaExceeded, match="50 handles"):
                client.weaken(handle, Rights.READ)
            for _ in range(100):
                other.close_handle(other.open("name 1"))
            lease.close()
        assert broker.audit() == []


def test_too_many_connections_of_one_user(tmp_path: pathlib.Path) -> None:
    with inside(tmp_path / "broker", connections=4) as broker:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(quire.connect(broker.path)) for _ in range(4)]
            extra = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            extra.connect(broker.path)
            with extra:
                assert extra.recv(1) == b""
            clients[0].ping()
        with quire.connect(broker.path) as again:
            again.ping()


def test_coming_and_going_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with inside(tmp_path / "broker", connections=2) as broker:
        for _ in range(50):
            Raw(broker.path).sock.close()
        broker.wait(lambda world: not world.sessions)
        refused = 0
        for _ in range(8):
            raw = Raw(broker.path)
            if isinstance(raw.welcome, protocol.Fault):
                assert raw.welcome.fault == "quota"
                refused += 1
            else:
                # Something that it may come back for.
                raw.ask(protocol.Weaken(2, raw.welcome.bank, 1))
            raw.sock.close()
            broker.wait(lambda world: not any(each.port for each in world.sessions.values()))
        assert refused == 4


def test_who_may_not_connect_is_sent_away(tmp_path: pathlib.Path) -> None:
    with (
        inside(tmp_path / "broker", users=[54321]) as broker,
        pytest.raises(OSError, match=r"broker|reset|peer|pipe"),
    ):
        quire.connect(broker.path, timeout=0.2)


def test_a_flood_is_read_slowly_and_others_are_served(tmp_path: pathlib.Path) -> None:
    """What one may ask in a second is bounded, so a loop of mapping and unmapping takes no turn of others."""
    with inside(tmp_path / "broker", rate=2000) as broker, quire.connect(broker.path) as client:
        raw = Raw(broker.path)
        raw.sock.setblocking(False)
        frame = protocol.encode(protocol.Ping(1)) * 100
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                with contextlib.suppress(BlockingIOError):
                    raw.sock.send(frame)
                with contextlib.suppress(BlockingIOError):
                    raw.sock.recv(1 << 16)

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for _ in range(200):
                client.ping()
            served = broker.do(lambda: [each._rate._left for each in broker.server._connections])
            assert min(served) < 0, "the flood was not slowed down"
        finally:
            stop.set()
            thread.join()
            raw.sock.close()


def test_a_lease_is_not_cut_into_crumbs(broker, owner) -> None:
    """Each part stands in the journal with every change: a loop over every other page would be quadratic."""
    handle, _ = owner.memory(1024 * PAGE)
    owner.publish(handle, "memory")
    raw = Raw(broker.path)
    opened = raw.ask(protocol.Open(2, "memory"))
    lease = raw.ask(protocol.Lease(3, opened.handle, 0, 1024 * PAGE)).lease
    given = [
        type(raw.ask(protocol.Release(4 + page, lease, page * PAGE, PAGE))) for page in range(1, 1023, 2)
    ]
    assert given == [protocol.Done] * 127 + [protocol.Fault] * 384
    assert len(broker.do(lambda: broker.server.world.leases[lease].spans)) == 128
    # All of it can be given back all the same.
    assert isinstance(raw.ask(protocol.Release(2000, lease, 0, protocol.WHOLE)), protocol.Done)
    assert broker.do(lambda: lease not in broker.server.world.leases)


def test_a_lender_does_not_cut_leases_into_crumbs(broker, owner) -> None:
    handle, _ = owner.memory(1024 * PAGE)
    owner.publish(handle, "memory")
    with children(broker.path, 1) as (child,):
        child("l = c.lease(c.open('memory'))")
        for page in range(1, 511, 2):
            owner.revoke(handle, page * PAGE, PAGE, deadline_ms=5000)
        with pytest.raises(quire.QuotaExceeded, match="larger range"):
            owner.revoke(handle, 513 * PAGE, PAGE, deadline_ms=5000)
        assert child("len(l.held)") == 256
        (outcome,) = owner.revoke(handle, deadline_ms=5000).outcomes
        assert outcome.result == "released"
        assert child("l.held") == []


def test_who_leaves_thousands_of_objects_lets_others_be_served_meanwhile(broker, owner) -> None:
    """An end is not one long step: between two parts of it others have their turn."""
    with quire.connect(broker.path) as leaving:
        for _ in range(1000):
            leaving.make_factory()
        session = leaving.number
        seen: list[int] = []

        def look() -> None:
            held = broker.server.world.sessions.get(session)
            seen.append(len(held.grips) if held is not None else 0)
            if seen[-1]:
                broker.loop.call_soon(look)

        broker.do(look)
    broker.wait(lambda world: session not in world.sessions)
    assert len({each for each in seen if 0 < each < 1001}) > 10, seen[-10:]
    owner.ping()


def test_mapping_and_unmapping_in_a_loop_disturbs_nobody(broker, owner) -> None:
    """The attack that physmem could not answer: others keep every page, and see no fault."""
    handle, _ = owner.memory(4 * MIB)
    owner.publish(handle, "memory")
    with children(broker.path, 2) as (hostile, other):
        other("l = c.lease(c.open('memory')); a = l.array('u1'); s = int(a[::4096].sum())")
        other("faults()")
        own = -other("faults()") + other("faults()")
        hostile.begin("h = c.open('memory')\nfor _ in range(300): c.lease(h).close()")
        before = other("faults()")
        hostile.end()
        assert other("int(a[::4096].sum())") == 0
        assert other("faults()") - before <= 2 * own + 16


def test_who_does_not_read_is_cut_off_and_holds_no_descriptors(broker, owner) -> None:
    handle, _ = owner.memory(MIB, extent_bytes=64 * PAGE)
    owner.publish(handle, "memory")
    before = descriptor_count()
    raw = Raw(broker.path)
    opened = raw.ask(protocol.Open(2, "memory"))
    raw.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        for number in range(100_000):
            raw.send(protocol.Lease(3 + number % 1000, opened.handle, 0, MIB))
    for _ in range(50):
        owner.ping()
    # What waits in its queue counts against the broker's user, so there is little of it.
    assert broker.do(lambda: max(each._in_flight for each in broker.server._connections)) <= 128
    raw.sock.close()
    session = raw.welcome.client
    # The process lives, so what it was lent stays entered until it ends.
    broker.wait(lambda world: world.sessions[session].port is None)
    broker.do(lambda: broker.server._ended(broker.server.world.sessions[session]))
    broker.wait(lambda world: len(world.leases) == 1)
    kept = broker.do(lambda: len(broker.server.world.readers))
    assert kept == 4
    until(lambda: descriptor_count() <= before + kept + 2)


def test_acknowledging_what_was_not_asked(broker, owner) -> None:
    raw = Raw(broker.path)
    handle, _ = owner.memory(PAGE)
    owner.publish(handle, "memory")
    with children(broker.path, 1) as (child,):
        child("l = c.lease(c.open('memory'))")
        child.stop()
        for serial in range(50):
            raw.send(protocol.Acknowledge(serial))
        raw.ask(protocol.Ping(3))
        (outcome,) = owner.revoke(handle, client=owner.holders(handle)[1].client, deadline_ms=20).outcomes
        assert outcome.result == "cut"
    raw.sock.close()


def test_a_session_is_not_taken_over(broker, owner) -> None:
    with children(broker.path, 1) as (child,):
        token = child("list(c._link._token)")
        raw = Raw(broker.path, hello=False)
        # The right secret, of another process.
        assert raw.ask(protocol.Hello(1, 1, bytes(token))).resumed is False
        raw.sock.close()
        raw = Raw(broker.path, hello=False)
        assert raw.ask(protocol.Hello(1, 1, b"x" * 32)).resumed is False
        raw.sock.close()
        child("c.ping()")
    owner.ping()


def test_dying_at_any_point(broker, owner) -> None:
    """A client that is killed in the middle of what it does loses what is its own."""
    handle, _ = owner.memory(MIB)
    owner.publish(handle, "memory")
    program = """
h = c.open('memory')
while True:
    x = c.memory(2**20); l = c.lease(h); c.destroy(x[0]); l.close()
"""
    with children(broker.path, 4) as clients:
        for child in clients:
            child.begin(program)
        for child in clients:
            for _ in range(20):
                owner.ping()
            child.process.kill()
            child.process.wait()
        broker.wait(lambda world: len(world.sessions) == 1)
        broker.wait(lambda world: len(world.objects) == 1)
    assert owner.describe(owner.bank).used[0] == MIB


def test_a_stopped_client_costs_others_nothing(broker, owner) -> None:
    with children(broker.path, 1) as (child,):
        child("f = c.make_factory(); c.publish(f, 'factory')")
        factory = owner.open("factory")
        owner.subscribe(factory, lambda _version: None)
        child.stop()
        for _ in range(100):
            owner.ping()
        os.kill(child.pid, signal.SIGCONT)
        child("c.ping()")


def test_the_broker_runs_out_of_descriptors(broker) -> None:
    with quire.connect(broker.path) as client:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
        filling = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    filling.append(os.dup(0))
            for _ in range(4):
                os.close(filling.pop())
            with pytest.raises(OSError, match="Too many open files"):
                client.make(8 * PAGE, extent_bytes=PAGE)
        finally:
            for each in filling:
                os.close(each)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client.ping()
        assert client.describe(client.bank).used == [0, 0, 0]


def test_a_user_with_many_clients_has_no_more_handles(tmp_path: pathlib.Path) -> None:
    """Each session has a handle of its user's bank; those count, and are never refused."""
    with inside(tmp_path / "broker", handles=20, user_handles=30) as broker:
        with quire.connect(broker.path) as owner, quire.connect(broker.path) as first:
            handle, _ = owner.memory(PAGE)
            owner.publish(handle, "memory")
            opened = [first.open("memory") for _ in range(19)]
            with pytest.raises(quire.QuotaExceeded, match="a client holds 20"):
                first.open("memory")
            with quire.connect(broker.path) as second:
                more = [second.open("memory") for _ in range(7)]
                assert broker.do(lambda: dict(broker.server.world.handles)) == {os.geteuid(): 30}
                for client in (second, owner):
                    with pytest.raises(quire.QuotaExceeded, match="the clients of a user hold 30"):
                        client.weaken(client.bank, Rights.READ)
                    with pytest.raises(quire.QuotaExceeded, match="the clients of a user hold 30"):
                        client.memory(PAGE)
                with quire.connect(broker.path) as third:
                    third.ping()
                first.close_handle(opened[0])
                more.append(second.open("memory"))
                assert len(more) == 8
            owner.weaken(handle, Rights.READ)
        broker.wait(lambda world: not world.handles)
        assert broker.audit() == []


def test_a_child_that_keeps_the_socket_does_not_keep_the_session(broker, owner) -> None:
    with children(broker.path, 1) as (child,):
        # The child has a copy of every descriptor that the library would close in it.
        grandchild = child(
            "(lambda kept: (lambda pid: pid or [signal.pause() for _ in iter(int, 1)])(os.fork()))"
            "([os.dup(c._link._sock.fileno())])"
        )
        number = child("(c.memory(2**20), c.number)[1]")
        assert owner.describe(owner.bank).used[0] == MIB
    broker.wait(lambda world: number not in world.sessions and not world.objects)
    assert owner.describe(owner.bank).used == [0, 0, 0]
    os.kill(grandchild, signal.SIGKILL)
