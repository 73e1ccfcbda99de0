"""Children with an address space that a test knows."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

PRELUDE = """
import ctypes, mmap, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = 4096
def map_memory(size, prot=3, flags=0x22, fd=-1, offset=0, at=None):
    address = libc.mmap(at, size, prot, flags, fd, offset)
    if address in (None, 2**64 - 1):
        raise OSError(ctypes.get_errno(), "mmap")
    return address
def touch(address, pages=1):
    for page in range(pages):
        ctypes.memset(address + page * PAGE, 7, 1)
def ready(*what):
    print(*what, flush=True)
"""
WAIT = "\nsys.stdin.buffer.read()\n"


@contextlib.contextmanager
def child(
    body: str, *, wait: bool = True, user: int | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], list[str]]]:
    """Run Python code in a process of its own until the block ends.

    The code calls ``ready(...)`` once; its words are returned. It ends when its standard input does.
    """
    script = PRELUDE + body + (WAIT if wait else "")
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=user
    )
    assert process.stdin
    assert process.stdout
    try:
        words = process.stdout.readline().decode().split()
        assert words, f"the child ended with {process.wait()} before it was ready"
        yield process, words
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def proc_maps(pid: int | str) -> list[bytes]:
    """The lines of maps as the kernel gives them."""
    with open(f"/proc/{pid}/maps", "rb") as file:
        return file.read().splitlines()


def as_nobody() -> bool:
    """Whether this process may become another user."""
    return os.geteuid() == 0
