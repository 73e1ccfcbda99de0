"""Reading ``/proc/PID`` of one process, and of no other that gets its number later."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from quire.closing import Closing

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Folder", "Identity"]

_CHUNK_BYTES = 64 << 10
_PF_KTHREAD = 0x0020_0000


class Identity(NamedTuple):
    """What ``/proc/PID/stat`` tells a process by.

    Attributes:
        pid: The number of the process (of its thread group, also when a thread's number was asked for).
        command: ``comm``, at most 15 bytes, as the process gave it to itself.
        start_ticks: When it started, in clock ticks since boot: with ``pid`` it names one process for ever.
        state: One letter: ``R`` running, ``S`` sleeping, ``Z`` ended but not waited for, and so on.
        threads: How many threads it has; 0 for one that has ended.
        is_kernel_thread: It runs in the kernel and has no address space.
        program: Where program text and stack begin, which execve changes; zeros where that is not shown.
    """

    pid: int
    command: bytes
    start_ticks: int
    state: str
    threads: int
    is_kernel_thread: bool
    program: tuple[int, int]


def _open_folder(pid: int | str) -> int:
    try:
        return os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(
            errno.ESRCH, f"there is no process {pid}, or /proc is mounted so that this user cannot see it"
        ) from None


class Folder(Closing):
    """An open ``/proc/PID``.

    The descriptor belongs to the process, not to the number: when the process is gone, reads fail, even if
    its number is used again.

    Args:
        pid: The number of a process, or of one of its threads, or ``self``.

    Raises:
        ProcessLookupError: There is no such process, or ``/proc`` hides it from this user.
        TypeError, ValueError: ``pid`` is neither.
    """

    __slots__ = ("_fd", "pid")

    pid: int | str

    def __init__(self, pid: int | str) -> None:
        if pid != "self" and (not isinstance(pid, int) or isinstance(pid, bool)):
            raise TypeError(f"a process is named by its number or 'self', not by {pid!r}")
        if isinstance(pid, int) and pid <= 0:
            raise ValueError(f"the number of a process is positive, not {pid}")
        self.pid = pid
        self._fd = _open_folder(pid)
        try:
            group = self._group()
            if group != pid:
                # A thread's folder shows the same memory, but times of its own; meant is the process.
                os.close(self._fd)
                self._fd = -1
                self.pid = group
                self._fd = _open_folder(group)
        except BaseException:
            self.close()
            raise

    def _group(self) -> int:
        for line in self.read("status").splitlines():
            if line.startswith(b"Tgid:"):
                return int(line[5:])
        raise OSError(errno.EIO, f"/proc/{self.pid}/status has no Tgid")

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Open a file of the process for reading, for a block whose failures are explained.

        Raises:
            ProcessLookupError: The process is gone.
            PermissionError: The kernel does not let this user look at the process.
            FileNotFoundError: This kernel has no such file.
        """
        with self._explained(name):
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                yield fd
            finally:
                os.close(fd)

    def read(self, name: str) -> bytes:
        """Read a whole file. Blocks as the kernel does, without the GIL. Raises as ``opened`` does."""
        chunks = []
        with self.opened(name) as fd:
            while chunk := os.read(fd, _CHUNK_BYTES):
                chunks.append(chunk)
        return b"".join(chunks)

    def readlink(self, name: str) -> bytes:
        """Read a symbolic link. Raises as ``opened`` does."""
        with self._explained(name):
            return os.readlink(os.fsencode(name), dir_fd=self._fd)

    def threads(self) -> list[int]:
        """List the numbers of the threads. Raises as ``opened`` does."""
        with self.opened("task") as fd:
            return [int(name) for name in os.listdir(fd)]

    def identity(self) -> Identity:
        """Read what tells this process from others. Raises as ``opened`` does."""
        text = self.read("stat")
        # The command stands in parentheses and may hold any bytes, parentheses and blanks too.
        first, _, rest = text.partition(b" (")
        command, _, tail = rest.rpartition(b") ")
        fields = tail.split()
        return Identity(
            pid=int(first),
            command=command,
            start_ticks=int(fields[19]),
            state=fields[0].decode("ascii"),
            threads=int(fields[17]),
            is_kernel_thread=bool(int(fields[6]) & _PF_KTHREAD),
            program=(int(fields[23]), int(fields[25])),
        )

    def status_bytes(self) -> dict[str, int]:
        """Read the sizes of ``status``, such as ``VmPTE``, in bytes. Raises as ``opened`` does."""
        sizes = {}
        for line in self.read("status").splitlines():
            name, _, value = line.partition(b":")
            if value.endswith(b" kB"):
                sizes[name.decode("ascii", "replace")] = int(value[:-3]) * 1024
        return sizes

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn what the kernel answers into what it means."""
        try:
            yield
        except PermissionError as error:
            raise PermissionError(
                error.errno,
                f"/proc/{self.pid}/{name}: this user may not look at process {self.pid};"
                " it takes the same user and a process that is dumpable, or CAP_SYS_PTRACE",
            ) from None
        except (FileNotFoundError, ProcessLookupError):
            if self._exists():
                raise
            raise ProcessLookupError(errno.ESRCH, f"process {self.pid} has ended") from None

    def _exists(self) -> bool:
        try:
            os.stat("stat", dir_fd=self._fd)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return True
