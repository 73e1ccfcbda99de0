"""Functions as sources: how they reach the helper, and everything that can go wrong there."""

# Functions need not look at what they are asked for.
# ruff: noqa: ARG001

import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import fills
import pytest
from support import fork, nothing_left, run_forked, run_script, wait

import quire
from quire import functions

PAGE = quire.PAGE_SIZE
MIB = 1 << 20


@pytest.fixture
def forked_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if neither pickle nor cloudpickle could do it."""
    monkeypatch.setattr(functions, "_pickled", lambda _fill: (None, False))


def source(fill: Callable[[int, int], bytes], size: int = MIB, **options: float) -> quire.FunctionSource:
    return quire.FunctionSource(fill, size, **options)  # type: ignore[arg-type]


def process_of(made: quire.FunctionSource) -> int:
    return int.from_bytes(made.read(0, 8), "little")


def wait_gone(pid: int) -> None:
    """Wait until a process that is no child of ours has ended; it may be a zombie of whoever reaps it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], 30)[0], f"process {pid} is still there"
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("length", [0, 1, 7, PAGE, MIB])
def test_by_reference(length: int) -> None:
    with source(fills.numbered) as made:
        assert made.read(3 if length < MIB else 0, length) == fills.numbered(3 if length < MIB else 0, length)


def test_more_than_a_slot_is_several_requests() -> None:
    size = 9 * MIB + 5
    with source(fills.numbered, size) as made:
        assert made.read() == fills.numbered(0, size)


def test_closures_by_value() -> None:
    pytest.importorskip("cloudpickle")
    data = os.urandom(MIB)
    with source(lambda offset, length: data[offset : offset + length]) as made:
        assert made.read(5, 1000) == data[5:1005]


def test_what_cannot_be_pickled_is_forked(tmp_path: pathlib.Path) -> None:
    (tmp_path / "data").write_bytes(bytes(range(256)) * 16)
    lock = threading.Lock()
    with open(tmp_path / "data", "rb") as file:

        def fill(offset: int, length: int) -> bytes:
            with lock:
                return os.pread(file.fileno(), length, offset)

        with source(fill, PAGE) as made:
            assert made.read(1, 300) == (bytes(range(256)) * 2)[1:301]


def test_in_a_script(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import quire\n"
        "def fill(offset, length):\n    return __name__.encode().ljust(length)\n"
        "if __name__ == '__main__':\n    print(quire.FunctionSource(fill, 20).read().decode())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "__mp_main__"


def test_in_a_script_without_a_guard(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import quire\n"
        "def fill(offset, length):\n    return bytes(length)\n"
        "quire.FunctionSource(fill, 20).read()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=60)
    assert "PageError: fill: the helper process cannot begin" in done.stderr
    assert "if __name__" in done.stderr


def test_in_code_without_a_file() -> None:
    out = run_script(
        "import quire\ndef fill(o, n): return bytes([7]) * n\nprint(quire.FunctionSource(fill, 9).read())"
    )
    assert out.strip() == repr(bytes([7]) * 9)


MISTAKES = [
    (fills.too_little, "the function failed at byte 8: it returned 15 bytes where 16 were asked for"),
    (fills.too_much, "the function failed at byte 8: it returned 17 bytes where 16 were asked for"),
    (fills.no_bytes, "the function failed at byte 8: it returned int, not contiguous bytes"),
    (fills.raises, "the function failed at byte 8: ValueError: two lines"),
    (fills.exits, "the function failed at byte 8: SystemExit: 3"),
]


@pytest.mark.parametrize(("fill", "message"), MISTAKES)
@pytest.mark.parametrize("forked", [False, True])
def test_mistakes(
    fill: Callable[[int, int], bytes], message: str, forked: bool, request: pytest.FixtureRequest
) -> None:
    if forked:
        request.getfixturevalue("forked_helper")
    with source(fill) as made:
        for _ in range(2):
            with pytest.raises(quire.PageError) as raised:
                made.read(8, 16)
            assert str(raised.value) == f"{fill.__name__}: {message}"


@pytest.mark.parametrize("forked", [False, True])
def test_a_function_that_always_crashes(forked: bool, request: pytest.FixtureRequest) -> None:
    if forked:
        request.getfixturevalue("forked_helper")
    with source(fills.crashes) as made, pytest.raises(quire.PageError, match=r"helper process died.*5 times"):
        made.read(0, 8)


@pytest.mark.parametrize("forked", [False, True])
def test_a_crash_is_not_seen(forked: bool, tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> None:
    if forked:
        request.getfixturevalue("forked_helper")
    with source(fills.CrashesOnce(str(tmp_path / "flag"))) as made:
        assert made.read(16, 100) == fills.numbered(16, 100)


def test_a_crash_harms_only_its_own_request() -> None:
    with source(fills.crashes_at_zero, parallel=8) as made, ThreadPoolExecutor(8) as pool:
        crashing = pool.submit(made.read, 0, 8)
        others = [pool.submit(made.read, at * PAGE, 8) for at in range(1, 40)]
        assert {other.result() for other in others} == {bytes([1]) * 8}
        with pytest.raises(quire.PageError, match="died"):
            crashing.result()


@pytest.mark.parametrize("forked", [False, True])
def test_killed_between_and_started_again(forked: bool, request: pytest.FixtureRequest) -> None:
    if forked:
        request.getfixturevalue("forked_helper")
    with source(fills.process_id) as made:
        first = process_of(made)
        os.kill(first, signal.SIGKILL)
        wait_gone(first)
        assert process_of(made) != first


def test_a_function_that_hangs_is_killed(tmp_path: pathlib.Path) -> None:
    flag = tmp_path / "pid"

    def fill(offset: int, length: int) -> bytes:
        if offset == 0:
            flag.write_text(str(os.getpid()))
            threading.Event().wait()
        return bytes(length)

    with source(fill, timeout=3) as made:
        with pytest.raises(quire.PageError, match=r"timed out.*no answer within 3s"):
            made.read(0, 8)
        wait_gone(int(flag.read_text()))
        assert made.read(8, 8) == bytes(8)


@pytest.mark.usefixtures("forked_helper")
def test_without_the_fork_that_has_the_function_there_is_no_other() -> None:
    def fill(offset: int, length: int) -> bytes:
        return b"%8d%8d" % (os.getppid(), os.getpid())

    with source(fill) as made:
        answer = made.read(0, 16)
        for pid in (int(answer[:8]), int(answer[8:])):
            os.kill(pid, signal.SIGKILL)
            wait_gone(pid)
        with pytest.raises(quire.PageError, match=r"cannot be started.*the function is gone"):
            made.read(0, 16)


@pytest.mark.parametrize("forked", [False, True])
def test_close_ends_the_helper_and_leaves_nothing(forked: bool, request: pytest.FixtureRequest) -> None:
    if forked:
        request.getfixturevalue("forked_helper")
    with nothing_left():
        made = source(fills.process_id)
        pid = process_of(made)
        made.close()
        wait_gone(pid)
        with pytest.raises(ValueError, match="closed"):
            made.read(0, 8)


CHILDLESS = """
import os, signal, sys, fills, quire
from quire import functions
if sys.argv[1] == "forked":
    functions._pickled = lambda fill: (None, False)
source = quire.FunctionSource(fills.process_id, 16)
signal.signal(signal.SIGCHLD, lambda *_: os._exit(3))
helper = lambda: int.from_bytes(source.read(0, 8), "little")
os.kill(helper(), signal.SIGKILL)
helper()
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no children")
"""


@pytest.mark.parametrize("kind", ["program", "forked"])
def test_no_child_and_no_signal(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILDLESS, kind],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "no children\n", "")


DYING = """
import sys, threading, fills, quire
from quire import functions
if sys.argv[1] == "forked":
    functions._pickled = lambda fill: (None, False)
source = quire.FunctionSource(fills.busy, 16)
print(int.from_bytes(source.read(0, 8), "little"), flush=True)
if sys.argv[2] == "busy":
    threading.Thread(target=source.read, args=(8, 8), daemon=True).start()
else:
    print("idle", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("kind", ["program", "forked"])
def test_nothing_is_left_of_a_killed_program(kind: str, state: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", DYING, kind, state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    )
    with program:
        assert program.stdout
        pid = int(program.stdout.readline())
        assert program.stdout.readline().strip() == state
        os.kill(pid, 0)
        program.kill()
        wait_gone(pid)


@pytest.mark.parametrize("forked", [False, True])
def test_a_forked_child_is_served(forked: bool, request: pytest.FixtureRequest) -> None:
    if forked:
        request.getfixturevalue("forked_helper")
    with source(fills.numbered, 16 * MIB, parallel=4) as made, ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(made.read, at * PAGE, PAGE) for at in range(400)]

        def child() -> None:
            for at in range(500, 600):
                assert made.read(at * PAGE, PAGE) == fills.numbered(at * PAGE, PAGE)
            made.close()

        children = [fork(child) for _ in range(3)]
        for at, read in enumerate(reads):
            assert read.result() == fills.numbered(at * PAGE, PAGE)
        assert [wait(pid) for pid in children] == [0, 0, 0]
        assert made.read(0, 8) == fills.numbered(0, 8)


def test_a_forked_child_has_its_own_helper() -> None:
    with source(fills.process_id) as made:
        first = process_of(made)

        def child() -> None:
            assert process_of(made) != first

        run_forked(child)
        assert process_of(made) == first


def test_parallel() -> None:
    with source(fills.Meets(4), parallel=4) as made, ThreadPoolExecutor(4) as pool:
        for at, read in enumerate([pool.submit(made.read, at * 8, 8) for at in range(4)]):
            assert read.result() == (at * 8).to_bytes(8, "little")


def test_many_threads_while_others_hold_the_interpreter() -> None:
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            sum(range(1000))

    holders = [threading.Thread(target=busy) for _ in range(2)]
    for holder in holders:
        holder.start()
    try:
        with source(fills.numbered, parallel=2) as made, ThreadPoolExecutor(6) as pool:
            reads = {at: pool.submit(made.read, at * 64, 64) for at in range(60)}
            for at, read in reads.items():
                assert read.result() == fills.numbered(at * 64, 64)
    finally:
        stop.set()
        for holder in holders:
            holder.join()


@pytest.mark.parametrize("forked", [False, True])
def test_the_helper_has_no_other_descriptors(forked: bool, request: pytest.FixtureRequest) -> None:
    if forked:
        request.getfixturevalue("forked_helper")
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    pipe = os.readlink(f"/proc/self/fd/{theirs}")
    with source(fills.descriptors, PAGE) as made:
        assert pipe not in made.read().decode()
    os.close(ours)
    os.close(theirs)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="callable"):
        quire.FunctionSource(5, 10)  # type: ignore[arg-type]
    for options in (
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"parallel": 0},
        {"parallel": 65},
    ):
        with pytest.raises(ValueError, match="must be"):
            source(fills.numbered, **options)
    with pytest.raises(ValueError, match="negative"):
        source(fills.numbered, -1)
    with source(fills.numbered, 10) as made, pytest.raises(ValueError, match="outside"):
        made.read(5, 6)
