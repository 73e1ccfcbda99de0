"""Keeping descriptors outside of the broker's process, by systemd's file descriptor store or the guardian.

Both speak the same protocol: datagrams to ``$NOTIFY_SOCKET`` (sd_notify(3)), and descriptors passed on at
the next start (sd_listen_fds(3)).
"""

from __future__ import annotations

import os
import socket

from quire.broker.ancillary import rights

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

    def __init__(self, address: str | None) -> None:
        """Connect.

        Args:
            address: ``$NOTIFY_SOCKET``; None where nobody keeps anything.

        Raises:
            OSError: Nobody listens there.
        """
        self._sock: socket.socket | None = None
        if address:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                self._sock.connect("\0" + address[1:] if address.startswith("@") else address)
            except BaseException:
                self._sock.close()
                raise

    @property
    def present(self) -> bool:
        """Whether somebody keeps descriptors."""
        return self._sock is not None

    def keep(self, name: str, descriptor: int) -> None:
        """Have a copy of a descriptor kept under a name.

        Raises:
            OSError: The keeper is gone.
        """
        self._tell(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", descriptor)

    def forget(self, name: str) -> None:
        """Have what is kept under a name closed.

        Raises:
            OSError: The keeper is gone.
        """
        self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def ready(self) -> None:
        """Tell that the service is up."""
        self._tell("READY=1")

    def _tell(self, text: str, descriptor: int = -1) -> None:
        if self._sock is None:
            return
        self._sock.sendmsg([text.encode()], rights([descriptor] if descriptor >= 0 else []))

    def close(self) -> None:
        """Close the connection."""
        if self._sock is not None:
            self._sock.close()
