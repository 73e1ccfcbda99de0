"""The broker is killed at every step of every message, and nobody loses anything."""

import contextlib
import os
import pathlib
import signal
import struct
import textwrap
import zlib
from collections.abc import Callable

import numpy as np
import psutil
import pytest
from brokers import Child, children, daemon, until
from support import PAGE, pattern, run_script
from test_broker_revocation import LIAR, outcomes

import quire
from quire.broker.journal import Journal, replay
from quire.broker.keeper import Keeper
from quire.broker.protocol import Rights

MIB = 1 << 20
SIZE = 2 * MIB


class Scene:
    """A broker, two children that stay, and what is done to them again and again."""

    def __init__(
        self, path: pathlib.Path, folder: pathlib.Path, guardian: int, liar: Child, other: Child
    ) -> None:
        self.path, self.folder, self.guardian = path, folder, guardian
        self.liar, self.other = liar, other
        self.liar(LIAR)
        segment = quire.Segment(8 * PAGE)
        segment.array("u1")[:] = pattern(8 * PAGE, 2)
        first = segment.snapshot()
        segment.array("u1")[:PAGE] = 1
        self.segment, self.snapshots = segment, [first, segment.snapshot()]

    def lend(self) -> None:
        """Memory, leases, a revocation by force and one without."""
        with quire.connect(self.path) as c:
            bank = c.make_bank(8 * MIB)
            handle, lease = c.memory(SIZE, bank=bank, extent_bytes=MIB)
            data = pattern(SIZE, 6)
            with lease.writing() as rw:
                rw[:] = data
            c.publish(handle, "memory", Rights.READ)
            for child in (self.liar, self.other):
                child("h = c.open('memory'); l = c.lease(h); a = l.array('u1')")
            assert len(c.holders(handle)) == 3
            taken = c.revoke(handle, MIB, client=self.liar("c.number"), deadline_ms=2000)
            assert outcomes(taken) in ({self.liar("c.number"): "cut"}, {}), taken
            with lease.writing() as rw:
                rw[MIB + 7] = 77
            data[MIB + 7] = 77
            self.other(f"assert int(a[{MIB + 7}]) == 77 and int(a.sum()) == {int(data.sum())}")
            assert np.array_equal(lease.array("u1"), data)
            c.revoke(handle, client=self.other("c.number"), deadline_ms=2000)
            assert self.other("l.held") == []
            for child in (self.liar, self.other):
                child("l.close(); c.close_handle(h)")
            c.unpublish(handle, "memory")
            assert c.describe(bank).used == [SIZE, 1, 2]
            (found,) = [row for row in c.survey().banks if not row.name]
            c.limit_bank(c.administer(found.number), 2 * MIB)
            assert c.describe(bank).limit[0] == 2 * MIB
            c.destroy(bank)
            assert c.describe(c.bank).used == [0, 0, 0]
        self.check_nothing_is_held()

    def keep(self) -> None:
        """Snapshots, a factory, handles that are passed on."""
        with quire.connect(self.path) as c:
            c.ping()
            bank = c.make_bank(MIB)
            fetched = c.deposit(self.snapshots[0], bank=bank)
            c.fetch(fetched).close()
            token = c.export_fd(c.weaken(fetched, Rights.READ), Rights.READ)
            imported = c.import_fd(token)
            os.close(token)
            c.close_handle(imported)
            c.destroy(fetched)
            assert c.describe(bank).used == [0, 0, 0]
            factory = c.make_factory(bank=bank)
            for version, snapshot in enumerate(self.snapshots, 1):
                assert c.put(factory, snapshot, bank=bank) == version
            c.subscribe(factory, lambda _version: None)
            version, current, snapshot = c.current(factory)
            assert version == 2
            c.unsubscribe(factory)
            granted, again = c.grant(current)
            with snapshot.map() as one, again.map() as two, self.snapshots[1].map() as three:
                assert one[:] == two[:] == three[:]
            for each in (snapshot, again):
                each.close()
            assert c.describe(bank).used[0] == 0
            c.destroy(granted)
            c.destroy(bank)
            assert c.describe(c.bank).used == [0, 0, 0]
        self.check_nothing_is_held()

    def check_nothing_is_held(self) -> None:
        """Neither the broker nor its guardian has a memfd that nobody pays for."""

        def held() -> list[str]:
            found = []
            for process in (self.guardian, self.broker()):
                for name in os.listdir(f"/proc/{process}/fd"):
                    try:
                        target = os.readlink(f"/proc/{process}/fd/{name}")
                    except FileNotFoundError:
                        continue
                    if "memfd:" in target and "journal" not in target:
                        found.append(target)
            return found

        until(lambda: held() == [])

    def broker(self) -> int:
        found: list[psutil.Process] = []
        until(lambda: found.extend(psutil.Process(self.guardian).children()) or found)
        return found[0].pid

    def wait_for_another(self, broker: int) -> None:
        until(lambda: self.broker() != broker)

    def reached(self) -> list[str]:
        return (self.folder / "reached").read_text().split()


@pytest.fixture
def scene(tmp_path: pathlib.Path):
    path = tmp_path / "broker"
    environment = {"QUIRE_BROKER_CRASH_POINTS": str(tmp_path)}
    with (
        daemon(path, "--limit", "64M", environment=environment) as process,
        children(str(path), 2) as (liar, other),
    ):
        yield Scene(path, tmp_path, process.pid, liar, other)


@pytest.mark.timeout(300)
def test_killed_at_every_step_of_every_message(scene: Scene) -> None:
    points: dict[str, Callable[[], None]] = {}
    for act in (scene.lend, scene.keep):
        (scene.folder / "reached").write_text("")
        act()
        points |= dict.fromkeys(scene.reached(), act) | points
    names = {point.partition(":")[0] for point in points}
    messages = {kind.__name__.lower() for kind in quire.broker.protocol.Request.__subclasses__()}
    assert messages <= names, "the scenes leave a message out"
    assert {"commit:forgetting", "move:decided", "move:truncated", "reclaim:freed"} <= set(points)
    for point, act in sorted(points.items()):
        (scene.folder / "die-at").write_text(point)
        before = scene.broker()
        act()
        assert not (scene.folder / "die-at").exists(), f"{point} was not reached again"
        # The last step of a message comes when its client may be content already.
        scene.wait_for_another(before)


def test_clients_keep_what_they_have_while_nobody_is_there(scene: Scene) -> None:
    with quire.connect(scene.path) as c:
        handle, lease = c.memory(MIB)
        with lease.writing() as rw:
            rw[3] = 33
        array = lease.array("u1")
        os.kill(scene.broker(), signal.SIGKILL)
        assert array[3] == 33
        c.publish(handle, "still")
        with quire.connect(scene.path) as late:
            assert late.lease(late.open("still"))[3] == 33
        assert c.describe(c.bank).used[0] == MIB


def test_what_belonged_to_a_client_that_died_meanwhile_is_given_back(scene: Scene) -> None:
    scene.other("x = c.memory(2**20)")
    broker = scene.broker()
    os.kill(broker, signal.SIGSTOP)
    scene.other.process.kill()
    scene.other.process.wait()
    os.kill(broker, signal.SIGKILL)
    scene.check_nothing_is_held()


def test_a_torn_record_is_no_record() -> None:
    journal = Journal(Keeper(None), {})
    journal.put("a", 1)
    journal.commit()
    journal.put("b", 2)
    journal.put("a", None)
    journal.commit()
    data = os.pread(journal._descriptor, 1 << 16, 0)
    journal.close()
    seen = []
    for length in range(len(data) + 1):
        cut = os.memfd_create("cut")
        os.write(cut, data[:length])
        entries, at = replay(cut)
        assert at <= length
        if entries not in seen:
            seen.append(entries)
        os.close(cut)
    assert seen == [{}, {"a": 1}, {"b": 2}]
    flipped = bytearray(data)
    flipped[-1] ^= 1
    damaged = os.memfd_create("damaged")
    os.write(damaged, flipped)
    assert replay(damaged)[0] == {"a": 1}
    os.close(damaged)


def test_a_journal_is_written_anew_and_stays_bounded() -> None:
    journal = Journal(Keeper(None), {})
    for number in range(30_000):
        journal.put("key", ["x" * 100, number])
        journal.commit()
    assert os.fstat(journal._descriptor).st_size < 2 * MIB
    assert replay(journal._descriptor)[0] == {"key": ["x" * 100, 29_999]}
    journal.close()


def test_of_two_journals_the_newer_counts() -> None:
    def one(value: int) -> int:
        import msgspec

        payload = msgspec.msgpack.encode([["key", value]])
        descriptor = os.memfd_create("journal")
        os.write(descriptor, struct.pack("<II", len(payload), zlib.crc32(payload)) + payload)
        return descriptor

    journal = Journal(Keeper(None), {"journal.9": one(9), "journal.10": one(10)})
    assert journal.entries == {"key": 10}
    journal.close()


# The guardian


def memfds(process: int) -> set[int]:
    """The broker's memfds that a process has open."""
    found = set()
    for name in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(FileNotFoundError):
            path = f"/proc/{process}/fd/{name}"
            if "/memfd:quire" in os.readlink(path):
                found.add(os.stat(path).st_ino)
    return found


def next_guardian(broker: int) -> int:
    """Wait until a broker has started another guardian, and given it everything."""
    found: list[int] = []

    def given() -> bool:
        found[:] = [each.pid for each in psutil.Process(broker).children()]
        return bool(found) and memfds(found[0]) == memfds(broker)

    until(given)
    return found[0]


def only_child(process: int) -> int:
    """Wait until a process has a child."""
    found: list[psutil.Process] = []
    until(lambda: found.extend(psutil.Process(process).children()) or found)
    return found[0].pid


def kill(*processes: int) -> None:
    """Kill processes at the same moment."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            os.kill(process, number)


def test_a_guardian_that_is_killed_is_replaced_and_nothing_is_lost(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "broker"
    with daemon(path, "--limit", "64M") as process, quire.connect(path, timeout=60) as c:
        guardian, broker = process.pid, only_child(process.pid)
        handle, lease = c.memory(2 * MIB, extent_bytes=MIB)
        with lease.writing() as rw:
            rw[:] = pattern(2 * MIB, 3)
        c.publish(handle, "memory")
        with quire.Segment.from_buffer(pattern(8 * PAGE, 4)) as segment, segment.snapshot() as snapshot:
            deposited = c.deposit(snapshot)
        token = c.export_fd(deposited, Rights.READ)
        try:
            for _ in range(3):
                kill(guardian)
                if guardian == process.pid:
                    process.wait()
                # What is made meanwhile is handed over as well.
                made = c.memory(MIB)[0]
                guardian = next_guardian(broker)
                used = c.describe(c.bank).used
                kill(broker)
                broker = only_child(guardian)
                assert c.describe(c.bank).used == used
                c.destroy(made)
                assert np.array_equal(c.lease(c.open("memory")).array("u1"), pattern(2 * MIB, 3))
                assert np.array_equal(lease.array("u1"), pattern(2 * MIB, 3))
                with c.fetch(c.import_fd(token)) as fetched, fetched.map() as mapping:
                    assert mapping[:] == pattern(8 * PAGE, 4).tobytes()
        finally:
            os.close(token)
            c.close()
            os.kill(guardian, signal.SIGTERM)
            until(lambda: not psutil.pid_exists(broker) and not psutil.pid_exists(guardian))
    assert not path.exists()


def test_a_broker_whose_guardian_was_replaced_is_ended_by_a_signal(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "broker"
    with daemon(path) as process:
        broker = only_child(process.pid)
        process.kill()
        process.wait()
        guardian = next_guardian(broker)
        os.kill(broker, signal.SIGTERM)
        until(lambda: not psutil.pid_exists(broker) and not psutil.pid_exists(guardian))
    assert not path.exists()


def test_broker_and_guardian_killed_at_once_leave_clients_what_they_map(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "broker"
    with daemon(path) as process:
        c = quire.connect(path, timeout=5)
        handle, lease = c.memory(MIB)
        with lease.writing() as rw:
            rw[5] = 55
        kill(process.pid, only_child(process.pid))
        array = lease.array("u1")
        assert array[5] == 55
        with pytest.raises(quire.Revoked, match="broker"):
            c.describe(handle)
        assert array[5] == 55
    # The file of the socket is left; the next broker takes its place, and has nothing.
    left = path.stat().st_ino
    with daemon(path):
        until(lambda: path.stat().st_ino != left)
        c = quire.connect(path)
        assert c.describe(c.bank).used == [0, 0, 0]
        c.close()
    assert array[5] == 55


def test_a_broker_that_dies_again_and_again_by_itself_is_given_up() -> None:
    script = """
        import os, socket, sys
        from quire.broker.guardian import Guardian
        lines = []
        dies = [sys.executable, "-c", "import os; os.kill(os.getpid(), 6)"]
        with socket.socket(socket.AF_UNIX) as listener:
            status = Guardian(listener, dies, lines.append).run()
        print(status, len(lines), lines[-1])
    """
    printed = run_script(textwrap.dedent(script))
    assert printed.strip() == "1 6 crashed 5 times in a row"
