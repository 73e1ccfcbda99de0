"""Fuzz what a client may send to a broker: any bytes, bent messages, any descriptors, in any pieces.

Whatever comes, the broker serves others on, its books are right, and no descriptor stays open.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import os
import pathlib
import socket
import sys
import tempfile
import time

import msgspec
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

import quire
from quire.broker import protocol

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from brokers import Inside, until  # noqa: E402
from support import descriptor_count  # noqa: E402

PAGE = 4096
KINDS = [kind for kind in protocol.ClientMessage.__args__ if kind is not protocol.Hello]

numbers = st.one_of(
    st.integers(0, 12),
    st.sampled_from([0, 1, PAGE, PAGE + 1, 2**31, 2**32 - 1, 2**47, 2**62, protocol.WHOLE, 2**63, 2**64 - 1]),
)
values = st.one_of(
    numbers,
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.lists(numbers, max_size=3),
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message whose fields are mostly of the right type."""
    kind = draw(st.sampled_from(KINDS))
    fields: dict[str, object] = {"t": kind.__struct_config__.tag}
    for name, annotation in kind.__annotations__.items() | {("id", "int")}:
        if draw(st.integers(0, 9)) == 0:
            continue
        right = (
            st.booleans()
            if annotation == "bool"
            else st.sampled_from(["a", "b"])
            if annotation in ("str", "Name")
            else numbers
        )
        fields[name] = draw(st.one_of(right, right, right, right, values))
    if kind is protocol.Acknowledge:
        fields.pop("id", None)
    if "size_bytes" in fields and isinstance(fields["size_bytes"], int):
        fields["size_bytes"] = min(fields["size_bytes"], 1 << 50)
    payload = msgspec.msgpack.encode(fields)
    if draw(st.integers(0, 9)) == 0:
        bent = bytearray(payload)
        bent[draw(st.integers(0, len(bent) - 1))] ^= draw(st.integers(1, 255))
        payload = bytes(bent)
    return payload


steps = st.lists(
    st.tuples(
        st.one_of(messages(), messages(), messages(), st.binary(max_size=40)),
        st.integers(0, 3),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def opened(kind: int) -> int:
    """A descriptor of some kind."""
    if kind == 0:
        return os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
    if kind == 1:
        return os.open("/dev/null", os.O_RDWR)
    return os.eventfd(0)


@given(script=steps, kinds=st.lists(st.integers(0, 2), max_size=3), announced=st.booleans())
def one(script: list[tuple[bytes, int, bool]], kinds: list[int], announced: bool) -> None:
    descriptors = [opened(kind) for kind in kinds]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(BROKER.path)
        sock.settimeout(5)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(protocol.encode(protocol.Hello(0, 1)))
            for payload, cut, with_descriptors in script:
                carried = descriptors if with_descriptors else []
                frame = (
                    b"QB\x01"
                    + bytes([len(carried) if announced else 0])
                    + len(payload).to_bytes(4, "little")
                    + payload
                )
                rights = (
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", carried))] if carried else []
                )
                first = max(1, len(frame) >> cut)
                sock.sendmsg([frame[:first]], rights)
                if frame[first:]:
                    sock.sendall(frame[first:])
    for descriptor in descriptors:
        os.close(descriptor)
    WITNESS.ping()


def main() -> None:
    """Run until the time is over."""
    parser = argparse.ArgumentParser(description="Fuzz the messages that a broker receives.")
    parser.add_argument("--seconds", type=float, default=60.0)
    end = time.monotonic() + parser.parse_args().seconds
    run = settings(
        max_examples=200,
        deadline=None,
        database=DirectoryBasedExampleDatabase(HERE / "corpus" / "broker"),
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )(one)
    rounds = 0
    before = descriptor_count()
    while time.monotonic() < end:
        run()
        rounds += 1
        # The books are compared when everybody who was fuzzed has gone.
        until(lambda: len(BROKER.do(lambda: BROKER.server._connections)) == 1)
        BROKER.do(
            lambda: [
                BROKER.server._ended(each)
                for each in list(BROKER.server.world.sessions.values())
                if not each.port
            ]
        )
        until(lambda: not BROKER.do(lambda: BROKER.server._tasks))
        assert BROKER.audit() == [], BROKER.audit()
        until(lambda: descriptor_count() <= before + 64)
    print(f"{rounds * 200} conversations, nothing found")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        BROKER = Inside(pathlib.Path(folder) / "broker", limit_bytes=1 << 24, frame_seconds=1)
        try:
            with quire.connect(BROKER.path) as WITNESS:
                main()
        finally:
            BROKER.close()
