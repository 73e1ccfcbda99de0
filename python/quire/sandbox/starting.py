"""Starting a sandbox, waiting for it, and judging what comes out: the side that trusts nobody."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from quire import wire
from quire.errors import Malformed, NotImmutable, SandboxError, Stalled, Unsupported
from quire.sandbox import answers, program
from quire.sandbox.results import Result, Usage, allocated_bytes
from quire.sandbox.users import map_users
from quire.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.sandbox.doors import Limits

__all__ = ["Started"]

MAX_OUTPUT_BYTES = 64 << 10
"""What is kept of each of the two streams."""

# Until the doors are shut, which is when the timeout begins: imports may take a while.
_START_TIMEOUT = 120.0
# From the first byte of what is returned to the last, and for the watcher to tell the end.
_PATIENCE = 10.0


class _Output:
    """The first bytes of a stream; the rest is read and thrown away, so that nobody waits in `write`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._kept = bytearray()

    def take(self) -> bool:
        """Read once; False at the end."""
        data = os.read(self.fd, 1 << 16)
        self._kept += data[: MAX_OUTPUT_BYTES - len(self._kept)]
        return bool(data)

    def text(self) -> str:
        return self._kept.decode("utf-8", "replace")


class Started:
    """One sandbox; leaving the block ends all of it."""

    def __init__(self, payload: bytes) -> None:
        self._stack = contextlib.ExitStack()
        self._began: float | None = None
        self._ended: dict[str, Any] | None = None
        self._seconds = 0.0
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            self._control, control = _pair(socket.SOCK_SEQPACKET, ours, theirs)
            self._answers, sock = _pair(socket.SOCK_STREAM, ours, theirs)
            memory = os.memfd_create("quire-sandbox", os.MFD_CLOEXEC)
            theirs.callback(os.close, memory)
            with open(memory, "wb", closefd=False) as file:
                file.write(payload)
            streams = [_pipe(ours, theirs) for _ in range(2)]
            self._outputs = [_Output(fd) for fd, _ in streams]
            nothing, write = os.pipe()
            theirs.callback(os.close, nothing)
            os.close(write)
            descriptors = (control.fileno(), sock.fileno(), memory)
            # A new interpreter: this process may have threads, whose locks a fork would leave locked.
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                program.command(*descriptors),
                pass_fds=descriptors,
                stdin=nothing,
                stdout=streams[0][1],
                stderr=streams[1][1],
                env=program.environment(),
                cwd="/",
                start_new_session=True,
            )
            self._stack = ours.pop_all()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._ended is None:
                with contextlib.suppress(OSError):  # told already, or gone
                    self._control.shutdown(socket.SHUT_WR)
            try:
                # The watcher kills the sandbox, counts and removes the cgroup.
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                # Something stopped it; the kernel then kills the sandbox with it.
                self._process.kill()
                self._process.wait()
        finally:
            self._stack.close()

    def result(self, inputs: Sequence[Snapshot], limits: Limits, timeout: float) -> Result:
        """Do all that is done with a sandbox."""
        deadline = time.monotonic() + _START_TIMEOUT
        self._begin(inputs, deadline)
        deadline = time.monotonic() + timeout
        try:
            body = self._wait(deadline)
            answer = None if body is None else answers.decode(body)
            snapshot = None
            if isinstance(answer, answers.Returned):
                snapshot = self._returned(answer, limits.memory_bytes, deadline)
        except (Malformed, NotImmutable, Stalled, EOFError, TimeoutError, OSError) as error:
            self._finish()
            raise self._error("answer", f"what the sandbox answered is refused: {error}") from error
        if answer is None:
            self._fail_without_answer(limits, timeout)
        self._finish()
        if isinstance(answer, answers.Raised):
            reason = "memory" if answer.kind == "MemoryError" else "raised"
            failure = self._error(reason, f"code in the sandbox raised {answer.kind}: {answer.message}")
            failure.stderr += answer.traceback
            raise failure
        out, err = (output.text() for output in self._outputs)
        if snapshot is None:
            return Result(None, "", (), self._usage(), out, err)
        assert isinstance(answer, answers.Returned)
        return Result(snapshot, answer.dtype, tuple(answer.shape), self._usage(), out, err)

    def _begin(self, inputs: Sequence[Snapshot], deadline: float) -> None:
        """Map users, hand the inputs over and wait until the doors are shut."""
        message = self._hear(deadline)
        if message["at"] == "unshared":
            map_users(self._process.pid)
            self._control.send(b"mapped")
            try:
                for snapshot in inputs:
                    wire.send(self._answers, snapshot, timeout=_START_TIMEOUT)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it failed; the next message says why
            message = self._hear(deadline)
        if message["at"] == "shut":
            self._began = time.monotonic()
            return
        if message["at"] == "silent":
            raise self._error("start", f"the sandbox was not ready within {_START_TIMEOUT} s")
        self._finish()
        if message["at"] == "failed" and message["kind"] == "unsupported":
            raise Unsupported(message["text"])
        text = message.get("text", f"the process ended with {message.get('status')}")
        raise self._error("start", f"the sandbox could not be started: {text}")

    def _hear(self, deadline: float) -> dict[str, Any]:
        """One message of the watcher, which is code of ours; its end counts as one."""
        self._control.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            message = self._control.recv(program.MAX_MESSAGE_BYTES)
        except TimeoutError:
            return {"at": "silent"}
        except ConnectionResetError:
            message = b""
        if not message:
            return {"at": "gone"}
        said: dict[str, Any] = json.loads(message)
        return said

    def _wait(self, deadline: float) -> bytes | None:
        """Collect output until there is an answer: its body; None if the process ended or time is up."""
        received, wanted = bytearray(), answers.HEADER.size
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._answers, selectors.EVENT_READ)
            for output in self._outputs:
                selector.register(output.fd, selectors.EVENT_READ, output)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if isinstance(key.data, _Output):
                        if not key.data.take():
                            selector.unregister(key.fd)
                    elif key.fileobj is self._control:
                        self._ended = self._hear(deadline)
                        # What it answered before it ended counts.
                        selector.unregister(self._control)
                    else:
                        data = self._answers.recv(wanted - len(received))
                        received += data
                        if len(received) == answers.HEADER.size == wanted:
                            wanted += answers.body_bytes(received)
                        if len(received) == wanted > answers.HEADER.size:
                            return bytes(received[answers.HEADER.size :])
                        if not data:
                            selector.unregister(self._answers)
                if self._ended is not None and not self._readable(selector):
                    return None
        return None

    def _readable(self, selector: selectors.BaseSelector) -> bool:
        """Whether the ended process left an answer that is still to be read."""
        return self._answers in selector.get_map() and any(
            key.fileobj is self._answers for key, _ in selector.select(0)
        )

    def _returned(self, answer: answers.Returned, limit_bytes: int, deadline: float) -> Snapshot:
        """Receive, verify and judge what was returned."""
        patience = min(max(deadline - time.monotonic(), 0.01), _PATIENCE)
        self._answers.settimeout(patience)
        snapshot = wire.recv(self._answers, timeout=patience)
        if not isinstance(snapshot, Snapshot):
            snapshot.close()
            raise Malformed("it is no snapshot")
        try:
            needed, allocated = answers.item_bytes(answer), allocated_bytes(snapshot)
            if needed > snapshot.size:
                raise Malformed(f"an array of {needed} bytes is said to be in {snapshot.size}")
            if snapshot.size > limit_bytes or allocated > limit_bytes:
                raise Malformed(
                    f"it has {snapshot.size} bytes and takes {allocated}, more than {limit_bytes}"
                )
            try:
                np.dtype(answer.dtype)
            except TypeError as error:
                raise Malformed(f"no array has items of type {answer.dtype!r}") from error
        except BaseException:
            snapshot.close()
            raise
        return snapshot

    def _fail_without_answer(self, limits: Limits, timeout: float) -> NoReturn:
        """Say why there is none."""
        in_time = self._ended is not None
        self._finish()
        ended = self._ended or {}
        status = ended.get("status", 0)
        if ended.get("out_of_memory"):
            raise self._error(
                "memory", "code in the sandbox took more memory than limit_bytes, and was killed"
            )
        if not in_time:
            raise self._error(
                "timeout", f"code in the sandbox did not end within {timeout} s, and was killed"
            )
        spent = ended.get("cpu_seconds", 0.0)
        if status == -signal.SIGKILL and limits.cpu_seconds is not None and spent > 0.9 * limits.cpu_seconds:
            raise self._error(
                "cpu", f"code in the sandbox took {spent:.1f} s of processor time, and was killed"
            )
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with {status}"
        raise self._error("killed", f"code in the sandbox ended {how} and answered nothing")

    def _finish(self) -> None:
        """Have what is left killed and accounted for, and read what it had printed."""
        if self._began is not None and not self._seconds:
            self._seconds = time.monotonic() - self._began
        with contextlib.suppress(OSError):  # gone
            self._control.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _PATIENCE
        while self._ended is None or self._ended["at"] not in ("ended", "gone", "silent"):
            self._ended = self._hear(deadline)
        if self._ended["at"] == "silent":
            # Somebody has stopped it. The kernel kills the sandbox with it.
            self._process.kill()
        for output in self._outputs:
            # Nobody is left who could write; a pipe holds little.
            while output.take():
                pass

    def _usage(self) -> Usage:
        ended = self._ended or {}
        return Usage(
            ended.get("peak_bytes", 0),
            ended.get("cpu_seconds", 0.0),
            self._seconds,
            ended.get("exact", False),
        )

    def _error(self, reason: str, message: str) -> SandboxError:
        usage = None if self._began is None else self._usage()
        out, err = (output.text() for output in self._outputs)
        return SandboxError(message, reason=reason, usage=usage, stdout=out, stderr=err)


def _pair(
    kind: int, ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    return ours.enter_context(one), theirs.enter_context(other)


def _pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe: our end, which reads, and theirs."""
    read, write = os.pipe()
    ours.callback(os.close, read)
    theirs.callback(os.close, write)
    return read, write
