"""A reader: is given the path of a socket, and checks what comes. Run as a program of its own.

``python -m quire.commands.demo.reader PATH``
"""

from __future__ import annotations

import socket
import sys
import time

from quire import Channel, Mapping, Snapshot
from quire.commands.demo.data import Column, aggregate, mismatches
from quire.commands.demo.talk import recv_json, send_json

__all__ = ["read"]


def read(path: str) -> None:
    """Receive versions until the writer closes the connection; answer each with a verdict.

    Raises:
        QuireError: What came is no sound snapshot.
        OSError: The connection failed.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    mapping: Mapping | None = None
    with Channel(sock, timeout=60.0) as channel:
        columns = [Column(**column) for column in recv_json(sock)["columns"]]
        while True:
            try:
                header = recv_json(sock)
            except EOFError:
                return
            snapshot = channel.recv()
            if not isinstance(snapshot, Snapshot):
                raise TypeError(f"the writer sent a {type(snapshot).__name__}")
            if mapping is None:
                mapping = snapshot.map()
            else:
                mapping.advance(snapshot)
            snapshot.close()
            mapped_ns = time.monotonic_ns()
            found = aggregate(columns, mapping)
            verdict = {
                "version": header["version"],
                "handover_ns": mapped_ns - header["sent_ns"],
                "aggregate_ns": time.monotonic_ns() - mapped_ns,
                "copied_pages": mapping.copied_pages,
                "wrong": mismatches(header["aggregates"], found),
            }
            send_json(sock, verdict)
            if verdict["wrong"]:
                # The writer is told; should this end be noticed first, it says the same.
                sys.exit(
                    f"found version {header['version']} inconsistent: " + "; ".join(verdict["wrong"][:3])
                )


if __name__ == "__main__":
    try:
        read(sys.argv[1])
    except (BrokenPipeError, ConnectionResetError):
        sys.exit("the writer is gone")
