"""The guardian: starts the broker, keeps its descriptors, and starts it again when it was killed.

It does for a broker what systemd does with ``FileDescriptorStoreMax=`` and ``Restart=``, and it is small: it
looks into nothing that it keeps. A broker whose guardian was killed starts another one, as ``python -m
quire.broker.guardian``, which adopts it; see ``guarding.py``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING

from quire.ancillary import ROOM_BYTES, received
from quire.broker import events

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GUARDIAN", "Guardian", "main"]

GUARDIAN = "QUIRE_BROKER_GUARDIAN"
"""The environment variable that tells a broker the process of its guardian."""

_MAX_FAILURES = 5
_FIRST = 3


class Guardian:
    """Runs one broker after another, each with what the one before it had kept."""

    def __init__(self, listener: socket.socket, argv: list[str], report: Callable[[str], None]) -> None:
        """Prepare.

        Args:
            listener: The listening socket; belongs to the guardian from now on.
            argv: The broker's command line, the program's path first.
            report: Is told what happened, a line of text; must not block.

        Raises:
            OSError: The kernel refused.
        """
        self._argv = argv
        self._report = report
        self._kept: dict[str, int] = {}
        self._listener = listener
        self._notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._notices.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        name = f"quire-guardian-{os.urandom(16).hex()}"
        self._notices.bind(f"\0{name}")
        self._notices.setblocking(False)
        self._address = f"@{name}"
        self._child = 0
        self._stopping = False
        self._was_ready = False

    @property
    def address(self) -> str:
        """Where a broker sends its notices."""
        return self._address

    def run(self, adopted: int = 0) -> int:
        """Run until the broker ends by itself, or a signal asks for the end.

        Blocks. SIGTERM and SIGINT are passed to the broker.

        Args:
            adopted: The process of a broker that runs already and has started this one; 0 is none.

        Returns:
            The broker's exit status; 1 if it crashed too often in a row.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        failures = 0
        while True:
            status = self._adopt(adopted) if adopted else self._run_one()
            adopted = 0
            if os.WIFEXITED(status) or self._stopping:
                return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 0
            # SIGKILL is somebody else's doing; what dies by itself, or at its start, may do so for ever.
            killer = os.WTERMSIG(status)
            failures = 0 if self._was_ready and killer == signal.SIGKILL else failures + 1
            self._report(f"killed by signal {killer}, starting it again")
            if failures >= _MAX_FAILURES:
                self._report(f"crashed {failures} times in a row")
                return 1

    def _stop(self, number: int, _frame: object) -> None:
        self._stopping = True
        if self._child:
            os.kill(self._child, number)

    def _run_one(self) -> int:
        """Start a broker and serve it until it ends; return its wait status."""
        self._was_ready = False
        self._child = os.fork()
        if self._child == 0:
            try:
                self._become_broker()
            finally:
                os._exit(127)
        self._attend(os.pidfd_open(self._child))
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        return status

    def _adopt(self, broker: int) -> int:
        """Serve a broker that is no child until it ends; return what may stand for its wait status."""
        self._child = broker
        pidfd = os.pidfd_open(broker) if os.getppid() == broker else -1
        if pidfd >= 0 and os.getppid() == broker:
            self._attend(pidfd)
        self._child = 0
        if not self._was_ready:
            # It ended before it had handed everything over, and with less no broker could go on.
            for descriptor in self._kept.values():
                os.close(descriptor)
            self._kept.clear()
        return 0 if self._stopping else signal.SIGKILL

    def _attend(self, pidfd: int) -> None:
        """Take the notices of a broker until it has ended; the pidfd is closed."""
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            poller.register(self._notices, select.POLLIN)
            while pidfd not in dict(poller.poll()):
                self._take_notices()
        finally:
            os.close(pidfd)
        # What it sent before it died counts.
        self._take_notices()

    def _become_broker(self) -> None:
        """In the child: put the descriptors where sd_listen_fds(3) says, and execute."""
        given = [("socket", self._listener.fileno()), *self._kept.items()]
        # Out of the way of the numbers that they are to have.
        above = _FIRST + len(given)
        moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for _, descriptor in given]
        for index, descriptor in enumerate(moved):
            os.dup2(descriptor, _FIRST + index, inheritable=True)
            os.close(descriptor)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        environment = dict(os.environ)
        environment["LISTEN_PID"] = str(os.getpid())
        environment["LISTEN_FDS"] = str(len(given))
        environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in given)
        environment["NOTIFY_SOCKET"] = self._address
        environment[GUARDIAN] = str(os.getppid())
        os.execve(self._argv[0], self._argv, environment)  # noqa: S606 - the broker's own command line

    def _take_notices(self) -> None:
        """Read every datagram that waits."""
        while True:
            try:
                data, ancillary, _flags, _ = self._notices.recvmsg(4096, ROOM_BYTES, socket.MSG_CMSG_CLOEXEC)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINTR):
                    return
                raise
            sender = 0
            descriptors = received(ancillary)
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    sender = struct.unpack("3i", content[:12])[0]
            if sender == self._child:
                self._serve(data, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)

    def _serve(self, data: bytes, descriptors: list[int]) -> None:
        """Do what one datagram of the broker asks; descriptors that are kept are taken out of the list."""
        fields = dict(line.partition("=")[::2] for line in data.decode("utf-8", "replace").split("\n"))
        name = fields.get("FDNAME", "")
        if fields.get("FDSTORE") == "1" and descriptors and name:
            old = self._kept.pop(name, -1)
            if old >= 0:
                os.close(old)
            self._kept[name] = descriptors.pop(0)
        elif fields.get("READY") == "1":
            self._was_ready = True
        elif fields.get("STOPPING") == "1":
            self._stopping = True
        elif fields.get("FDSTOREREMOVE") == "1":
            old = self._kept.pop(name, -1)
            if old >= 0:
                os.close(old)


def main(arguments: list[str]) -> int:
    """Adopt the broker that has started this process; see `quire.broker.guarding`.

    Args:
        arguments: The descriptor of the listening socket, one on which to tell the address for notices, the
            socket's path, the form of the log, and the broker's command line.

    Returns:
        The broker's exit status.
    """
    listener = socket.socket(fileno=int(arguments[0]))
    path, form, argv = arguments[2], arguments[3], arguments[4:]
    guardian = Guardian(listener, argv, lambda event: events.tell(sys.stderr.fileno(), form, event))
    broker = os.getppid()
    os.set_inheritable(listener.fileno(), False)
    with open(int(arguments[1]), "w", encoding="ascii") as report:
        report.write(guardian.address)
    try:
        return guardian.run(adopted=broker)
    finally:
        # Nobody else can have bound the path.
        os.unlink(path)
        listener.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
