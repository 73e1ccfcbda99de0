"""What goes into a sandbox, what comes out, and what is left when code misbehaves."""

import ast
import contextlib
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from namespaces import with_mounts
from sandboxes import MODULES, PRELUDE, children, groups, nothing_of_it_left, skip_where_impossible

import quire
from quire.sandbox import answers, run, syscalls

MIB = 1 << 20


@pytest.fixture(scope="module")
def snapshot():
    with quire.Segment.from_buffer(np.arange(1000.0)) as segment, segment.snapshot() as taken:
        yield taken


@pytest.fixture(autouse=True)
def _nothing_left():
    skip_where_impossible()
    # The filter is compiled once; the library stays loaded.
    syscalls.program()
    with nothing_of_it_left():
        yield


# --- what comes out ---


def test_a_function_gets_read_only_arrays_and_returns_one(snapshot) -> None:
    def double(x):
        assert not x.flags.writeable
        print("doubled")
        return 2 * x.reshape(10, 100)

    with run(double, {"x": (snapshot, "f8", 1000)}) as result:
        assert result.snapshot is not None
        result.snapshot.verify()
        array = result.array()
        assert array.dtype == np.float64
        assert not array.flags.writeable
        assert array.shape == result.shape == (10, 100)
        assert (array.ravel() == 2 * np.arange(1000.0)).all()
        assert (result.stdout, result.stderr) == ("doubled\n", "")
        stats = (os.fstat(fd) for fd in result.snapshot._core.layer_fds())
        assert result.charged_bytes == sum(stat.st_blocks * 512 for stat in stats)
        assert result.usage.cpu_seconds > 0
        assert result.usage.peak_bytes >= array.nbytes
    assert array[9, 99] == 1998


def test_a_script_by_path_sees_bytes(snapshot, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text("result = bytes(x[8:16])")
    with run(script, {"x": snapshot}) as result:
        assert result.array().tobytes() == np.float64(1).tobytes()


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("result = None", None),
        ("pass", None),
        ("result = 1.5", 1.5),
        ("result = [[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ("result = x[:0]", []),
        ("import quire; result = quire.Segment.from_buffer(b'ab')", [97, 98]),
        ("import quire\ns = quire.Segment(2); s.snapshot(); s[0] = 7\nresult = s.snapshot()", [7, 0]),
    ],
)
def test_what_may_be_returned(code, value, snapshot) -> None:
    with run(code, {"x": snapshot}) as result:
        if value is None:
            assert result.snapshot is None
            with pytest.raises(ValueError, match="None"):
                result.array()
        else:
            assert result.array().tolist() == value


def test_threads_may_run_it_at_the_same_time(snapshot) -> None:
    sums: list[float] = []

    def work() -> None:
        with run("result = x.sum()", {"x": (snapshot, "f8", 1000)}) as result:
            sums.append(float(result.array()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [499500.0] * 2


def test_it_finds_modules_where_its_starter_does(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with run("import sys; print(sys.path)") as result:
        found = ast.literal_eval(result.stdout)
    assert found[: len(sys.path)] == [os.path.abspath(entry) for entry in sys.path]


def test_the_example_of_the_documentation(capsys) -> None:
    text = (pathlib.Path(__file__).parents[1] / "docs" / "sandbox.md").read_text("utf-8")
    example = text.partition("```python\n")[2].partition("```")[0]
    assert 5 < len(example.splitlines()) < 15
    exec(example, {})
    assert capsys.readouterr().out.startswith("[")


# --- what is refused before anything runs ---


@pytest.mark.parametrize(
    ("code", "inputs", "options", "error"),
    [
        (7, {}, {}, TypeError),
        ("", {"x": b"bytes"}, {}, TypeError),
        ("", {"no name": "snapshot"}, {}, ValueError),
        ("", {"x": ("snapshot", "f8", 1001)}, {}, ValueError),
        ("", {"x": ("snapshot", "O", 1)}, {}, ValueError),
        ("", {}, {"timeout": 0}, ValueError),
        ("", {}, {"timeout": float("inf")}, ValueError),
        ("", {}, {"limit_bytes": 1000}, ValueError),
        ("", {}, {"threads": 0}, ValueError),
        ("", {}, {"cpu_seconds": 0}, ValueError),
        ("", {}, {"imports": "os"}, TypeError),
    ],
)
def test_misuse(code, inputs, options, error, snapshot) -> None:
    def given(value):
        if isinstance(value, tuple):
            return (snapshot, *value[1:])
        return snapshot if value == "snapshot" else value

    with pytest.raises(error):
        run(code, {name: given(value) for name, value in inputs.items()}, **options)


def test_a_file_is_no_input(snapshot, tmp_path) -> None:
    snapshot.save(tmp_path / "saved")
    with quire.load(tmp_path / "saved") as loaded, pytest.raises(quire.NotImmutable):
        run("", {"x": loaded})


@pytest.mark.parametrize(
    ("imports", "message"),
    [(("no_such_module",), "No module named"), (("threads_at_import",), "has started threads")],
)
def test_imports_that_fail(imports, message, tmp_path, monkeypatch) -> None:
    (tmp_path / "threads_at_import.py").write_text(
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(quire.SandboxError, match=message) as caught:
        run("", imports=imports)
    assert caught.value.reason == "start"


# --- code that misbehaves ---

FRAME = "from quire import messages, transport\nfrom quire.sandbox import answers as forms\n"
LAYER = FRAME + (
    "answers().sendmsg([forms.encode(forms.Returned('|u1', [1]))])\n"
    "layer = os.memfd_create('x', os.MFD_ALLOW_SEALING)\n"
    "os.ftruncate(layer, 8192)\n"
)
SENT = "transport._send(answers(), messages.encode_snapshot([bytes(16)], ()), [layer], None, None)\n"
SEALED = "fcntl.fcntl(layer, fcntl.F_ADD_SEALS, 15)\n"

MISBEHAVIOUR = {
    "never returns": ("while True: pass", {"timeout": 0.5}, "timeout", "0.5 s"),
    "waits": ("threading.Event().wait()", {"timeout": 0.5}, "timeout", "0.5 s"),
    "holds the GIL": ("ctypes.PyDLL(None).sleep(1000)", {"timeout": 0.5}, "timeout", "0.5 s"),
    "uses too much time": ("while True: pass", {"cpu_seconds": 1}, "cpu", ""),
    "takes memory": ("b = bytearray(64 << 20)", {"limit_bytes": 16 * MIB}, "memory", "MemoryError"),
    "takes memory by threads": (
        (
            "threading.stack_size(8 << 20)\n"
            "for _ in range(50): threading.Thread(target=threading.Event().wait).start()"
        ),
        {"limit_bytes": 16 * MIB},
        "raised",
        "can't start new thread",
    ),
    "makes a large file": ("os.ftruncate(os.memfd_create('x'), 1 << 40)", {}, "raised", "File too large"),
    "makes many files": ("while True: os.memfd_create('x')", {}, "raised", "Too many open files"),
    "starts many threads": (
        "for _ in range(9): threading.Thread(target=threading.Event().wait).start()",
        {"threads": 8},
        "raised",
        "can't start new thread",
    ),
    "bombs": ("while True: os.fork()", {}, "raised", "PermissionError"),
    "exits": ("os._exit(3)", {}, "killed", "with 3"),
    "calls sys.exit": ("sys.exit(3)", {}, "raised", "SystemExit: 3"),
    "aborts": ("os.abort()", {}, "killed", "by SIG"),
    "crashes": ("ctypes.string_at(0)", {}, "killed", "SIGSEGV"),
    "raises what cannot be shown": (
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
        {},
        "raised",
        "its message raised ValueError",
    ),
    "raises much": ("raise ValueError('x' * 10**6 + '\\udcff')", {}, "raised", "ValueError: xxx"),
    "returns an object": ("result = object()", {}, "raised", "numbers and bytes"),
    "answers garbage": ("os.write(answers().fileno(), b'garbage' * 9999)", {}, "answer", "bytes long"),
    "answers nothing known": (
        "answers().sendmsg([struct.pack('<I', 3), b'\\xc1ab'])",
        {},
        "answer",
        "no message",
    ),
    "nests deeply": (
        "answers().sendmsg([struct.pack('<I', 16000), b'\\x91' * 16000])",
        {},
        "answer",
        "no message",
    ),
    "answers half": (
        "answers().sendmsg([struct.pack('<I', 30)])\nthreading.Event().wait()",
        {"timeout": 0.5},
        "timeout",
        "",
    ),
    "lies about items": (
        FRAME + "answers().sendmsg([forms.encode(forms.Returned('|O8', [1]))])",
        {},
        "answer",
        "'|O8'",
    ),
    "lies about the shape": (
        FRAME + "answers().sendmsg([forms.encode(forms.Returned('|u1', [-1]))])",
        {},
        "answer",
        "shape",
    ),
    "lies about the size": (
        FRAME + "import quire\nfrom quire import wire\n"
        "answers().sendmsg([forms.encode(forms.Returned('<f8', [1 << 40]))])\n"
        "wire.send(answers(), quire.Segment(4096).snapshot())",
        {},
        "answer",
        "8796093022208 bytes",
    ),
    "stalls before the snapshot": (LAYER + "threading.Event().wait()", {"timeout": 0.5}, "answer", "refused"),
    "sends unsealed memory": (LAYER + SENT, {}, "answer", "refused"),
    "sends sealed garbage": (LAYER + SEALED + SENT, {}, "answer", "refused"),
    "sends a socket": (LAYER + "layer = answers().fileno()\n" + SENT, {}, "answer", "refused"),
    "sends no descriptor": (LAYER + SENT.replace("[layer]", "[]"), {}, "answer", "refused"),
    "sends many descriptors": (
        LAYER + SEALED + SENT.replace("[layer]", "[layer] * 200"),
        {},
        "answer",
        "refused",
    ),
    "returns more than its limit": (
        "import quire\nresult = quire.Segment(64 << 20).snapshot()",
        {"limit_bytes": 16 * MIB},
        "answer|raised",
        "",
    ),
    "closes its socket": ("os.close(answers().fileno())", {}, "killed", "answered nothing"),
    "closes all and waits": (
        "os.closerange(0, 64)\nthreading.Event().wait()",
        {"timeout": 0.5},
        "timeout",
        "",
    ),
}


@pytest.mark.parametrize("what", MISBEHAVIOUR)
def test_misbehaviour(what) -> None:
    code, options, reason, message = MISBEHAVIOUR[what]
    with pytest.raises(quire.SandboxError) as caught:
        run(PRELUDE + code, imports=(*MODULES, "quire.sandbox.answers"), **{"timeout": 20, **options})
    error = caught.value
    assert error.reason in reason.split("|"), (str(error), error.stderr)
    assert message in str(error)
    assert len(str(error)) < 5000
    assert error.usage is not None
    if reason in ("timeout", "cpu") and "while True" in code:
        assert error.usage.cpu_seconds > 0


def test_memory_of_files_counts_where_there_is_a_cgroup() -> None:
    code = PRELUDE + (
        "kept = []\n"
        "for _ in range(10):\n"
        "    kept.append(os.memfd_create('x'))\n"
        "    os.write(kept[-1], bytes(4 << 20))\n"
    )
    try:
        with run("", exact=True) as result:
            assert result.usage.exact
    except quire.Unsupported as error:
        pytest.skip(str(error))
    with pytest.raises(quire.SandboxError) as caught:
        run(code, imports=MODULES, limit_bytes=16 * MIB)
    assert caught.value.reason == "memory"
    assert 12 * MIB < caught.value.usage.peak_bytes <= 16 * MIB


def test_output_is_cut_and_nobody_waits_for_it() -> None:
    result = run("import sys\nprint('x' * 10**6)\nsys.stderr.write('\\udcff' * 3)")
    assert result.stdout == "x" * (64 << 10)
    assert len(result.stderr) < 100


# --- the starter's end, and the watcher's ---

LOOP = "from quire.sandbox import run; run('while True: pass', timeout=100)"


def _of_sandbox(pid: int | str) -> int:
    """Wait until a process has a child that is one of a sandbox: its pid."""
    while True:
        for child in children(pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"quire.sandbox.program" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        os.sched_yield()


def _shut(pid: int) -> None:
    """Wait until a process has shut its doors: it is nobody and filtered."""
    status = pathlib.Path(f"/proc/{pid}/status")
    while "Seccomp:\t2" not in status.read_text():
        os.sched_yield()


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(20_000))


def test_it_ends_with_its_starter() -> None:
    with subprocess.Popen([sys.executable, "-c", LOOP]) as starter:
        try:
            watcher = _of_sandbox(starter.pid)
            inner = _of_sandbox(watcher)
            _shut(inner)
            ends = os.pidfd_open(watcher), os.pidfd_open(inner)
        finally:
            starter.kill()
    try:
        assert all(_has_ended(end) for end in ends)
        assert not list(pathlib.Path("/sys/fs/cgroup").rglob(f"quire-sandbox-{starter.pid}-*"))
    finally:
        for end in ends:
            os.close(end)


def test_it_ends_with_its_watcher() -> None:
    failures: list[quire.SandboxError] = []

    def work() -> None:
        try:
            run("while True: pass", timeout=100)
        except quire.SandboxError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    watcher = _of_sandbox("self")
    inner = _of_sandbox(watcher)
    _shut(inner)
    end = os.pidfd_open(inner)
    os.kill(watcher, signal.SIGKILL)
    thread.join()
    assert _has_ended(end)
    os.close(end)
    # The watcher may not have passed on yet that the doors are shut.
    assert [failure.reason in ("killed", "start") for failure in failures] == [True]
    # Nobody else could: the one who removes it is dead.
    for group in groups():
        group.rmdir()


def test_as_a_user_who_is_root_of_nothing() -> None:
    """In a user namespace with one user, as unprivileged users start it."""
    printed = with_mounts("true", "from quire.sandbox import run; print(run('result = 6 * 7').array())")
    assert printed == "42\n"


def test_where_namespaces_are_forbidden() -> None:
    script = (
        "import quire, quire.sandbox\n"
        "try:\n    quire.sandbox.run('')\n"
        "except quire.Unsupported as error:\n    print(error)"
    )
    printed = with_mounts("echo 0 > /proc/sys/user/max_user_namespaces", script)
    assert "user.max_user_namespaces" in printed


def test_without_the_library() -> None:
    script = (
        "import sys; sys.modules['pyseccomp'] = None\n"
        "import quire, quire.sandbox\n"
        "try:\n    quire.sandbox.run('')\n"
        "except quire.Unsupported as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert "libseccomp" in done.stdout


# --- the message ---

NAMES = st.sampled_from(["type", "dtype", "shape", "kind", "message", "traceback"])
JSON = (
    st.none()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.sampled_from(["returned", "nothing", "raised", "<f8", "|O8", "x" * 3000])
    | st.lists(st.integers(-2, 1 << 48), max_size=40)
)


def test_answers_are_bounded() -> None:
    assert answers.MAX_BYTES > 3 * answers.MAX_TEXT
    body = answers.encode(answers.Raised("a", "b" * answers.MAX_TEXT, "c"))[answers.HEADER.size :]
    assert answers.decode(body) == answers.Raised("a", "b" * answers.MAX_TEXT, "c")
    with pytest.raises(quire.Malformed):
        answers.decode(answers.encode(answers.Raised("a", "b" * (answers.MAX_TEXT + 1), "c"))[4:])
    for cut in range(len(body)):
        with pytest.raises(quire.Malformed):
            answers.decode(body[:cut])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(JSON, lambda inner: st.dictionaries(NAMES, inner)).map(msgspec.msgpack.encode)
)
def test_any_bytes_are_an_answer_or_malformed(body) -> None:
    try:
        answer = answers.decode(body)
    except quire.Malformed:
        return
    assert isinstance(answer, answers.Answer)
    if isinstance(answer, answers.Returned):
        assert answers.item_bytes(answer) >= 0
