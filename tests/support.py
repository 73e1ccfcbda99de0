"""What several tests need: children that report, the model of diff, what the kernel says of a process."""

import contextlib
import ctypes
import gc
import os
import pathlib
import re
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from leaks import descriptors

import quire

PAGE = quire.PAGE_SIZE
MIB = 1 << 20

TESTS = pathlib.Path(__file__).parent


def pattern(size: int, seed: int) -> np.ndarray:
    """Bytes that look random and hold no page of zeros."""
    return np.random.default_rng(seed).integers(1, 256, size, np.uint8)


def view(memory: object) -> np.ndarray:
    """The bytes of anything that exports a buffer, as a numpy view."""
    return np.frombuffer(memoryview(memory), np.uint8)


def content(snapshot: quire.Snapshot) -> bytes:
    """The bytes of a snapshot."""
    with snapshot.map() as mapping:
        return mapping[:]


def padded(data: np.ndarray | bytes | bytearray, pages: int) -> np.ndarray:
    """The bytes with zeros behind them, one row for each page."""
    out = np.zeros(pages * PAGE, np.uint8)
    out[: len(data)] = np.frombuffer(data, np.uint8)
    return out.reshape(pages, PAGE)


def pages_of(size: int) -> int:
    return -(-size // PAGE)


def changed_ranges(old: np.ndarray | bytes, new: np.ndarray | bytes) -> list[tuple[int, int]]:
    """What ``diff`` must report: pages whose bytes differ, or that only one of the two has."""
    both = min(pages_of(len(old)), pages_of(len(new)))
    most = max(pages_of(len(old)), pages_of(len(new)))
    differs = np.ones(most + 2, bool)
    differs[0] = differs[-1] = False
    head = both * PAGE
    differs[1 : both + 1] = (padded(old[:head], both) != padded(new[:head], both)).any(1)
    edges = np.flatnonzero(differs[1:] != differs[:-1]) * PAGE
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def descriptor_count() -> int:
    """Open descriptors, without the few that the process opens once, on first use, and keeps."""
    return sum(1 for what in descriptors().values() if not kept_for_ever(what))


def kept_for_ever(what: str) -> bool:
    """Whether a descriptor is one of those; test_leaks.py counts them."""
    return what == "anon_inode:[userfaultfd]" or what.endswith("/pagemap")


def thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def vma_count() -> int:
    with open("/proc/self/maps", "rb") as lines:
        return sum(1 for _ in lines)


def status_bytes(name: str, pid: int | str = "self") -> int:
    """A size in /proc/PID/status, such as RssShmem or RssAnon."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text("ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found, f"no {name} in /proc/{pid}/status"
    return int(found[1]) * 1024


def layer_bytes(snapshots: Iterable[quire.Snapshot]) -> int:
    """Allocated in all distinct layers of these snapshots, as the kernel counts it."""
    blocks = {}
    for snapshot in snapshots:
        for fd in snapshot._core.layer_fds():
            stat = os.fstat(fd)
            blocks[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(blocks.values())


def layer_keys(snapshots: Iterable[quire.Snapshot]) -> set[tuple[int, int]]:
    """Which layers these snapshots have."""
    return {key for snapshot in snapshots for key in snapshot._core.layer_keys()}


def shmem_names() -> set[str]:
    """What lies in the places where debris of a process could be."""
    return {f"{place}/{name}" for place in ("/dev/shm", "/tmp") for name in os.listdir(place)}


def fork(work: Callable[[], None]) -> int:
    """Run a function in a forked child; its pid. The child exits with 0, or 1 after it printed why."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python 3.12 and later warn of a fork with threads; that is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - a child must not run the parent's test on
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """How a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_forked(work: Callable[[], None]) -> None:
    """Run a function in a forked child and fail if it failed."""
    code = wait(fork(work))
    assert code == 0, f"the child ended with {code}; what it printed is above"


def expect_signal(work: Callable[[], None], number: int = signal.SIGSEGV) -> None:
    """Run a function in a forked child that this signal must kill."""

    def quietly() -> None:
        # The fault handler of pytest would print a traceback of a fault that is meant to be.
        import faulthandler

        faulthandler.disable()
        work()

    code = wait(fork(quietly))
    assert code == -number, f"the child ended with {code}, not by {signal.Signals(number).name}"


def run_script(script: str, *args: str, env: dict[str, str] | None = None) -> str:
    """Run a Python script in a process of its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=TESTS,
        env=os.environ | (env or {}),
    )
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def run_again_with_comparison(module: str) -> None:
    """Run all other tests of a module in a process that finds written pages by comparison."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not comparison",
            module,
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS.parent,
        env=os.environ | {"QUIRE_TRACKING": "compare"},
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, "failed with QUIRE_TRACKING=compare; its output is above"
    assert re.search(r"\d+ passed", done.stdout)


def compiled(folder: pathlib.Path, source: str) -> ctypes.CDLL:
    """Compile C and load it; its functions run without the GIL."""
    code, library = folder / "code.c", folder / "code.so"
    code.write_text(source, "ascii")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-pthread", "-o", library, code], check=True)
    return ctypes.CDLL(str(library))


def settle() -> None:
    """Collect what only the garbage collector frees, so that counts before and after can be compared."""
    gc.collect()


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """The block may leave no descriptor or thread more than there was."""
    settle()
    before = descriptor_count(), thread_count()
    yield
    if descriptor_count() > before[0]:
        settle()
    assert descriptor_count() <= before[0], f"{descriptor_count() - before[0]} descriptors more"
    # A joined thread has left Python, and may have a few instructions to go until the kernel ends it.
    for _ in range(200_000):
        if thread_count() <= before[1]:
            break
        os.sched_yield()
    # Fewer is no leak: a library may end its threads before a fork, as OpenBLAS does.
    assert thread_count() <= before[1], f"{thread_count() - before[1]} threads more"
