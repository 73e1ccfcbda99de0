"""The helper for functions that cannot be pickled: a fork of the process that has them."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import stat
import sys
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

from quire.helper import worker

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["start"]


def start(fill: Callable[[int, int], Any], parallel: int) -> socket.socket:
    """Fork a process that forks a worker for every connection it is sent.

    It lives until all copies of the returned socket are closed.

    Returns:
        The socket to send connections to: socket, memory and lifeline with one byte.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with warnings.catch_warnings():
        # Of a fork with threads: what can be done about it is done in `_enter`.
        warnings.simplefilter("ignore", DeprecationWarning)
        between = os.fork()
    if between == 0:
        try:
            # Twice, so that it is nobody's child and no `wait` of the program meets it.
            if os.fork() == 0:
                _enter(theirs)
                _listen(theirs, fill, parallel)
        finally:
            os._exit(1)
    theirs.close()
    # A thread of the program that waits for any child may have been faster.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(between, 0)
    return ours


def _enter(control: socket.socket) -> None:
    """Become independent of the process that was forked."""
    os.setsid()
    # References of other threads are gone; what is left must not be collected, it may own what is not ours.
    gc.freeze()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers are reaped by the kernel
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _let_go(control.fileno())


def _let_go(keep: int) -> None:
    """Drop inherited descriptors that somebody may wait for the end of.

    Files stay, since the function may read them, and so does what memory is made of: a userfaultfd that is
    closed would leave zeros behind. The numbers of the others stay taken, so that an object which still has
    one cannot close a descriptor of ours; using them gives EBADF.
    """
    nothing = os.open("/", os.O_PATH)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd in (1, 2, keep, nothing):
            continue
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode) or os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]":
                continue
            os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    if null:
        os.close(null)


def _listen(control: socket.socket, fill: Callable[[int, int], Any], parallel: int) -> NoReturn:
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1, 3)
        if not message:
            os._exit(0)
        if len(fds) == 3 and os.fork() == 0:
            try:
                _work(control, fds, fill, parallel)
            finally:
                os._exit(1)
        for fd in fds:
            os.close(fd)


def _work(control: socket.socket, fds: list[int], fill: Callable[[int, int], Any], parallel: int) -> NoReturn:
    control.close()
    sock, memory, lifeline = fds
    os.setpgid(0, 0)
    worker.die_with(lifeline)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection = worker.Connection(socket.socket(fileno=sock), memory)
    connection.ready()
    worker.serve(connection, fill, parallel)
