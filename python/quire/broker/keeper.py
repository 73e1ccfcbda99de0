"""Keeping descriptors outside of the broker's process, by systemd's file descriptor store or the guardian.

Both speak the same protocol: datagrams to ``$NOTIFY_SOCKET`` (sd_notify(3)), and descriptors passed on at
the next start (sd_listen_fds(3)).
"""

from __future__ import annotations

import os
import socket

from quire.ancillary import rights

__all__ = ["Keeper", "inherited"]

_FIRST = 3


def inherited() -> dict[str, int]:
    """Take the descriptors that this process was started with, by name.

    Names that came twice get ``#`` and a number. The variables are removed from the environment, so no child
    believes that they are meant for it.

    Returns:
        Descriptors that are the caller's, close-on-exec.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, int] = {}
    for index in range(int(count)):
        name = names[index] if index < len(names) and names[index] else "unknown"
        if name in found:
            name = f"{name}#{index}"
        descriptor = _FIRST + index
        os.set_inheritable(descriptor, False)
        found[name] = descriptor
    return found


class Keeper:
    """Hands descriptors to whoever keeps them; without anybody, it does nothing.

    A datagram that was sent is in the keeper's queue, whatever happens to this process afterwards.
    """

    def __init__(
        self, address: str | None, found: dict[str, int] | None = None, *, replaceable: bool = False
    ) -> None:
        """Connect.

        Args:
            address: ``$NOTIFY_SOCKET``; None where nobody keeps anything.
            found: What is kept already, by name; the descriptors stay the caller's.
            replaceable: Whether a keeper that has gone is replaced, and then given everything: until then
                what it is told is not sent.

        Raises:
            OSError: Nobody listens there.
        """
        self._replaceable = replaceable
        # For the next keeper; each descriptor stays open until it is forgotten.
        self._kept = dict(found or {})
        self._sock: socket.socket | None = None
        if address:
            try:
                self._sock = _connected(address)
            except ConnectionRefusedError:
                if not replaceable:
                    raise

    def keep(self, name: str, descriptor: int) -> None:
        """Have a copy of a descriptor kept under a name; it has to stay open until it is forgotten.

        Raises:
            OSError: The keeper is gone, and is not replaced.
        """
        self._tell(_kept_as(name), descriptor)
        self._kept[name] = descriptor

    def forget(self, name: str) -> None:
        """Have what is kept under a name closed.

        Raises:
            OSError: The keeper is gone, and is not replaced.
        """
        self._kept.pop(name, None)
        self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def ready(self) -> None:
        """Tell that the service is up."""
        self._tell("READY=1")

    def stopping(self) -> None:
        """Tell that it ends because it was asked to."""
        self._tell("STOPPING=1")

    def hand_over(self, address: str) -> None:
        """Give everything that is kept to another keeper, and have that one from now on.

        Blocks for as long as it takes to read the datagrams, some 10 µs for each descriptor.

        Raises:
            OSError: It is gone too. It counts as not there.
        """
        self.close()
        sock = _connected(address)
        try:
            for name, descriptor in self._kept.items():
                _send(sock, _kept_as(name), descriptor)
            _send(sock, "READY=1")
        except BaseException:
            sock.close()
            raise
        self._sock = sock

    def _tell(self, text: str, descriptor: int = -1) -> None:
        if self._sock is None:
            return
        try:
            _send(self._sock, text, descriptor)
        except ConnectionRefusedError:
            if not self._replaceable:
                raise

    def close(self) -> None:
        """Close the connection."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _kept_as(name: str) -> str:
    return f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0"


def _connected(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
    except BaseException:
        sock.close()
        raise
    return sock


def _send(sock: socket.socket, text: str, descriptor: int = -1) -> None:
    sock.sendmsg([text.encode()], rights([descriptor] if descriptor >= 0 else []))
