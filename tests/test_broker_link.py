"""A client's connection: who reads, in which thread things happen, and what a signal handler leaves."""

import errno
import os
import pathlib
import queue
import signal
import threading
from collections.abc import Iterator

import pytest
from brokers import Child, Inside, children, inside, until
from support import PAGE, descriptor_count

import quire
from quire.broker.borrowed import Lease
from quire.broker.protocol import Rights
from quire.client import Client


@pytest.fixture
def broker(tmp_path: pathlib.Path) -> Iterator[Inside]:
    with inside(tmp_path / "broker") as running:
        yield running
        assert running.audit() == []


def woken(client: Client) -> int:
    """How often the client's thread went to sleep, and so was woken."""
    status = pathlib.Path(f"/proc/self/task/{client._link._thread.native_id}/status").read_text("ascii")
    return int(status.split("voluntary_ctxt_switches:")[1].split()[0])


def stuck(child: Child) -> None:
    """Have a child lease what was published, and stop it: a revocation waits for its deadline."""
    child("l = c.lease(c.open('memory'))")
    child.stop()


def test_who_waits_for_an_answer_reads_it_and_the_thread_sleeps_on(broker) -> None:
    with quire.connect(broker.path) as client:
        client.ping()
        before = woken(client)
        for _ in range(300):
            client.ping()
        assert woken(client) - before < 30
        assert not client._link._asked


def test_an_event_is_the_threads_although_somebody_else_reads_it(broker) -> None:
    """A callback never runs in the thread of whoever happens to wait, and does not wait for him."""
    with quire.connect(broker.path) as owner, quire.connect(broker.path) as client:
        handle, _ = owner.memory(PAGE)
        owner.publish(handle, "lent")
        mine, _ = client.memory(PAGE)
        client.publish(mine, "memory")
        lease = client.lease(client.open("lent"))
        called: list[int] = []
        lease.on_revoke(lambda _offset, _length: called.append(threading.get_ident()))
        with children(broker.path, 1) as (child,):
            stuck(child)
            waiting = threading.Thread(target=lambda: client.revoke(mine, deadline_ms=3000))
            waiting.start()
            until(client._link._reading.locked)
            (outcome,) = owner.revoke(handle, deadline_ms=2500).outcomes
            assert outcome.result in ("released", "acknowledged")
            assert called == [client._link._thread.ident]
            assert waiting.is_alive(), "the answer of the one who waits came first: nothing was shown"
            # Another thread is answered meanwhile, or behind it: requests are carried out in order.
            os.kill(child.pid, signal.SIGCONT)
            waiting.join()
        client.ping()


def test_a_reply_that_comes_behind_an_event_is_answered(broker) -> None:
    """The broker tells of the present version before it answers Subscribe: both come with one read."""
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    with quire.connect(broker.path) as client, quire.Segment(PAGE) as segment:
        factory = client.make_factory()
        segment[0] = 1
        with segment.snapshot() as snapshot:
            client.put(factory, snapshot)
        for _ in range(20):
            client.subscribe(factory, told.put)
            assert told.get(timeout=10) == 1
            client.unsubscribe(factory)


def test_many_threads_ask_at_once(broker) -> None:
    with quire.connect(broker.path) as client:
        handle = client.make(PAGE)
        failures: list[BaseException] = []

        def ask() -> None:
            try:
                for _ in range(50):
                    assert client.describe(handle).size_bytes == PAGE
                    client.close_handle(client.weaken(handle, Rights.READ))
                    lease = client.lease(handle, write=True)
                    lease.close()
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=ask) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not failures
        assert not client._link._asked


def test_a_fault_is_raised_to_who_reads(broker) -> None:
    with quire.connect(broker.path) as client:
        for _ in range(3):
            with pytest.raises(LookupError, match="no name"):
                client.open("nothing")
        client.ping()


def test_a_lease_that_cannot_be_mapped_is_given_back(broker, monkeypatch) -> None:
    """What the thread cannot finish is told to who asked, and the broker learns of it."""
    with quire.connect(broker.path) as client:
        handle = client.make(PAGE)

        def fail(_lease: Lease, _descriptors: list[int]) -> None:
            raise OSError(errno.ENOMEM, "mmap: no room")

        monkeypatch.setattr(Lease, "_map", fail)
        before = descriptor_count()
        for _ in range(3):
            with pytest.raises(OSError, match="no room"):
                client.lease(handle, write=True)
        client.ping()
        assert broker.do(lambda: not broker.server.world.leases)
        assert descriptor_count() <= before


class InterruptedHereError(Exception):
    """Raised by a signal handler."""


def test_a_signal_handler_that_raises_leaves_the_connection_usable(broker) -> None:
    """What it asked is carried out; its answer is taken by the thread and nobody else's is lost."""

    def handler(_number: int, _frame: object) -> None:
        raise InterruptedHereError

    with quire.connect(broker.path) as client, quire.connect(broker.path) as other:
        mine, _ = client.memory(PAGE)
        client.publish(mine, "memory")
        old = signal.signal(signal.SIGUSR1, handler)
        main = threading.get_ident()
        try:
            with children(broker.path, 1) as (child,):
                stuck(child)

                def interrupt() -> None:
                    until(lambda: client._link._reading.locked() and client._link._asked)
                    signal.pthread_kill(main, signal.SIGUSR1)

                thread = threading.Thread(target=interrupt)
                thread.start()
                with pytest.raises(InterruptedHereError):
                    client.revoke(mine, deadline_ms=400)
                thread.join()
                client.ping()
                until(lambda: not client._link._asked)
                assert not client._link._reading.locked()
                assert len(client.holders(mine)) == 1, "the revocation was not carried out"
                os.kill(child.pid, signal.SIGCONT)
        finally:
            signal.signal(signal.SIGUSR1, old)
        other.ping()


def test_a_signal_handler_that_raises_where_bytes_may_be_lost_makes_the_client_come_back(
    broker, monkeypatch
) -> None:
    with quire.connect(broker.path) as client:
        # Something to come back for.
        handle = client.make(PAGE)
        link = client._link
        sock = link._sock

        def raise_once(_payload: bytearray, _descriptors: list[int]) -> None:
            monkeypatch.undo()
            raise InterruptedHereError

        monkeypatch.setattr(link, "_take_plain", raise_once)
        with pytest.raises(InterruptedHereError):
            client.describe(handle)
        assert client.describe(handle).size_bytes == PAGE
        assert link._sock is not sock
        until(lambda: not link._asked)


def test_closing_leaves_no_descriptor(broker) -> None:
    with quire.connect(broker.path) as first:
        first.ping()
        before = descriptor_count()
        for _ in range(5):
            with quire.connect(broker.path) as client:
                client.ping()
        until(lambda: descriptor_count() <= before)


def test_closing_while_another_thread_waits(broker) -> None:
    owner = quire.connect(broker.path)
    mine, _ = owner.memory(PAGE)
    owner.publish(mine, "memory")
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            owner.revoke(mine, deadline_ms=60_000)
        except quire.Revoked as error:
            raised.append(error)

    with children(broker.path, 1) as (child,):
        stuck(child)
        thread = threading.Thread(target=wait)
        thread.start()
        until(owner._link._reading.locked)
        owner._link._closing.set()
        owner._link.close()
        thread.join(10)
        assert not thread.is_alive()
        assert len(raised) == 1
        os.kill(child.pid, signal.SIGCONT)
        # While memory is moved both copies are charged.
        broker.wait(lambda _world: not broker.server._busy)
