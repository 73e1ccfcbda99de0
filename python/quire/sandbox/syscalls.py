"""Which system calls sandboxed code may make: a list of what is allowed, compiled by libseccomp.

All else fails with EPERM, so that a library that tries something gets an error it can handle. The program is
compiled in the process that starts sandboxes, once, and handed over as bytes.
"""

from __future__ import annotations

import errno
import functools
import mmap
import signal
import tempfile
from typing import TYPE_CHECKING

from quire.errors import Unsupported

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["ALLOWED", "program"]

ALLOWED = (
    # The descriptors it was given, and sealed memory that it makes (memfd_create has a condition).
    # Nothing here takes a path to open.
    "read",
    "readv",
    "pread64",
    "preadv",
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "sendmsg",
    "close",
    "dup",
    "lseek",
    "fstat",
    "newfstatat",
    "ftruncate",
    "fallocate",
    "poll",
    "ppoll",
    "select",
    "pselect6",
    # Its own memory; mmap and mprotect have conditions.
    "munmap",
    "mremap",
    "madvise",
    "brk",
    # Itself and its threads; clone and tgkill have conditions.
    "exit",
    "exit_group",
    "futex",
    "set_robust_list",
    "rseq",
    "restart_syscall",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sigaltstack",
    "sched_yield",
    "sched_getaffinity",
    "getpid",
    "gettid",
    "getppid",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "getrlimit",
    "getrusage",
    "times",
    "sysinfo",
    "uname",
    "getcpu",
    # Time and chance.
    "nanosleep",
    "clock_nanosleep",
    "clock_gettime",
    "clock_getres",
    "gettimeofday",
    "time",
    "getrandom",
)
"""Calls that are allowed whatever their arguments are."""

# Not F_SETOWN and F_SETSIG, which have the kernel send signals to others.
_FCNTL_COMMANDS = (
    0,
    1,
    2,
    3,
    1030,
    1033,
    1034,
)  # F_DUPFD to F_GETFL, F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS
_MAP_HUGETLB, _MFD_HUGETLB = 0x4_0000, 4
_CLONE_THREAD = 0x0001_0000
_CLONE_NEW = 0x7E02_0000  # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_INIT = 1  # what the process is called in its own pid namespace

_NEEDED = "install libseccomp (Debian: libseccomp2) and the extra quire[sandbox]"


@functools.cache
def program() -> bytes:
    """Compile the filter for this machine.

    Returns:
        An array of ``struct sock_filter``, for ``seccomp(SECCOMP_SET_MODE_FILTER)``.

    Raises:
        Unsupported: libseccomp or its Python binding is not installed.
    """
    try:
        import pyseccomp  # noqa: PLC0415 - an extra
    except (ImportError, RuntimeError) as error:
        # The binding raises RuntimeError where it finds no library.
        raise Unsupported(f"a sandbox needs a seccomp filter, and there is no library: {_NEEDED}") from error
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ERRNO(errno.EPERM))
    for name in ALLOWED:
        if _known(pyseccomp, name):
            rules.add_rule(pyseccomp.ALLOW, name)
    arg, equal, masked = pyseccomp.Arg, pyseccomp.EQ, pyseccomp.MASKED_EQ
    # No code but what was loaded before, and no shared memory without a descriptor, which no limit would
    # count.
    no_code = arg(2, masked, mmap.PROT_EXEC, 0)
    # No huge pages either: they come from a pool of the machine that no cgroup of memory counts.
    kinds = mmap.MAP_SHARED | mmap.MAP_PRIVATE | _MAP_HUGETLB
    rules.add_rule(pyseccomp.ALLOW, "mmap", no_code, arg(3, masked, kinds, mmap.MAP_PRIVATE))
    rules.add_rule(
        pyseccomp.ALLOW, "mmap", no_code, arg(3, masked, kinds | mmap.MAP_ANONYMOUS, mmap.MAP_SHARED)
    )
    rules.add_rule(pyseccomp.ALLOW, "memfd_create", arg(1, masked, _MFD_HUGETLB, 0))
    rules.add_rule(pyseccomp.ALLOW, "mprotect", no_code)
    # Threads, no processes and no namespaces. The flags of clone3 are in memory, where no filter can look: as
    # if the kernel did not have it, and the C library uses clone.
    rules.add_rule(pyseccomp.ALLOW, "clone", arg(0, masked, _CLONE_THREAD | _CLONE_NEW, _CLONE_THREAD))
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for command in _FCNTL_COMMANDS:
        rules.add_rule(pyseccomp.ALLOW, "fcntl", arg(1, equal, command))
    # A thread may end its own process (abort does), which bears this number only in its own namespace.
    rules.add_rule(pyseccomp.ALLOW, "tgkill", arg(0, equal, _INIT), arg(2, equal, signal.SIGABRT))
    # Ask for its own limits, not set them.
    rules.add_rule(pyseccomp.ALLOW, "prlimit64", arg(0, equal, 0), arg(2, equal, 0))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _known(pyseccomp: ModuleType, name: str) -> bool:
    """Whether this machine has the call: newer machines lack the oldest ones."""
    try:
        return int(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)) >= 0
    except (OSError, ValueError):
        return False
