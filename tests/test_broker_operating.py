"""Operating a broker: its administrators, the commands, the screen, the log and the metrics."""

import asyncio
import contextlib
import io
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request

import msgspec
import psutil
import pytest
from brokers import Inside, daemon, inside, until
from prometheus_client.parser import text_string_to_metric_families
from support import PAGE
from textual.widgets import DataTable, Static, TabbedContent

import quire
from quire import cli
from quire.broker import config, events, metrics, protocol, rows
from quire.broker.protocol import Rights
from quire.commands.monitor import Monitor

MIB = 1 << 20
ROOT = pathlib.Path(__file__).parents[1]
NOBODY = 65534


@pytest.fixture
def quire_(broker: Inside, capsys: pytest.CaptureFixture[str]):
    """Run a command against the broker; its status, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main([*words, "--socket", broker.path])
        out, err = capsys.readouterr()
        return status, out, err

    return run


# Administrators


def test_everything_is_listed(owner, broker) -> None:
    handle, _ = owner.memory(2 * MIB + 5, extent_bytes=MIB)
    owner.publish(handle, "prices")
    bank = owner.make_bank(MIB)
    os.close(owner.export_fd(handle, Rights.READ))
    with quire.connect(broker.path) as other:
        other.lease(other.open("prices"), MIB, 5)
        found = owner.survey()
        by_number = {row.number: row for row in found.clients}
        mine, theirs = by_number[owner.number], by_number[other.number]
        assert (mine.pid, mine.uid, mine.connected) == (os.getpid(), os.getuid(), True)
        assert (mine.handles, mine.leases, mine.leased_bytes) == (3, 1, 2 * MIB + PAGE)
        assert (theirs.leases, theirs.leased_bytes) == (1, PAGE)
        assert mine.requests > theirs.requests > 0
        memory, token = found.objects
        assert (memory.kind, memory.name, memory.size_bytes) == ("memory", "prices", 2 * MIB + 5)
        assert (memory.leases, memory.clients) == (2, 2)
        assert token.kind == "token"
        assert [(row.object, row.client, row.write) for row in found.leases] == [
            (memory.number, owner.number, True),
            (memory.number, other.number, False),
        ]
        home = next(row for row in found.banks if row.number == mine.bank)
        assert home.used == owner.describe(owner.bank).used
        (below,) = [row for row in found.banks if row.parent == home.number]
        assert below.limit == owner.describe(bank).limit


def test_lists_are_longer_than_a_reply(owner) -> None:
    handles = [owner.make_factory() for _ in range(2 * rows.PAGE_ROWS + 1)]
    for index, handle in enumerate(handles):
        owner.publish(handle, f"{index:03}" + "x" * 252)
    found = owner.survey().objects
    assert [row.name[:3] for row in found] == [f"{index:03}" for index in range(len(handles))]


def test_a_lease_in_pieces_has_a_row_for_each(owner) -> None:
    pieces = 2 * rows.PAGE_ROWS
    handle, lease = owner.memory(2 * pieces * PAGE)
    for index in range(pieces):
        owner.revoke(handle, 2 * index * PAGE, PAGE, client=owner.number, deadline_ms=5000)
    lease_after, second = owner.lease(handle, 0, 1), owner.lease(handle, PAGE, 1)
    found = owner.survey().leases
    assert [row.offset for row in found[:pieces]] == [(2 * index + 1) * PAGE for index in range(pieces)]
    assert len(found) == pieces + 2
    for each in (lease, lease_after, second):
        each.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a client as another user")
def test_others_administer_nothing() -> None:
    # Another user must be able to reach the socket.
    with (
        tempfile.TemporaryDirectory() as folder,
        inside(pathlib.Path(folder) / "broker") as broker,
        quire.connect(broker.path) as owner,
    ):
        os.chmod(folder, 0o755)
        handle, _ = owner.memory(PAGE)
        number = owner.survey().objects[0].number
        for word in ("c.survey()", f"c.administer({number})", "c.administer(1)"):
            refused = refusal(broker.path, word)
            assert refused.startswith("PermissionError"), refused
        assert owner.describe(handle).kind == "memory"


def refusal(path: str, expression: str) -> str:
    """What a client of another user is answered; the program is read before the user is changed."""
    program = (
        "import os, sys; from quire import client\n"
        "os.setuid(int(sys.argv[2])); c = client.connect(sys.argv[1])\n"
        f"try: {expression}\nexcept Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path, str(NOBODY)], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_an_administrator_ends_but_does_not_look(owner, broker) -> None:
    handle, lease = owner.memory(PAGE)
    with quire.connect(broker.path) as root:
        given = root.administer(root.survey().objects[0].number)
        assert given.rights == Rights.LEND | Rights.DESTROY
        with pytest.raises(PermissionError):
            root.lease(given)
        with pytest.raises(PermissionError):
            root.weaken(given, Rights.READ)
        assert [each.client for each in root.revoke(given, deadline_ms=5000).outcomes] == [owner.number]
        assert lease.held == []
        root.destroy(given)
    with pytest.raises(LookupError):
        owner.describe(handle)


def test_the_brokers_own_banks_are_only_looked_at(owner) -> None:
    for row in owner.survey().banks:
        if row.name in ("root", "clients", "reserve"):
            given = owner.administer(row.number)
            assert given.rights == Rights.READ
            with pytest.raises(PermissionError):
                owner.limit_bank(given, 1)
            with pytest.raises(PermissionError):
                owner.destroy(given)


@pytest.mark.parametrize("number", [0, 10**6, 2**62])
def test_numbers_of_nothing(owner, number) -> None:
    with pytest.raises(LookupError):
        owner.administer(number)


def test_lists_of_nothing(owner) -> None:
    with pytest.raises(ValueError, match="can be listed"):
        owner._link.submit(protocol.List, {"what": "secrets"}).result()


def test_a_limit_is_never_below_what_is_used(owner) -> None:
    bank = owner.make_bank(4 * MIB)
    owner.make(MIB, bank=bank)
    with pytest.raises(quire.QuotaExceeded, match=str(MIB)):
        owner.limit_bank(bank, MIB - 1)
    owner.limit_bank(bank, MIB)
    with pytest.raises(quire.QuotaExceeded):
        owner.make(1, bank=bank)
    owner.limit_bank(bank, 2 * MIB)
    owner.make(MIB, bank=bank)
    with pytest.raises(PermissionError):
        owner.limit_bank(owner.weaken(bank, Rights.WRITE), MIB)
    with pytest.raises(PermissionError):
        owner.limit_bank(owner.bank, MIB)


def test_names_of_a_bank_end_with_it(owner) -> None:
    for _ in range(2):
        bank = owner.make_bank(MIB)
        owner.publish(bank, "shop", Rights.WRITE)
        owner.destroy(bank)
        with pytest.raises(LookupError):
            owner.open("shop")


# Commands


def test_ls(owner, quire_) -> None:
    handle, _ = owner.memory(MIB)
    owner.publish(handle, "prices\x1b[2J\u202e")
    status, out, _ = quire_("ls")
    assert status == 0
    assert "prices\\x1b[2J\\u202e" in out
    assert not re.search(r"[^\x20-\x7e\n\u2026]", out)
    assert [line.split()[0] for line in out.split("\n") if line[:1].isalpha()] == [
        "client", "bank", "object", "lease",
    ]  # fmt: skip
    status, out, _ = quire_("ls", "--json", "leases")
    assert json.loads(out)["leases"][0]["length"] == MIB
    status, _, err = quire_("ls", "secrets")
    assert status == 2
    assert "secrets" in err


def test_revoke(owner, broker, quire_) -> None:
    handle, lease = owner.memory(2 * MIB)
    owner.publish(handle, "prices")
    with quire.connect(broker.path) as other:
        lent = other.lease(other.open("prices"))
        status, out, _ = quire_(
            "revoke", "prices", "--client", str(other.number), "--offset", "1M", "--deadline", "5000"
        )
        assert status == 0
        # The broker of this test is in the client's process, of which it does not look at /proc.
        assert out.startswith(f"client {other.number}: acknowledged, 0x100000 and 1 MiB")
        assert lent.held == [(0, MIB)]
        assert lease.held == [(0, 2 * MIB)]
        number = owner.survey().objects[0].number
        status, out, _ = quire_("revoke", str(number), "--all", "--deadline", "5000")
        assert out.count("acknowledged") == 2
        assert lent.held == lease.held == []
        assert quire_("revoke", "prices", "--all")[:2] == (0, "nobody had it\n")
    for words, message in [
        (("prices", "--client", "999"), "no client 999"),
        (("prices", "--client", "0"), "client 0"),
        (("nothing", "--all"), "'nothing'"),
        ((str(owner.survey().banks[0].number), "--all"), "is a bank"),
    ]:
        status, out, err = quire_("revoke", *words)
        assert (status, out) == (1, "")
        assert message in err


def test_bank(owner, quire_) -> None:
    home = f"uid-{os.getuid()}"
    me = str(os.getuid())
    assert quire_("bank", "create", "shop", "--in", home, "--bytes", "4M", "--user", me)[0] == 0
    bank = owner.open("shop")
    assert owner.describe(bank).limit == [4 * MIB, *owner.describe(owner.bank).limit[1:]]
    handle = owner.make(2 * MIB, bank=bank)
    status, _, err = quire_("bank", "limit", "shop", "--bytes", "1M")
    assert status == 1
    assert "pays for" in err
    assert quire_("bank", "limit", "shop", "--bytes", "3M", "--objects", "7")[0] == 0
    assert owner.describe(bank).limit[:2] == [3 * MIB, 7]
    assert "shop" in quire_("bank", "list")[1]
    assert quire_("bank", "destroy", "shop")[1] == "2 MiB freed\n"
    with pytest.raises(LookupError):
        owner.describe(handle)
    for words, message in [
        (("destroy", home), "user"),
        (("destroy", "clients"), "lacks the right"),
        (("create", "x", "--in", "shop"), "'shop'"),
    ]:
        status, _, err = quire_("bank", *words)
        assert status == 1
        assert message in err


def test_a_bank_and_its_limit_survive_the_command_and_the_broker(tmp_path) -> None:
    path = tmp_path / "broker"
    home = f"uid-{os.getuid()}"
    with daemon(path) as process, quire.connect(path) as owner:
        for words in (
            ["bank", "create", "shop", "--in", home, "--bytes", "4M"],
            ["bank", "limit", home, "--bytes", "8M"],
        ):
            assert cli.main([*words, "--socket", str(path)]) == 0
        (running,) = psutil.Process(process.pid).children()
        running.kill()
        owner.ping()
        assert psutil.Process(process.pid).children() != [running]
        assert owner.describe(owner.bank).limit[0] == 8 * MIB
        assert owner.describe(owner.open("shop")).limit[0] == 4 * MIB


def test_destroying_something_else_as_a_bank(owner, quire_) -> None:
    handle, _ = owner.memory(PAGE)
    owner.publish(handle, "prices")
    status, _, err = quire_("bank", "destroy", "prices")
    assert (status, err) == (1, "quire bank: prices is no bank\n")
    assert owner.describe(handle).size_bytes == PAGE


@pytest.mark.parametrize("words", [["ls"], ["revoke", "x", "--all"], ["bank", "list"]])
def test_nobody_listens(tmp_path, capsys, words) -> None:
    assert cli.main([*words, "--socket", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


# The screen


def text_of(app: Monitor, what: str) -> list[list[str]]:
    table = app.query_one(f"#{what}-rows", DataTable)
    return [[str(cell) for cell in table.get_row_at(index)] for index in range(table.row_count)]


async def wait_until(pilot, condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await pilot.pause(0.02)


def test_top_shows_what_is_there_and_what_changes(owner, broker) -> None:
    handle, _ = owner.memory(MIB)
    owner.publish(handle, "prices[bold]")

    async def look() -> None:
        app = Monitor(broker.path, 0.1)
        async with app.run_test(size=(120, 30)) as pilot:
            await wait_until(pilot, lambda: len(text_of(app, "clients")) == 2)
            assert text_of(app, "clients")[0][0] == str(owner.number)
            await pilot.press("3")
            assert app.query_one("#tabs", TabbedContent).active == "objects"
            assert text_of(app, "objects")[0][2] == "prices[bold]"
            assert "objects 1" in str(app.query_one("#totals", Static).render())
            with quire.connect(broker.path) as other:
                other.lease(other.open("prices[bold]"))
                await wait_until(pilot, lambda: len(text_of(app, "leases")) == 2)
                assert len(text_of(app, "clients")) == 3
            await wait_until(pilot, lambda: len(text_of(app, "leases")) == 1)
            await wait_until(pilot, lambda: len(text_of(app, "clients")) == 2)
            stop = threading.Event()

            def ask() -> None:
                while not stop.is_set():
                    owner.ping()

            asking = threading.Thread(target=ask)
            asking.start()
            try:
                await wait_until(pilot, lambda: int(text_of(app, "clients")[0][-1]) > 10)
            finally:
                stop.set()
                asking.join()
            await pilot.press("space")
            assert "paused" in str(app.query_one("#trouble", Static).render())
            await pilot.press("q")
        assert app.return_code == 0

    asyncio.run(look())
    broker.wait(lambda world: len(world.sessions) == 1)


def test_top_waits_for_a_broker_that_is_not_there(tmp_path) -> None:
    path = tmp_path / "broker"

    async def look() -> None:
        app = Monitor(str(path), 0.1)
        async with app.run_test() as pilot:
            trouble = app.query_one("#trouble", Static)
            await wait_until(pilot, lambda: "no answer" in str(trouble.render()))
            broker = await asyncio.to_thread(Inside, path)
            try:
                await wait_until(pilot, lambda: text_of(app, "clients"))
                assert not trouble.display
            finally:
                await asyncio.to_thread(broker.close)
            await wait_until(pilot, lambda: trouble.display)

    asyncio.run(look())


# The log


def test_the_log_has_an_event_a_line(tmp_path) -> None:
    path = tmp_path / "broker"
    with daemon(path) as process:
        process.stderr, log = tmp_log(process)
        with quire.connect(path) as owner:
            number, bank = owner.number, owner.make_bank(4 * MIB)
            handle, lease = owner.memory(MIB, bank=bank)
            owner.publish(handle, "prices\n{}")
            owner.revoke(handle, client=number, deadline_ms=5000)
            lease.close()
        process.terminate()
        process.wait(20)
        lines = [json.loads(line) for line in log()]
    by_event = {line["event"]: line for line in lines}
    assert by_event["connected"]["client"] == number
    assert by_event["make"]["bank"] == by_event["makebank"]["bank"] != 0
    assert by_event["make"]["asked_size_bytes"] == MIB
    assert by_event["publish"]["asked_name"] == "prices\n{}"
    assert by_event["publish"]["object"] == by_event["make"]["object"]
    assert by_event["revoke"]["outcomes"][0]["result"] == "released"
    assert by_event["disconnected"]["pid"] == os.getpid()
    assert "lease" not in by_event
    for line in lines:
        assert {"time", "level", "event"} <= line.keys()
        assert "session" not in line
        assert "asked_session" not in line


def tmp_log(process):
    """Read the log in a thread; what the fixture reads afterwards is empty."""
    stream, lines = process.stderr, []
    reader = threading.Thread(target=lambda: lines.extend(stream.read().decode().splitlines()))
    reader.start()

    def log() -> list[str]:
        reader.join(20)
        stream.close()
        return lines

    return io.BytesIO(), log


def test_text_and_level(tmp_path) -> None:
    with open(tmp_path / "log", "wb") as stream:
        writer = events.start(stream.fileno(), form="text", level="warning")
        try:
            events._log.info("connected")
            events._log.warning(
                "connection closed by the broker", extra={"fields": {"pid": 5, "why": "a\nb"}}
            )
        finally:
            writer.stop()
            quiet()
    assert (tmp_path / "log").read_text() == (
        'quire broker: WARNING connection closed by the broker pid=5 why="a\\nb"\n'
    )


@pytest.mark.parametrize("blocking", [True, False])
def test_whoever_reads_the_log_slowly_stops_nobody(blocking) -> None:
    read, write = os.pipe()
    os.set_blocking(write, blocking)
    with open(read) as reader:
        writer = events.start(write, form="json", level="info", capacity=16)
        try:
            # Far more than a pipe holds, and nobody reads: this must return.
            for _ in range(4000):
                events._log.info("connected", extra={"fields": {"why": "x" * 100}})
            drained: list[str] = []
            draining = threading.Thread(target=lambda: drained.extend(reader))
            draining.start()
            until(lambda: not events._log.handlers[0].waiting)
            events._log.info("disconnected")
        finally:
            writer.stop()
            os.close(write)
            draining.join(20)
            quiet()
    told = [json.loads(line)["event"] for line in drained]
    assert told[-1] == "disconnected"
    lost = [int(event.split()[0]) for event in told if "events were lost" in event]
    assert sum(lost) + len(told) - len(lost) == 4001


def test_a_broker_whose_log_nobody_reads(tmp_path) -> None:
    path = tmp_path / "broker"
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x")
    os.set_blocking(write, True)
    process = subprocess.Popen([sys.executable, "-m", "quire", "broker", "--socket", path], stderr=write)
    try:
        until(path.exists, process)
        with quire.connect(path) as owner:
            (running,) = psutil.Process(process.pid).children()
            running.kill()
            owner.ping()
    finally:
        process.terminate()
        assert process.wait(20) == 0
        os.close(write)
        os.close(read)


def quiet() -> None:
    """Leave the logger as it was before a log was begun."""
    events._log.handlers.clear()
    events._log.propagate = True
    events._log.setLevel("NOTSET")


# Metrics


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def scraped(port: int) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return {
        (sample.name.removeprefix("quire_broker_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_say_what_the_broker_knows(tmp_path) -> None:
    path, port = tmp_path / "broker", free_port()
    with daemon(path, "--metrics", f"127.0.0.1:{port}", "--limit", "64M"), quire.connect(path) as owner:
        handle, _ = owner.memory(MIB)
        with pytest.raises(quire.QuotaExceeded):
            owner.make(65 * MIB)
        first = scraped(port)
        home = f"uid-{os.getuid()}"
        assert first["clients", "true"] == 1
        assert first["objects", "memory"] == 1
        assert first["bytes",] == first["bank_used", home, "bytes"] == MIB
        assert first["bank_limit", "clients", "bytes"] == 64 * MIB
        assert first["faults_total", "quota"] == 1
        assert first["requests_total", "make"] == 1
        owner.revoke(handle, client=owner.number, deadline_ms=5000)
        second = scraped(port)
        assert (first["leases",], second["leases",]) == (1, 0)
        assert second["outcomes_total", "released"] == 1


def test_a_port_that_is_taken(tmp_path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "quire", "broker", "--socket", str(tmp_path / "broker")),
                *("--metrics", f"127.0.0.1:{port}"),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert f"metrics on 127.0.0.1:{port}" in done.stderr
    assert not (tmp_path / "broker").exists()


@pytest.mark.parametrize("text", ["", "9000", ":9000", "host:", "host:x", "host:0", "host:65536"])
def test_bad_addresses(text) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        metrics.address(text)
    assert metrics.address("[::1]:9000") == ("::1", 9000)


# Configuration and example


@pytest.mark.parametrize("line", ['metrics = "x"', 'log_format = "xml"', 'log_level = "all"'])
def test_bad_configurations(tmp_path, line) -> None:
    (tmp_path / "config").write_text(line)
    with pytest.raises(ValueError, match="not"):
        config.load(tmp_path / "config")


def test_every_field_of_the_configuration_is_documented() -> None:
    text = (ROOT / "docs" / "broker.md").read_text("utf-8").split("## Configuration")[1].split("\n## ")[0]
    for struct in (config.Config, config.BankConfig):
        for field in msgspec.structs.fields(struct):
            assert f"`{field.name}`" in text, field.name


def test_the_example_lends_and_takes_back(tmp_path) -> None:
    path = tmp_path / "broker"
    with daemon(path):
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / "lending.py", path],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    lines = done.stdout.splitlines()
    assert lines[0] == "the script sees 65536.0"
    assert re.fullmatch(r"client \d+: (released|acknowledged)", lines[1])
    assert lines[2:] == ["the script has it no more", "the owner still sees 65536.0"]


def test_the_example_of_the_readme_runs_as_it_is(tmp_path: pathlib.Path) -> None:
    """In an empty folder, with an empty environment."""
    readme = (pathlib.Path(__file__).resolve().parents[1] / "README.md").read_text()
    section = readme.partition("Lending an array to a script that nobody trusts")[2]
    script = section.partition("```python\n")[2].partition("```")[0]
    with daemon(tmp_path / "broker.sock", "--limit", "64M"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, "")
    first, holders, outcomes, last = done.stdout.splitlines()
    assert first == "b'65536.0\\n'"
    assert holders.count("Holder(") == 2
    assert "result='released'" in outcomes
    assert last == "65536.0"
