"""A list of system calls for real processes that run nothing else.

The first process of a list is a fork of this one. It closes what it has open, unmaps everything but the list
and the page of code that makes the calls, and is then an empty space in which every address is free. It may
fork; a list says who makes which call, and hands the turn from one process to another over pipes, so that the
order of all calls is fixed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import select
import signal
import struct
from pathlib import Path
from typing import Self

from quire._native import PAGE_SIZE, calls_code_address, spawn_calls
from quire.errors import Unsupported

LIST_AT = 0x4000_0000
LIST_BYTES = 32 << 20
TIMEOUT_SECONDS = 60
# Records lie before it, what they point to behind it.
_DATA_AT = LIST_BYTES // 2

_RECORD = struct.Struct("<7QqQQ")
_ADDRESS = struct.Struct("<Q")
_RESULT = struct.Struct("<q")
_NOUGHTS = [(0,) * (6 - count) for count in range(7)]
_RESULT_AT, _NEXT_AT, _ZERO_AT = 56, 64, 72

# Numbers of x86-64 and of aarch64, which has the common table.
NUMBERS = {
    "brk": (12, 214),
    "clone": (56, 220),
    "close": (3, 57),
    "close_range": (436, 436),
    "exit_group": (231, 94),
    "ioctl": (16, 29),
    "lseek": (8, 62),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "openat": (257, 56),
    "prctl": (157, 167),
    "pwrite64": (18, 68),
    "read": (0, 63),
    "wait4": (61, 260),
    "write": (1, 64),
}
_AT_FDCWD = (1 << 64) - 100
_CLOSE_ALL = 0xFFFF_FFFF
_PR_SET_PDEATHSIG = 1
_PR_SET_THP_DISABLE = 41
# Descriptors of this process that a child keeps begin here, so that those it opens have small numbers.
_FIRST_KEPT = 200

# What the calls of a process find under these descriptors.
FD_ZERO, FD_MAPS, FD_PAGEMAP, FD_SMAPS = range(4)


def number_of(name: str) -> int:
    """Return the number of a system call on this machine; Unsupported if it is none of those known here."""
    machine = platform.machine()
    if machine not in ("x86_64", "aarch64"):
        raise Unsupported(
            f"the numbers of the system calls of {machine} are not known; only x86_64 and aarch64"
        )
    return NUMBERS[name][machine == "aarch64"]


class _Memory:
    """Shared memory at a low fixed address, away from where the kernel places mappings."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        # Shared, anonymous, fixed, not in place of anything.
        got = libc.mmap(LIST_AT, LIST_BYTES, 3, 0x100000 | 0x20 | 0x01, -1, 0)
        if got != LIST_AT:
            number = ctypes.get_errno()
            raise OSError(number, f"mmap at {LIST_AT:#x}: {os.strerror(number)}")
        self._libc = libc
        self.bytes = memoryview((ctypes.c_char * LIST_BYTES).from_address(LIST_AT)).cast("B")

    def close(self) -> None:
        self.bytes.release()
        self._libc.munmap(LIST_AT, LIST_BYTES)


class CallList:
    """System calls of a tree of processes, built and then run, any number of times one after the other.

    Only one may exist in a process at a time. Addresses given to calls are those of the processes.
    Descriptors below 4 are the constants ``FD_…``. Use it in a ``with`` block.

    Attributes:
        code: Where the page of code is.
        scratch: Descriptor, in the processes, of a file that may be written to.
    """

    def __init__(self) -> None:
        self._memory = _Memory()
        self._bytes = self._memory.bytes
        self._numbers = {name: number_of(name) for name in NUMBERS}
        self._kept: list[int] = []
        self._pipes: list[tuple[int, int]] = []
        self._tails: list[list[int]] = []
        self._end = _DATA_AT
        self._records_end = 0
        self._last = -1
        code = calls_code_address()
        self.code = code - code % PAGE_SIZE
        self.brk_start = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[44])
        lines = Path("/proc/self/maps").read_bytes().splitlines()
        self._end_of_space = max(
            int(line.partition(b" ")[0].partition(b"-")[2], 16) for line in lines if b"[vsyscall]" not in line
        )
        self.running = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_kept()
        self._memory.close()

    def begin(self, processes: int, files: list[int]) -> list[int]:
        """Begin a new list.

        Args:
            processes: How many there will be at most.
            files: Descriptors of this process that the processes of the list may use; they are duplicated.

        Returns:
            The numbers that the files have in the processes.
        """
        self._close_kept()
        self._end = _DATA_AT
        self._records_end = 0
        self._last = -1
        self._tails = [[] for _ in range(processes)]
        kept = [self._keep(fd) for fd in files]
        scratch = os.memfd_create("quire-scratch")
        self.scratch = self._keep(scratch)
        os.close(scratch)
        for _ in range(processes):
            ends = os.pipe()
            self._pipes.append((self._keep(ends[0]), self._keep(ends[1])))
            for end in ends:
                os.close(end)
        self._token = self.data(b"t")
        self.running = 0
        self._open(0)
        return kept

    def data(self, content: bytes) -> int:
        """Put bytes where the processes see them; return the address."""
        address = self.room(len(content))
        self._bytes[address - LIST_AT : address - LIST_AT + len(content)] = content
        return address

    def room(self, size: int) -> int:
        """Reserve zeros where the processes see them; return the address, a multiple of 8."""
        start = self._end
        self._end += (size + 7) & ~7
        if self._end > LIST_BYTES:
            raise MemoryError(f"a list of calls may have {LIST_BYTES} bytes")
        self._bytes[start : start + size] = bytes(size)
        return LIST_AT + start

    def call(self, name: str, *arguments: int) -> int:
        """Add a call of the process whose turn it is; return the record, for `result`."""
        return self._add(self._numbers[name], arguments)

    def _add(self, number: int, arguments: tuple[int, ...]) -> int:
        start = self._records_end
        self._records_end = end = start + _RECORD.size
        if end > _DATA_AT:
            raise MemoryError(f"a list may have {_DATA_AT // _RECORD.size} calls")
        record = LIST_AT + start
        after = LIST_AT + end
        padded = arguments + _NOUGHTS[len(arguments)]
        _RECORD.pack_into(self._bytes, start, number, *padded, -38, after, after)
        running = self.running
        tail = self._tails[running]
        # A record leads to the one behind it until another process makes the next call.
        if running != self._last or len(tail) != 2:
            for field in tail:
                _ADDRESS.pack_into(self._bytes, field, record)
            self._last = running
        self._tails[running] = [start + _NEXT_AT, start + _ZERO_AT]
        return record

    def read_all(self, fd: int, chunks: int) -> tuple[int, list[int]]:
        """Add calls that read a file of /proc from its start.

        Args:
            fd: Which.
            chunks: How many pages at most; each read returns one at most.

        Returns:
            The address of the bytes of the first read, those of the others following page by page, and the
            records.
        """
        self.call("lseek", fd, 0, 0)
        address = self.room(chunks * PAGE_SIZE)
        records = []
        ended = []
        number = self._numbers["read"]
        for chunk in range(chunks):
            records.append(self._add(number, (fd, address + chunk * PAGE_SIZE, PAGE_SIZE)))
            # A read of nothing is the last: what it leads to is what comes after all of them.
            ended.append(records[-1] - LIST_AT + _ZERO_AT)
        self._tails[self.running] += ended[:-1]
        return address, records

    def fork(self, child: int) -> int:
        """Let the process whose turn it is fork process number ``child``; return the record."""
        record = self.call("clone", signal.SIGCHLD, 0, 0, 0, 0)
        self._tails[child] = [self._tails[self.running].pop()]
        parent, self.running = self.running, child
        for fd in (FD_MAPS, FD_PAGEMAP, FD_SMAPS):
            self.call("close", fd)
        self._open_own()
        self._wait_turn()
        self.running = parent
        return record

    def switch(self, process: int) -> None:
        """Let another process make the next calls."""
        if process != self.running:
            self.call("write", self._pipes[process][1], self._token, 1)
            self._wait_turn()
            self.running = process

    def end(self, child: int) -> None:
        """Let a child of the process whose turn it is end, and wait for it."""
        parent = self.running
        self.call("write", self._pipes[child][1], self._token, 1)
        self.running = child
        self.call("exit_group", 0)
        self.running = parent
        self.call("wait4", (1 << 64) - 1, 0, 0, 0)

    def run(self) -> None:
        """End the first process and run the list.

        Blocks until all is done, up to a minute. The other processes must have ended.

        Raises:
            RuntimeError: The first process was ended by a signal: the list unmapped its own code, or another
                process gave the turn to nobody.
        """
        self.running = 0
        self.call("exit_group", 0)
        pid = spawn_calls(LIST_AT)
        watch = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(watch, select.POLLIN)
            if not poll.poll(TIMEOUT_SECONDS * 1000):
                signal.pidfd_send_signal(watch, signal.SIGKILL)
        finally:
            os.close(watch)
            _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError(f"the process of a list of calls ended with status {status:#x}")

    def result(self, record: int) -> int:
        """Return what a call returned, a negative errno if it failed; -38 if it was not made."""
        value: int = _RESULT.unpack_from(self._bytes, record - LIST_AT + _RESULT_AT)[0]
        return value

    def bytes_at(self, address: int, size: int) -> bytes:
        """Return bytes that the processes wrote to the list's memory."""
        return bytes(self._bytes[address - LIST_AT : address - LIST_AT + size])

    def text(self, address: int, records: list[int]) -> bytes:
        """Return what `read_all` has read."""
        parts: list[bytes] = []
        for chunk, record in enumerate(records):
            size = self.result(record)
            if size <= 0:
                return b"".join(parts)
            parts.append(self.bytes_at(address + chunk * PAGE_SIZE, size))
        raise MemoryError(f"a file of /proc has more than {len(records)} pages")

    def _keep(self, fd: int) -> int:
        kept = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_KEPT)
        self._kept.append(kept)
        return kept

    def _close_kept(self) -> None:
        for fd in self._kept:
            os.close(fd)
        self._kept.clear()
        self._pipes.clear()

    def _open(self, process: int) -> None:
        """Add what the first process does to become an empty space."""
        self.running = process
        self.call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
        self.call("prctl", _PR_SET_THP_DISABLE, 1)
        first = 0
        for kept in sorted(self._kept):
            if kept > first:
                self.call("close_range", first, kept - 1, 0)
            first = kept + 1
        self.call("close_range", first, _CLOSE_ALL, 0)
        self._open_file(b"/dev/zero\0", os.O_RDONLY)
        self._open_own()
        self.call("brk", self.brk_start)
        gaps = sorted([(LIST_AT, LIST_AT + LIST_BYTES), (self.code, self.code + PAGE_SIZE)])
        start = 0
        for low, high in [*gaps, (self._end_of_space, 0)]:
            self.call("munmap", start, low - start)
            start = high

    def _open_own(self) -> None:
        self._open_file(b"/proc/self/maps\0", os.O_RDONLY)
        self._open_file(b"/proc/self/pagemap\0", os.O_RDONLY)
        self._open_file(b"/proc/self/smaps\0", os.O_RDONLY)

    def _open_file(self, path: bytes, flags: int) -> None:
        self.call("openat", _AT_FDCWD, self.data(path), flags, 0o600)

    def _wait_turn(self) -> None:
        self.call("read", self._pipes[self.running][0], self._token, 1)
