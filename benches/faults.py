"""What a fault costs by each mechanism, against the same loop in bare C."""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import quire
from benches.common import MIB, Peer, Plan, Row, median_of

SIZE = 64 * MIB
FAULTS = 4096
WINDOW = 4096
MECHANISMS = ("thread", "signal", "sigsegv")
GOAL = 1 / 1.2
SOURCE = Path(__file__).with_suffix(".c")


def library(folder: str) -> ctypes.CDLL | None:
    """Build the loop in C; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    built = Path(folder) / "faults.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-pthread", "-o", built, SOURCE], check=True)
    loaded = ctypes.CDLL(str(built))
    pointer, count = ctypes.c_void_p, ctypes.c_size_t
    loaded.touch.argtypes = [pointer, pointer, count]
    loaded.bare.argtypes = [ctypes.c_int, ctypes.c_int, pointer, count, count, pointer, count]
    loaded.touch.restype = loaded.bare.restype = ctypes.c_double
    return loaded


def measure(plan: Plan) -> list[Row]:
    """Measure every backend, without and with giving the pages to the kernel."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loop = library(folder)
        if loop is None:
            raise RuntimeError("no C compiler to build the loop with")
        data = np.random.default_rng(7).integers(0, 256, SIZE, np.uint8)
        for number, mechanism in enumerate(MECHANISMS):
            modes = ("never",) if mechanism == "sigsegv" else ("never", "kernel")
            rows += [_row(loop, data, number, mechanism, discard, plan.diffs) for discard in modes]
    return rows


def _row(loop: ctypes.CDLL, data: np.ndarray, number: int, mechanism: str, discard: str, rounds: int) -> Row:
    in_thread = mechanism != "thread"
    given = ", each page given to the kernel by MADV_FREE," if discard == "kernel" else ""
    row = Row(
        f'a fault, faults="{mechanism}", discard="{discard}"',
        f"Touches of {FAULTS} missing pages in random order, timed in C;{given} a window is a page and comes"
        " from memory. The bare loop does what the mechanism needs and nothing else: no table of regions, no"
        " states, no counters.",
    )
    peer = Peer("bare C", [], GOAL if in_thread else None)
    rng = np.random.default_rng(8)
    for round_number in range(rounds + 1):
        offsets = (rng.permutation(SIZE // WINDOW)[:FAULTS] * WINDOW).astype(np.uint64)
        group = []
        for _ in range(2):
            with quire.Region(data, faults=mechanism, window_bytes=WINDOW, discard=discard) as region:
                group.append(loop.touch(region.address, offsets.ctypes.data, FAULTS) / 1e9)
        seconds = loop.bare(
            number, discard == "kernel", data.ctypes.data, SIZE, WINDOW, offsets.ctypes.data, FAULTS
        )
        if seconds < 0:
            raise OSError(-int(seconds), "the bare loop")
        if round_number:
            row.ours.append(group)
            peer.seconds.append(seconds / 1e9)
    row.peers = [peer]
    if not in_thread:
        row.notes.append(
            "LLNL's UMap serves touches by threads that read a userfaultfd, as this row does. Its authors"
            " publish run times of applications on their machines and storage (Peng and others, 2018 and"
            " 2025), no time for a fault, so nothing is compared with it."
        )
    row.bounds = (
        f"a fault takes {1e6 * row.spread.median:.1f} µs, of which the kernel's share is that of the bare"
        f" loop, {1e6 * median_of(peer.seconds):.1f} µs; the rest is a table, two states and a copy of the"
        " page in memory"
    )
    return row
