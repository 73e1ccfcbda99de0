"""The broker's side of the guardian: when that is killed, another is started and given everything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

    from quire.broker.keeper import Keeper

__all__ = ["Guarding"]

_log = logging.getLogger("quire.broker")
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_START_SECONDS = 60.0


class Guarding:
    """Watches the guardian of this broker.

    From the guardian's end until another has everything, about as long as an interpreter takes to start, a
    broker that is killed too is lost with what it holds. Clients notice nothing of the exchange.
    """

    def __init__(self, keeper: Keeper, listener: socket.socket, path: str, log_format: str) -> None:
        """Prepare.

        Args:
            keeper: Is told of the new guardian; must be replaceable.
            listener: The listening socket, for the next broker; stays the caller's.
            path: Where it listens.
            log_format: Of what the guardian reports.
        """
        self._keeper = keeper
        self._listener = listener
        self._path = path
        self._log_format = log_format
        self._pidfd = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None

    def watch(self, pid: int) -> None:
        """Watch the guardian that has started this process. In the event loop.

        Args:
            pid: Its process; if it is not the parent any more it has ended.
        """
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(pid)
        if self._pidfd >= 0 and os.getppid() == pid:
            asyncio.get_running_loop().add_reader(self._pidfd, self._ended)
        else:
            self._ended()

    def _ended(self) -> None:
        self._unwatch()
        if self._process is not None:
            self._process.wait()
            self._process = None
        _log.warning("the guardian was killed; another is started")
        self._task = asyncio.get_running_loop().create_task(self._replace())

    async def _replace(self) -> None:
        """Start guardians until one has everything."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                address = await asyncio.wait_for(self._start(), _START_SECONDS)
                self._keeper.hand_over(address)
                assert self._process is not None
                self._pidfd = os.pidfd_open(self._process.pid)
            except (OSError, TimeoutError) as error:
                _log.error(
                    "no guardian could be started, what this broker holds depends on it alone: %s", error
                )
                self._end_process()
            else:
                asyncio.get_running_loop().add_reader(self._pidfd, self._ended)
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _start(self) -> str:
        """Start a guardian; return its address."""
        read, write = os.pipe()
        with open(read, "rb") as report:
            try:
                argv = [
                    sys.executable,
                    "-m",
                    "quire.broker.guardian",
                    str(self._listener.fileno()),
                    str(write),
                ]
                self._process = subprocess.Popen(  # noqa: S603 - the broker's own command line
                    [*argv, self._path, self._log_format, sys.executable, *sys.orig_argv[1:]],
                    pass_fds=(self._listener.fileno(), write),
                )
            finally:
                os.close(write)
            os.set_blocking(read, False)
            came = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(read, came.set)
            try:
                await came.wait()
            finally:
                loop.remove_reader(read)
            address = report.read() or b""
        if not address:
            raise OSError("the guardian ended before it was ready")
        return address.decode("ascii")

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    async def close(self) -> None:
        """Watch no more; a guardian that has not been given everything is ended."""
        self._unwatch()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._end_process()
