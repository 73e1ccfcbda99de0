"""Functions that can be imported, for sources that call them in another process."""

# They are given what they need not look at.
# ruff: noqa: ARG001

import itertools
import os
import signal
import sys
import threading


def numbered(offset: int, length: int) -> bytes:
    """Bytes that tell where they are: each 8 hold their own offset."""
    start = offset // 8 * 8
    out = b"".join(at.to_bytes(8, "little") for at in range(start, offset + length, 8))
    return out[offset - start : offset - start + length]


def process_id(offset: int, length: int) -> bytes:
    return os.getpid().to_bytes(length, "little")


def too_little(offset: int, length: int) -> bytes:
    return bytes(length - 1)


def too_much(offset: int, length: int) -> bytes:
    return bytes(length + 1)


def no_bytes(offset: int, length: int) -> bytes:
    return 5  # type: ignore[return-value]


def raises(offset: int, length: int) -> bytes:
    raise ValueError("two\nlines")


def exits(offset: int, length: int) -> bytes:
    sys.exit(3)


def crashes(offset: int, length: int) -> bytes:
    os.kill(os.getpid(), signal.SIGSEGV)
    # Another thread may be the one to receive it.
    return hangs(offset, length)


def hangs(offset: int, length: int) -> bytes:
    threading.Event().wait()
    return bytes(length)


def busy(offset: int, length: int) -> bytes:
    """The process id at 0; elsewhere never returns, nor lets go of the GIL."""
    if offset == 0:
        return process_id(offset, length)
    print("busy", flush=True)
    return bytes(sum(itertools.repeat(0)))


def crashes_at_zero(offset: int, length: int) -> bytes:
    return crashes(offset, length) if offset == 0 else bytes([1]) * length


class CrashesOnce:
    """Kills its process in the middle of the first call, and the next process is fine."""

    def __init__(self, flag: str) -> None:
        self.flag = flag

    def __call__(self, offset: int, length: int) -> bytes:
        try:
            os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return numbered(offset, length)
        os.kill(os.getpid(), signal.SIGKILL)
        return b""


class Meets:
    """Calls return only once several run at the same time."""

    def __init__(self, many: int) -> None:
        self.many = many

    def __call__(self, offset: int, length: int) -> bytes:
        barrier = globals().setdefault("_barrier", threading.Barrier(self.many))
        barrier.wait(60)
        return numbered(offset, length)


def descriptors(offset: int, length: int) -> bytes:
    """What this process has open."""
    kinds = []
    for name in sorted(os.listdir("/proc/self/fd"), key=int):
        try:
            kinds.append(f"{name}={os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue
    return "\n".join(kinds).encode()[:length].ljust(length)
