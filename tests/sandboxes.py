"""Code for sandboxes that tries to get out, and what must be left when they end."""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest
import support

PRELUDE = """
import ctypes, errno, fcntl, gc, json, mmap, os, resource, signal, socket, stat, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p
def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *(
        ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_long(a) if isinstance(a, int) else a
        for a in arguments
    )) < 0:
        raise OSError(ctypes.get_errno(), "call")
def answers():
    return next(o for o in gc.get_objects() if isinstance(o, socket.socket) and o.fileno() >= 0)
"""
MODULES = (
    "ctypes",
    "errno",
    "fcntl",
    "gc",
    "json",
    "mmap",
    "os",
    "resource",
    "signal",
    "socket",
    "stat",
    "struct",
    "subprocess",
    "sys",
    "threading",
)

ATTEMPTS = {
    # files
    "open a file": "os.open('/etc/passwd', os.O_RDONLY)",
    "make a file": "os.open('/made', os.O_CREAT | os.O_WRONLY)",
    "list the root": "os.listdir('/')",
    "make a directory": "os.mkdir('/made')",
    "see a file": "os.stat('/etc/passwd')",
    "open by an inherited directory": "os.open('etc/passwd', os.O_RDONLY, dir_fd={directory})",
    "see by an inherited directory": "os.stat('etc/passwd', dir_fd={directory})",
    "use an inherited descriptor": "os.fstat({directory})",
    "open by handle": "call({open_by_handle_at}, 0, bytes(64), 0)",
    "chroot": "os.chroot('/')",
    "chdir": "os.chdir('/..')",
    "mount": "call({mount}, b'none', b'/', b'proc', 0, 0)",
    "pivot_root": "call({pivot_root}, b'/', b'/')",
    "its own memory through proc": "os.open('/proc/self/mem', os.O_RDWR)",
    "proc of the parent": "os.stat('/proc/{parent}/mem')",
    # network
    "inet socket": "socket.socket(socket.AF_INET)",
    "abstract Unix socket": "socket.socket(socket.AF_UNIX).connect({abstract!r})",
    "netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "socketpair": "socket.socketpair()",
    "pipe": "os.pipe()",
    # other processes
    "ptrace the parent": "call({ptrace}, 16, {parent}, 0, 0)",
    "be traced": "call({ptrace}, 0, 0, 0, 0)",
    "read the parent's memory": "call({process_vm_readv}, {parent}, 0, 0, 0, 0, 0)",
    "write the parent's memory": "call({process_vm_writev}, {parent}, 0, 0, 0, 0, 0)",
    "pidfd of the parent": "os.pidfd_open({parent})",
    "descriptor of the parent": "call({pidfd_getfd}, 3, 0, 0)",
    "signal the parent": "os.kill({parent}, 0)",
    "signal everybody": "os.kill(-1, 0)",
    "signal its group": "os.kill(0, 0)",
    "signal a thread of the parent": "call({tgkill}, {parent}, {parent}, 6)",
    "queue a signal": "call({rt_sigqueueinfo}, {parent}, 9, bytes(128))",
    "stop itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "have the kernel signal": "fcntl.fcntl(1, fcntl.F_SETOWN, {parent})",
    "limits of the parent": "resource.prlimit({parent}, resource.RLIMIT_NOFILE)",
    "priority of the parent": "os.setpriority(os.PRIO_PROCESS, {parent}, 19)",
    # new processes and programs
    "fork": "os.fork()",
    "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {{}})",
    "execve": "os.execv('/bin/true', ['true'])",
    "execute a memfd": "call({execveat}, os.memfd_create('x'), b'', 0, 0, 0x1000)",
    "clone with namespaces": "call({clone}, 0x10000011, 0, 0, 0, 0)",
    "clone a thread with namespaces": "call({clone}, 0x40010F00, 0, 0, 0, 0)",
    "clone3": "call({clone3}, bytes(64), 64)",
    "unshare": "call({unshare}, 0x10000000)",
    "setns": "call({setns}, 1, 0)",
    # new code
    "executable memory": "mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 5)",
    "memory made executable": "b = ctypes.create_string_buffer(8192); "
    "call({mprotect}, ctypes.addressof(b) & -4096, 4096, 5)",
    "personality": "call({personality}, 0x0400000)",
    # facilities of the kernel
    "io_uring": "call({io_uring_setup}, 8, bytes(256))",
    "userfaultfd": "call({userfaultfd}, 1)",
    "bpf": "call({bpf}, 0, bytes(128), 128)",
    "keyctl": "call({keyctl}, 0, -3, 0, 0, 0)",
    "add_key": "call({add_key}, b'user', b'x', b'x', 1, -3)",
    "perf_event_open": "call({perf_event_open}, bytes(128), 0, -1, -1, 0)",
    "System V shared memory": "call({shmget}, 0, 4096, 0o1600)",
    "System V messages": "call({msgget}, 0, 0o1600)",
    "message queue": "call({mq_open}, b'x', 0o102, 0o600, 0)",
    "shared anonymous memory": "mmap.mmap(-1, 4096, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)",
    "secret memory": "call({memfd_secret}, 0)",
    "huge pages": "mmap.mmap(-1, 2 << 20, 0x40022)",
    "huge pages of a file": "os.memfd_create('x', os.MFD_HUGETLB)",
    "load a module": "call({init_module}, 0, 0, b'')",
    "reboot": "call({reboot}, 0, 0, 0, 0)",
    "inotify": "call({inotify_init1}, 0)",
    "set the clock": "call({settimeofday}, 0, 0)",
    "set the host's name": "socket.sethostname('x')",
    # gain rights
    "become root": "os.setuid(0)",
    "capabilities": "call({capset}, bytes(8), bytes(24))",
    "raise a limit": "call({prlimit64}, 0, 6, bytes(16), 0)",
    "prctl": "call({prctl}, 4, 1, 0, 0, 0)",
    "another filter": "call({seccomp}, 1, 0, bytes(16))",
    "terminal input": "fcntl.ioctl(1, 0x5412, b'x')",
}
"""What is tried, and the code that tries it."""

CALLS = (
    "open_by_handle_at",
    "mount",
    "pivot_root",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "pidfd_getfd",
    "tgkill",
    "rt_sigqueueinfo",
    "execveat",
    "clone",
    "clone3",
    "unshare",
    "setns",
    "mprotect",
    "personality",
    "io_uring_setup",
    "userfaultfd",
    "bpf",
    "keyctl",
    "add_key",
    "perf_event_open",
    "shmget",
    "msgget",
    "mq_open",
    "memfd_secret",
    "init_module",
    "reboot",
    "inotify_init1",
    "settimeofday",
    "capset",
    "prctl",
    "prlimit64",
    "seccomp",
)
# Younger than libseccomp may be; the same on every machine.
YOUNG = {"memfd_secret": 447, "clone3": 435, "pidfd_getfd": 438}


def numbers() -> dict[str, int]:
    """System calls by name."""
    import pyseccomp

    return {name: YOUNG.get(name) or pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) for name in CALLS}


def script(attempts: set[str], **facts: object) -> str:
    """Some of the attempts, one after the other; prints what each raised, as JSON."""
    lines = [PRELUDE, "found = {}"]
    for name, code in ATTEMPTS.items():
        if name not in attempts:
            continue
        lines += [
            "try:",
            f"    {code.format(**facts)}",
            f"    found[{name!r}] = 'succeeded'",
            "except OSError as error:",
            f"    found[{name!r}] = errno.errorcode.get(error.errno, str(error))",
        ]
    return "\n".join([*lines, "print(json.dumps(found))"])


def groups() -> set[pathlib.Path]:
    """Cgroups of sandboxes of this process."""
    return set(pathlib.Path("/sys/fs/cgroup").rglob(f"quire-sandbox-{os.getpid()}-*"))


@contextlib.contextmanager
def nothing_of_it_left() -> Iterator[None]:
    """The block leaves no descriptor, thread, child, cgroup, mount or file."""
    before = groups(), support.shmem_names(), pathlib.Path("/proc/self/mountinfo").read_text(), children()
    with support.nothing_left():
        yield
    after = groups(), support.shmem_names(), pathlib.Path("/proc/self/mountinfo").read_text(), children()
    # Other programs make files there too.
    assert not {name for name in after[1] - before[1] if "quire" in name}
    assert not after[0] - before[0]
    assert not after[3] - before[3]
    assert after[2] == before[2]


def children(pid: int | str = "self") -> set[int]:
    """Processes whose parent a process is."""
    found = set()
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found |= {int(word) for word in (task / "children").read_text().split()}
    return found


def skip_where_impossible() -> None:
    """Skip the test where this user may not make namespaces; anything else that is missing is a failure."""
    done = subprocess.run(["unshare", "-Urmpinu", "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no sandbox can be made: {done.stderr.strip()}")
