"""Regions where something is forbidden: no userfaultfd, or only that of user mode."""

import ctypes
import errno
import os
import platform
import pwd
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support import fork, pattern, wait

import quire

WINDOW = 65536
SIZE = 10 * WINDOW
DATA = pattern(SIZE, 51).tobytes()
SETTING = Path("/proc/sys/vm/unprivileged_userfaultfd")
DEVICE = Path("/dev/userfaultfd")
# The architecture as seccomp names it, and the number of the call.
USERFAULTFD = {"x86_64": (0xC000003E, 323), "aarch64": (0xC00000B7, 282)}


def forbid_userfaultfd() -> None:
    """A filter that refuses the system call, as that of containers does."""
    machine = platform.machine()
    if machine not in USERFAULTFD:
        pytest.skip(f"the number of userfaultfd is not known on {machine}")
    architecture, number = USERFAULTFD[machine]
    program = [
        (0x20, 0, 0, 4),  # load the architecture
        (0x15, 0, 3, architecture),
        (0x20, 0, 0, 0),  # load the number
        (0x15, 0, 1, number),
        (0x06, 0, 0, 0x00050000 | errno.EPERM),
        (0x06, 0, 0, 0x7FFF0000),  # allow
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_ulong(value) for value in (1, 0, 0, 0)]
    assert libc.prctl(38, *arguments) == 0, "PR_SET_NO_NEW_PRIVS"
    arguments = [
        ctypes.c_ulong(2),
        ctypes.c_void_p(ctypes.addressof(filter_)),
        ctypes.c_ulong(0),
        ctypes.c_ulong(0),
    ]
    assert libc.prctl(22, *arguments) == 0, f"PR_SET_SECCOMP: {os.strerror(ctypes.get_errno())}"


def become_nobody() -> None:
    user = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    # Dumpable again, so that it may look at its own /proc, as a process that started so may.
    assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0


def unprivileged(work: Callable[[], None]) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    if DEVICE.exists() and DEVICE.stat().st_mode & 0o006:
        pytest.skip(f"anybody may open {DEVICE}")
    if SETTING.read_text("ascii").strip() != "0":
        pytest.skip(f"{SETTING} allows everything to anybody")

    def child() -> None:
        become_nobody()
        work()

    assert wait(fork(child)) == 0


def right_everywhere(region: quire.Region) -> None:
    assert region[3 * WINDOW] == DATA[3 * WINDOW]
    assert bytes(region) == DATA
    region.discard()
    assert region.read(1, SIZE - 1) == DATA[1:]
    with region.pin(WINDOW, 5) as view, open("/dev/null", "wb", buffering=0) as null:
        assert null.write(view) == 5
    assert wait(fork(lambda: memoryview(region) == DATA or os._exit(9))) == 0
    region.discard()
    assert bytes(region) == DATA


def without_any() -> None:
    for faults in ("thread", "signal"):
        with pytest.raises(quire.Unsupported, match=r"vm\.unprivileged_userfaultfd=1.*seccomp"):
            quire.Region(DATA, faults=faults)
    for options in ({}, {"shared": True}, {"discard": "pressure", "budget_bytes": 4 * WINDOW}):
        with quire.Region(DATA, **options) as region:
            assert region.faults == "sigsegv"
            assert not region.serves_system_calls
            right_everywhere(region)
    with quire.Region(DATA, faults="eager") as region:
        assert region.serves_system_calls
        right_everywhere(region)


def in_user_mode_only() -> None:
    with quire.Region(DATA) as region:
        assert region.faults == "thread"
        assert region.discard_mode == "kernel"
        assert not region.serves_system_calls
        reader, writer = os.pipe()
        with (
            memoryview(region) as view,
            view[5 * WINDOW : 5 * WINDOW + 5] as part,
            pytest.raises(OSError, match="Bad address"),
        ):
            os.write(writer, part)
        os.close(reader)
        os.close(writer)
        right_everywhere(region)
    for faults in ("signal", "sigsegv"):
        with quire.Region(DATA, faults=faults) as region:
            right_everywhere(region)


def test_a_user_without_privileges() -> None:
    unprivileged(in_user_mode_only)


def test_a_user_without_privileges_under_a_filter() -> None:
    def work() -> None:
        forbid_userfaultfd()
        without_any()

    unprivileged(work)


def test_a_filter_alone_leaves_the_device() -> None:
    def child() -> None:
        forbid_userfaultfd()
        if DEVICE.exists() and os.access(DEVICE, os.R_OK | os.W_OK):
            with quire.Region(DATA) as region:
                assert region.faults == "thread"
                right_everywhere(region)
        else:
            without_any()

    assert wait(fork(child)) == 0


def test_too_few_descriptors_for_userfaultfd_is_told() -> None:
    def child() -> None:
        import resource

        most = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        held = []
        try:
            while True:
                held.append(os.dup(2))
        except OSError:
            pass
        with pytest.raises((OSError, quire.Unsupported), match=r"[Tt]oo many open files"):
            quire.Region(DATA, faults="sigsegv")
        for fd in held:
            os.close(fd)
        with quire.Region(DATA, faults="sigsegv") as region:
            assert bytes(region) == DATA

    assert wait(fork(child)) == 0
