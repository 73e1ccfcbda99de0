"""Brokers for tests: one inside this process, whose books can be looked at, and real daemons."""

import array
import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from quire.broker import protocol
from quire.broker.config import Config
from quire.broker.keeper import Keeper
from quire.broker.server import Server, listen


class Inside:
    """A broker in a thread of this process."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = str(path)
        settings.setdefault("limit_bytes", 1 << 30)
        self._config = Config(**settings)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._started.wait(10)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self.server = Server(listen(self.path), self._config, Keeper(None), {})
        self.server.start()
        self._started.set()
        await self._end.wait()
        await self.server.close()

    def do(self, function: Callable[[], Any]) -> Any:
        """Run a function in the broker's loop and return its result."""

        async def call() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def audit(self) -> list[str]:
        # Memory that is ending is charged until its pages are free.
        self.wait(lambda world: not any(held.dead for held in world.objects.values()))
        return self.do(self.server.world.audit)

    def wait(self, condition: Callable[[Any], bool], seconds: float = 10.0) -> None:
        """Wait until the broker's world satisfies a condition."""
        end = time.monotonic() + seconds
        while not self.do(lambda: condition(self.server.world)):
            assert time.monotonic() < end, "the broker did not come to the state that was waited for"

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
        world = self.server.world
        for descriptor in [*world.descriptors(), *(token.descriptor for token in world.tokens.values())]:
            os.close(descriptor)
        world.journal.close()
        for session in world.sessions.values():
            if session.pidfd >= 0:
                os.close(session.pidfd)
        os.unlink(self.path)


@contextlib.contextmanager
def inside(path: Path, **settings: Any) -> Iterator[Inside]:
    broker = Inside(path, **settings)
    try:
        yield broker
    finally:
        broker.close()


@contextlib.contextmanager
def daemon(
    path: Path, *options: str, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A ``quire broker``, with its guardian."""
    process = subprocess.Popen(
        [sys.executable, "-m", "quire", "broker", "--socket", str(path), *options],
        env=os.environ | (environment or {}),
        stderr=subprocess.PIPE,
    )
    try:
        until(path.exists, process)
        yield process
    finally:
        process.terminate()
        process.wait(20)
        assert process.stderr is not None
        # Shown where a test fails.
        sys.stderr.write(process.stderr.read().decode())
        process.stderr.close()


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until something is so, for 10 seconds at most."""
    end = time.monotonic() + 10
    while not condition():
        assert process is None or process.poll() is None, "the process has ended"
        assert time.monotonic() < end
        select.select([], [], [], 0.002)


class Child:
    """A client in a process of its own, run line by line; ``c`` is its connection."""

    PROGRAM = """
import array, ctypes, mmap, os, select, signal, socket, struct, sys, threading, time, zlib
import numpy as np
import quire
from quire import client, segment, snapshot
from quire.broker import protocol
from quire.broker.protocol import Rights
def faults():
    ours = open(f"/proc/self/task/{threading.get_native_id()}/stat").read().rsplit(")", 1)[1].split()
    return int(ours[7]) + int(ours[9])
if len(sys.argv) > 2:
    os.setuid(int(sys.argv[2]))
c = client.connect(sys.argv[1]) if sys.argv[1] else None
while True:
    length = struct.unpack("I", sys.stdin.buffer.read(4))[0]
    text = sys.stdin.buffer.read(length).decode()
    try:
        try:
            answer = repr(eval(text, globals()))
        except SyntaxError:
            exec(text, globals())
            answer = "None"
    except BaseException as error:
        answer = f"!{type(error).__name__}: {error}"
    data = answer.encode()
    sys.stdout.buffer.write(struct.pack("I", len(data)) + data)
    sys.stdout.buffer.flush()
"""

    def __init__(self, path: str, uid: int | None = None) -> None:
        argv = [sys.executable, "-c", self.PROGRAM, path]
        self.process = subprocess.Popen(
            [*argv, str(uid)] if uid is not None else argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self.process.pid

    def begin(self, text: str) -> None:
        data = text.encode()
        assert self.process.stdin is not None
        self.process.stdin.write(len(data).to_bytes(4, sys.byteorder) + data)
        self.process.stdin.flush()

    def end(self) -> Any:
        assert self.process.stdout is not None
        length = int.from_bytes(self.process.stdout.read(4), sys.byteorder)
        answer = self.process.stdout.read(length).decode()
        assert not answer.startswith("!"), answer
        if answer.startswith("<"):
            return answer
        return eval(answer, {"Outcome": dict, "Handle": tuple})

    def __call__(self, text: str) -> Any:
        self.begin(text)
        return self.end()

    def stop(self) -> None:
        """Stop it, and wait until every thread of it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@contextlib.contextmanager
def children(path: str, count: int, uid: int | None = None) -> Iterator[list[Child]]:
    made: list[Child] = []
    try:
        for _ in range(count):
            made.append(Child(path, uid))  # noqa: PERF401 - those that were made are closed
        yield made
    finally:
        for child in made:
            child.close()


class Raw:
    """A connection without a library."""

    made: ClassVar[list["Raw"]] = []

    def __init__(self, path: str, *, hello: bool = True) -> None:
        Raw.made.append(self)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(path)
        self.frames = protocol.FrameReader()
        if hello:
            self.send(protocol.Hello(1, 1))
            self.welcome = self.receive()

    def send(self, message: protocol.Message, descriptors: list[int] | None = None) -> None:
        frame = protocol.encode(message, len(descriptors or ()))
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        self.sock.sendmsg([frame], ancillary)

    def receive(self) -> protocol.Message:
        while True:
            for payload, descriptors in self.frames.frames():
                for descriptor in descriptors:
                    os.close(descriptor)
                return protocol.decode_reply(payload)
            data, descriptors, _, _ = socket.recv_fds(self.sock, 1 << 16, 253)
            if not data:
                raise EOFError
            self.frames.feed(data, descriptors)

    def ask(self, message: protocol.Message, descriptors: list[int] | None = None) -> protocol.Message:
        self.send(message, descriptors)
        return self.receive()

    def is_cut_off(self) -> bool:
        try:
            while True:
                self.receive()
        except (EOFError, ConnectionResetError):
            return True
        finally:
            self.sock.close()
