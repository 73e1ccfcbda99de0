"""The two processes of a sandbox: one that watches, and the one that is shut in.

The first is started as a program. It makes the namespaces and the cgroup, forks the second, which is process
1 in its own pid namespace, and stays to kill it, count what it used and remove the cgroup. The second
imports, shuts its doors and only then runs code that nobody trusts.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from quire.sandbox import kernel
from quire.sandbox.cgroup import Group

__all__ = ["MAX_MESSAGE_BYTES", "command", "environment", "main"]

MAX_MESSAGE_BYTES = 4096
_MAX_TEXT = 1500

# The caller's path: what it imports need not be where the interpreter looks by itself.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from quire.sandbox.program import main; main()"
)

# One thread from the start: doors are shut for one thread.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "LC_ALL": "C.UTF-8",
}

_USER_NAMESPACES = (
    "new namespaces are refused ({error}): a sandbox needs user namespaces. Allow them with "
    "user.max_user_namespaces, kernel.unprivileged_userns_clone=1 or "
    "kernel.apparmor_restrict_unprivileged_userns=0 where these exist, and `unshare` in the container's "
    "seccomp profile"
)


def environment() -> dict[str, str]:
    """All that the sandbox sees of the environment; the interpreter may need its libraries."""
    libraries = os.environ.get("LD_LIBRARY_PATH")
    return _ENVIRONMENT if libraries is None else {**_ENVIRONMENT, "LD_LIBRARY_PATH": libraries}


def command(control: int, answers: int, payload: int) -> list[str]:
    """The command that starts the watcher with the interpreter of this process.

    Args:
        control: The descriptor of a Unix socket, SOCK_SEQPACKET, for messages between the watcher and its
            starter.
        answers: Of a Unix stream socket, on which inputs go to the sandbox and what it returns comes back.
        payload: Of a memfd with a pickle of all that the sandbox has to know.

    Raises:
        RuntimeError: There is no interpreter, as in a program that embeds Python.
    """
    if not sys.executable:
        raise RuntimeError("sys.executable is empty, so no sandbox can be started")
    path = [os.path.abspath(entry) for entry in sys.path]
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if home not in path:
        # An editable installation may be found by a hook.
        path.append(home)
    numbers = (str(each) for each in (os.getpid(), control, answers, payload))
    return [sys.executable, "-I", "-B", "-c", _BOOT, json.dumps(path), *numbers]


class _Failed(Exception):  # noqa: N818 - a message on its way
    """The sandbox cannot be made; the kind is what the caller shall raise."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def _tell(sock: socket.socket, **message: Any) -> None:
    # Python's send is sendto, which the filter refuses.
    sock.sendmsg([json.dumps(message).encode()])


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MAX_TEXT]


def main() -> NoReturn:
    """Watch one sandbox from its making to its end."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    kernel.set_parent_death_signal(signal.SIGTERM)
    starter, control_fd, answers_fd, payload_fd = (int(word) for word in sys.argv[2:])
    if os.getppid() != starter:
        os._exit(1)
    control = socket.socket(fileno=control_fd)
    answers = socket.socket(fileno=answers_fd)
    given = pickle.loads(os.pread(payload_fd, os.fstat(payload_fd).st_size, 0))
    code = 1
    try:
        _watch(control, answers, woken, given)
        code = 0
    except BrokenPipeError:
        # The one who would be told has ended.
        code = 0
    except _Failed as failed:
        _tell(control, at="failed", kind=failed.kind, text=str(failed))
    except Exception as error:  # noqa: BLE001 - told to the one who started us
        _tell(control, at="failed", kind="internal", text=_text(error))
    finally:
        os._exit(code)


def _watch(control: socket.socket, answers: socket.socket, woken: int, given: dict[str, Any]) -> None:
    group, refused = Group.make(given["group"], given["limits"].memory_bytes)
    try:
        if group is None and given["exact"]:
            raise _Failed(
                "unsupported",
                f"no cgroup with a memory limit can be made ({refused}): delegate one to this user, or pass "
                "exact=False",
            )
        try:
            kernel.unshare(kernel.NAMESPACES)
        except OSError as error:
            raise _Failed("unsupported", _USER_NAMESPACES.format(error=error)) from error
        # Whoever started us maps our users: with more rights than we have now, it can map two.
        _tell(control, at="unshared")
        if control.recv(MAX_MESSAGE_BYTES) != b"mapped":
            return
        kernel.set_parent_death_signal(signal.SIGTERM)
        gate, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                control.close()
                gate.close()
                _shut_in(theirs, answers, given)
            finally:
                os._exit(1)
        theirs.close()
        answers.close()
        ended = _Watched(pid, gate, group).until_ended(control, woken)
    finally:
        if group is not None:
            group.remove()
    _tell(control, **ended)


class _Watched:
    """The process that is shut in, from outside."""

    def __init__(self, pid: int, gate: socket.socket, group: Group | None) -> None:
        self._pid = pid
        self._gate = gate
        self._group = group
        self._cpu_before = 0.0

    def until_ended(self, control: socket.socket, woken: int) -> dict[str, Any]:
        """Pass messages on, kill when told to or when nobody is left to tell; how it ended."""
        pidfd = os.pidfd_open(self._pid)
        try:
            poll = select.poll()
            for fd in (pidfd, control.fileno(), woken, self._gate.fileno()):
                poll.register(fd, select.POLLIN)
            while True:
                ready = {fd for fd, _ in poll.poll()}
                # What it said before it ended comes first.
                if self._gate.fileno() in ready and not self._pass_on(control):
                    poll.unregister(self._gate)
                # The latter two say nothing but this.
                if ready & {pidfd, control.fileno(), woken}:
                    break
        finally:
            os.kill(self._pid, signal.SIGKILL)
            os.close(pidfd)
            _, status, used = os.wait4(self._pid, 0)
        peak = None if self._group is None else self._group.peak_bytes()
        return {
            "at": "ended",
            "status": os.waitstatus_to_exitcode(status),
            "out_of_memory": self._group is not None and self._group.killed(),
            "exact": peak is not None,
            "peak_bytes": used.ru_maxrss * 1024 if peak is None else peak,
            "cpu_seconds": max(0.0, used.ru_utime + used.ru_stime - self._cpu_before),
        }

    def _pass_on(self, control: socket.socket) -> bool:
        """Hear what it says before its doors are shut; False when that was all."""
        try:
            message = self._gate.recv(MAX_MESSAGE_BYTES)
        except ConnectionResetError:
            return False
        if not message:
            return False
        said = json.loads(message)
        if said["at"] == "ready":
            # What it took for imports stays charged to whoever runs us; only what comes now is the code's.
            if self._group is not None:
                self._group.add(self._pid)
            self._gate.send(b"go")
            return True
        self._cpu_before = said.get("cpu_seconds", 0.0)
        control.send(message)
        # Nothing that comes later is from us.
        return False


def _shut_in(gate: socket.socket, answers: socket.socket, given: dict[str, Any]) -> NoReturn:
    """Be the process that is shut in."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    kernel.set_parent_death_signal(signal.SIGKILL)
    try:
        from quire.sandbox import doors, inside  # noqa: PLC0415 - the watcher does not need them

        work = inside.prepare(answers, given)
        _tell(gate, at="ready")
        if gate.recv(16) != b"go":
            os._exit(1)
        spent = time.process_time()
        try:
            doors.shut(given["limits"], (0, 1, 2, answers.fileno(), gate.fileno()), given["filter"])
        except OSError as error:
            raise _Failed("unsupported", f"the doors of a sandbox cannot be shut: {_text(error)}") from error
    except BaseException as error:  # noqa: BLE001 - imports may raise anything
        failed = error if isinstance(error, _Failed) else _Failed("start", _text(error))
        _tell(gate, at="failed", kind=failed.kind, text=str(failed))
        os._exit(1)
    _tell(gate, at="shut", cpu_seconds=spent)
    gate.close()
    inside.work_and_answer(answers, work)
    os._exit(0)
