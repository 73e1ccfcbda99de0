"""Processes that wait for something to be handed over, and say when they have it."""

import select
import socket
import struct
import time
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from typing import Literal, Self

import quire

_SECONDS = struct.Struct("d")
Kind = Literal["snapshot", "channel", "block", "ping"]
NAME_BYTES = 64


class Receiver:
    """A waiting process.

    It has one connection on which things come, and one on which it answers: a byte when it has mapped what
    came and read a byte of it, another when it has given it up.

    Attributes:
        sock: The connection to send on.
    """

    def __init__(self, kind: Kind) -> None:
        self.sock, theirs = socket.socketpair()
        self._answers, answers = socket.socketpair()
        self._process = get_context("spawn").Process(target=_serve, args=(kind, theirs, answers), daemon=True)
        self._process.start()
        theirs.close()
        answers.close()
        self._wait()

    def _wait(self) -> None:
        if not self._answers.recv(1):
            raise RuntimeError(f"a receiver ended early, exit code {self._process.exitcode}")

    def wait_mapped(self) -> float:
        """Wait until it has what was sent; return the time."""
        self._wait()
        return time.perf_counter()

    def wait_idle(self) -> float:
        """Wait until it has given up what it had, and its processor is free.

        Returns:
            For a receiver of snapshots the seconds from when the message had come until a byte was read.
        """
        answer = self._answers.recv(_SECONDS.size, socket.MSG_WAITALL)
        if len(answer) != _SECONDS.size:
            raise RuntimeError(f"a receiver ended early, exit code {self._process.exitcode}")
        seconds: float = _SECONDS.unpack(answer)[0]
        return seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self._answers.close()
        self._process.join()


def contents(block: SharedMemory) -> memoryview:
    """Return the memory of a block that is open."""
    if block.buf is None:
        raise ValueError("the block is closed")
    return block.buf


def _serve(kind: Kind, sock: socket.socket, answers: socket.socket) -> None:
    serve = {"snapshot": _snapshots, "channel": _channel, "block": _blocks, "ping": _pings}[kind]
    answers.sendall(b"r")
    try:
        serve(sock, answers)
    except (EOFError, BrokenPipeError):
        return


def _snapshots(sock: socket.socket, answers: socket.socket) -> None:
    while True:
        select.select([sock], [], [])
        start = time.perf_counter()
        snapshot = quire.recv(sock)
        assert isinstance(snapshot, quire.Snapshot)
        mapping = snapshot.map()
        with memoryview(mapping) as view:
            assert view[0] >= 0
        seconds = time.perf_counter() - start
        answers.sendall(b"m")
        mapping.close()
        snapshot.close()
        answers.sendall(_SECONDS.pack(seconds))


def _channel(sock: socket.socket, answers: socket.socket) -> None:
    channel = quire.Channel(sock)
    mapping = None
    while True:
        snapshot = channel.recv()
        assert isinstance(snapshot, quire.Snapshot)
        if mapping is None:
            mapping = snapshot.map()
        else:
            mapping.advance(snapshot)
        with memoryview(mapping) as view:
            assert view[0] >= 0
        answers.sendall(b"m")
        snapshot.close()
        answers.sendall(_SECONDS.pack(0.0))


def _blocks(sock: socket.socket, answers: socket.socket) -> None:
    while name := sock.recv(NAME_BYTES):
        block = SharedMemory(name=name.decode())
        with memoryview(contents(block)) as view:
            assert view[0] >= 0
        answers.sendall(b"m")
        block.close()
        answers.sendall(_SECONDS.pack(0.0))


def _pings(sock: socket.socket, answers: socket.socket) -> None:
    while sock.recv(1):
        answers.sendall(b"m")
        answers.sendall(_SECONDS.pack(0.0))
