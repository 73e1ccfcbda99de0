"""Code in a sandbox reaches nothing that it was not given."""

import json
import os
import socket
import struct
import subprocess
import sys

import pytest
from sandboxes import ATTEMPTS, MODULES, PRELUDE, numbers, script, skip_where_impossible
from support import run_forked

import quire
import quire.sandbox
from quire.sandbox import kernel, syscalls

# What fails for another reason than that the call is not allowed.
OTHERWISE = {
    "see a file": "ENOENT",
    "see by an inherited directory": "EBADF",
    "use an inherited descriptor": "EBADF",
    "proc of the parent": "ENOENT",
    "clone3": "ENOSYS",
}
# What an ordinary program may do, of all users. If it did not succeed there, its refusal would show nothing.
ORDINARY = {
    "open a file",
    "list the root",
    "see a file",
    "open by an inherited directory",
    "use an inherited descriptor",
    "chdir",
    "its own memory through proc",
    "inet socket",
    "abstract Unix socket",
    "netlink socket",
    "socketpair",
    "pipe",
    "pidfd of the parent",
    "signal the parent",
    "limits of the parent",
    "System V shared memory",
    "System V messages",
    "shared anonymous memory",
    "executable memory",
    "inotify",
    "have the kernel signal",
}


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    skip_where_impossible()


@pytest.fixture(scope="module")
def facts():
    directory = os.open("/", os.O_RDONLY)
    os.set_inheritable(directory, True)
    name = f"\0quire-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen(100)
        yield {"directory": directory, "parent": os.getpid(), "abstract": name, **numbers()}
    os.close(directory)


@pytest.fixture(scope="module")
def inside(facts) -> dict[str, str]:
    result = quire.sandbox.run(script(set(ATTEMPTS), **facts), imports=MODULES)
    return json.loads(result.stdout)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_refused(inside, attempt) -> None:
    assert inside[attempt] == OTHERWISE.get(attempt, "EPERM")


def test_an_ordinary_process_may(facts) -> None:
    some = {name: code for name, code in ATTEMPTS.items() if name in ORDINARY}
    lines = [PRELUDE]
    for code in some.values():
        lines += [code.format(**facts)]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, close_fds=False, timeout=60)


def test_descriptors_environment_and_names() -> None:
    code = PRELUDE + (
        "found = []\n"
        "for fd in range(1024):\n"
        "    try: found.append(stat.S_IFMT(os.fstat(fd).st_mode))\n"
        "    except OSError: pass\n"
        "kinds = [stat.S_IFIFO] * 3 + [stat.S_IFSOCK]\n"
        "assert found == kinds, found\n"
        "assert os.getpid() == 1 and os.getppid() == 0 and os.getuid() == os.getgid() == 65534\n"
        "print(json.dumps(sorted(os.environ)))"
    )
    os.environ["QUIRE_TEST_SECRET"] = "secret"
    try:
        seen = set(json.loads(quire.sandbox.run(code, imports=MODULES).stdout))
    finally:
        del os.environ["QUIRE_TEST_SECRET"]
    assert seen <= {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LC_ALL", "LD_LIBRARY_PATH"}


def test_modules_cannot_be_imported_any_more() -> None:
    with pytest.raises(quire.SandboxError, match="ModuleNotFoundError"):
        quire.sandbox.run("import sqlite3")


def test_inputs_are_read_only_for_good() -> None:
    with quire.Segment(4096) as segment, segment.snapshot() as snapshot:
        with pytest.raises(quire.SandboxError, match="read-only"):
            quire.sandbox.run("x[0] = 1", {"x": snapshot})
        with pytest.raises(quire.SandboxError, match="SIGSEGV") as caught:
            quire.sandbox.run(
                "import ctypes; ctypes.memset(x.ctypes.data, 1, 1)", {"x": snapshot}, imports=("ctypes",)
            )
        assert caught.value.reason == "killed"
        # Made writable, it is a private copy.
        code = PRELUDE + (
            f"call({numbers()['mprotect']}, x.ctypes.data, 4096, 3)\n"
            "ctypes.memset(x.ctypes.data, 7, 1); result = x[:1]"
        )
        result = quire.sandbox.run(code, {"x": snapshot}, imports=MODULES)
        assert result.array()[0] == 7
        with snapshot.map() as mapping:
            assert mapping[0] == 0


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other machines have one system-call table")
def test_the_other_table_of_system_calls_kills() -> None:
    with pytest.raises(quire.SandboxError, match="SIGSYS") as caught:
        quire.sandbox.run(PRELUDE + "call(0x40000000 | 39)", imports=MODULES)
    assert caught.value.reason == "killed"


# What is refused by other doors, should the filter have a hole: not all is, so the filter is needed as well.
BEHIND_THE_FILTER = {
    "open a file",
    "make a file",
    "list the root",
    "make a directory",
    "see a file",
    "open by an inherited directory",
    "see by an inherited directory",
    "use an inherited descriptor",
    "chroot",
    "mount",
    "pivot_root",
    "its own memory through proc",
    "proc of the parent",
    "abstract Unix socket",
    "ptrace the parent",
    "pidfd of the parent",
    "signal the parent",
    "signal a thread of the parent",
    "queue a signal",
    "limits of the parent",
    "priority of the parent",
    "execve",
    "bpf",
    "load a module",
    "reboot",
    "set the clock",
    "set the host's name",
    "become root",
}


def test_other_doors_hold_without_the_filter(facts, monkeypatch) -> None:
    allow_all = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)  # return SECCOMP_RET_ALLOW
    monkeypatch.setattr(syscalls, "program", lambda: allow_all)
    code = script(BEHIND_THE_FILTER, **facts)
    found = json.loads(quire.sandbox.run(code, imports=MODULES).stdout)
    assert set(found) == BEHIND_THE_FILTER
    assert not [name for name, outcome in found.items() if outcome == "succeeded"]


def test_landlock_forbids_files() -> None:
    if not kernel.landlock_abi():
        pytest.skip("this kernel has no Landlock")

    def work() -> None:
        kernel.no_new_privileges()
        kernel.landlock_restrict_all(kernel.landlock_abi())
        with pytest.raises(PermissionError):
            os.open("/", os.O_RDONLY)

    run_forked(work)
