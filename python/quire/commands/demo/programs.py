"""The programs that the demo starts: how they are started, heard, and ended whatever happens."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["Gone", "Program", "Programs"]

GRACE_S = 5.0
"""How long a program may take to end by itself."""


class Gone(Exception):  # noqa: N818 -- a result to show, not a mistake of this program
    """A program ended that should not have."""


class Program:
    """One started program."""

    def __init__(self, title: str, module: str, argument: str) -> None:
        self.title = title
        # What it says when it fails; a file without a name, so that nothing is left.
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by end()
        # In a group of its own, so that Ctrl-C reaches the command only, which then ends the others.
        self.process = subprocess.Popen(  # noqa: S603 -- our own modules, no shell
            [sys.executable, "-m", module, argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            process_group=0,
        )
        self.pidfd = os.pidfd_open(self.process.pid)

    def answer(self) -> None:
        """Let a program go on that asked."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def how_it_ended(self) -> str:
        """Say how, for people; empty if it ended well or not at all."""
        status = self.process.poll()
        if not status:
            return ""
        if status < 0:
            return (
                f"{self.title} (process {self.process.pid}) was ended by signal {-status}"
                f" ({signal.Signals(-status).name})"
            )
        self._complaints.seek(0)
        said = self._complaints.read().decode(errors="replace").strip()
        last = said.splitlines()[-1] if said else f"status {status}"
        return f"{self.title} (process {self.process.pid}) failed: {last}"

    def end(self) -> None:
        """End it, and those that it has started; wait until it has ended."""
        if self.process.poll() is None:
            # To the group: to a forked child too. What is shared by name cleans up after itself.
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._complaints):
            if stream is not None:
                stream.close()
        os.close(self.pidfd)


class Programs:
    """All programs of a run. Leaving the ``with`` block ends them."""

    def __init__(self) -> None:
        self.all: list[Program] = []

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every program."""
        for program in self.all:
            program.end()

    def start(self, title: str, module: str, argument: str) -> Program:
        """Start a module of the demo with one argument."""
        program = Program(title, f"quire.commands.demo.{module}", argument)
        self.all.append(program)
        return program

    def events(self, speaker: Program) -> Iterator[dict[str, Any]]:
        """Yield what one program says, until it has ended well.

        Raises:
            Gone: It or any other program ended otherwise.
        """
        assert speaker.process.stdout is not None
        stream = speaker.process.stdout.fileno()
        buffered = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            watched: set[int] = set()
            while True:
                # Programs may be started between two events.
                for program in self.all:
                    if program is not speaker and program.pidfd not in watched:
                        selector.register(program.pidfd, selectors.EVENT_READ, program)
                        watched.add(program.pidfd)
                for key, _ in selector.select():
                    if key.fd == stream:
                        data = os.read(stream, 1 << 16)
                        if not data:
                            self._check_end(speaker)
                            return
                        *lines, buffered = (buffered + data).split(b"\n")
                        yield from map(json.loads, lines)
                    else:
                        selector.unregister(key.fd)
                        self.check(key.data)

    def check(self, program: Program) -> None:
        """Raise Gone if a program has ended badly."""
        text = program.how_it_ended()
        if text:
            raise Gone(text)

    def _check_end(self, speaker: Program) -> None:
        speaker.process.wait()
        self.check(speaker)

    def first_cause(self) -> str:
        """Say which program was killed, waiting a moment for those that are about to be seen dead."""
        deadline = time.monotonic() + 1.0
        for program in self.all:
            try:
                program.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        killed = [program.how_it_ended() for program in self.all if (program.process.returncode or 0) < 0]
        return "; ".join(killed)
