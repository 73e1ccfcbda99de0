"""How the demo's processes talk: JSON messages on sockets, JSON lines on standard streams."""

from __future__ import annotations

import json
import struct
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

__all__ = ["announce", "ask", "recv_json", "send_json"]

_LENGTH = struct.Struct("<I")
MAX_MESSAGE_BYTES = 64 << 20


def send_json(sock: socket.socket, message: dict[str, Any]) -> None:
    """Send one message: its length in 4 bytes, then JSON. Blocks as the socket's timeout says."""
    data = json.dumps(message).encode()
    sock.sendall(_LENGTH.pack(len(data)) + data)


def recv_json(sock: socket.socket) -> dict[str, Any]:
    """Receive one message and nothing beyond it. Blocks as the socket's timeout says.

    Raises:
        EOFError: The peer closed the connection.
        ValueError: What came is no message.
    """
    (length,) = _LENGTH.unpack(_recv_exactly(sock, _LENGTH.size))
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes is longer than {MAX_MESSAGE_BYTES}")
    message = json.loads(_recv_exactly(sock, length))
    if not isinstance(message, dict):
        raise ValueError(f"a message is a JSON object, not {type(message).__name__}")
    return message


def _recv_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError(f"the connection closed after {len(data)} of {size} bytes")
        data += part
    return bytes(data)


def announce(event: str, **details: Any) -> None:
    """Tell the command that started this program, on standard output, what happened."""
    sys.stdout.write(json.dumps({"event": event, **details}) + "\n")
    sys.stdout.flush()


def ask(event: str, **details: Any) -> None:
    """Tell the command something, and wait until it has acted on it.

    Raises:
        EOFError: The command is gone.
    """
    announce(event, **details)
    if not sys.stdin.readline():
        raise EOFError("the command that started this program is gone")
