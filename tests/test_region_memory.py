"""Regions and memory: a region larger than what there is, budgets, and what keeping account costs."""

import os
import tempfile
import threading

import numpy as np
import pytest
from cgroups import memory_limit
from support import MIB, PAGE, fork, pattern, run_forked, run_script, wait

import quire

WINDOW = 65536
LIMIT = 48 * MIB
SIZE = 4 * LIMIT
MAPPED = ["thread", "signal", "sigsegv"]


def data_file(folder) -> str:
    path = folder / "data"
    block = pattern(MIB, 5).tobytes()
    with path.open("wb") as file:
        for at in range(SIZE // MIB):
            file.write(at.to_bytes(8, "little") + block[8:])
    return str(path)


def read_twice(region: quire.Region, group: str | None) -> None:
    """Read all of it twice and check every byte; the process joins the group first."""
    if group is not None:
        with open(group, "w", encoding="ascii") as procs:
            procs.write(str(os.getpid()))
    block = pattern(MIB, 5)
    blocks = region.array("u1", (SIZE // MIB, MIB))
    for _ in range(2):
        for at, got in enumerate(blocks):
            assert int.from_bytes(got[:8].tobytes(), "little") == at
            assert np.array_equal(got[8:], block[8:])


@pytest.mark.parametrize("faults", ["thread", "signal"])
def test_the_kernel_takes_pages_at_the_limit(tmp_path, faults: str) -> None:
    path = data_file(tmp_path)

    def work() -> None:
        with quire.open(path, faults=faults) as region:
            read_twice(region, group)
            assert region.discard_mode == "kernel"
            assert region.resident().total_bytes <= LIMIT
            assert region.stats.refills > 0

    with memory_limit(LIMIT) as group:
        assert wait(fork(work)) == 0


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("faults", ["thread", "signal"])
def test_pressure_makes_room_at_the_limit(tmp_path, faults: str, shared: bool) -> None:
    path = data_file(tmp_path)

    def work() -> None:
        with quire.open(path, faults=faults, discard="pressure", shared=shared) as region:
            read_twice(region, group)
            assert region.resident().total_bytes <= LIMIT
            assert region.stats.evictions > 0

    with memory_limit(LIMIT) as group:
        assert wait(fork(work)) == 0


@pytest.mark.parametrize("faults", MAPPED)
@pytest.mark.parametrize("shared", [False, True])
def test_a_budget_holds_whoever_fills(faults: str, shared: bool) -> None:
    data = pattern(64 * WINDOW, 2)
    budget = 16 * WINDOW
    options = {"discard": "pressure", "budget_bytes": budget, "shared": shared}
    with quire.Region(data, faults=faults, **options) as region:
        array = region.array("u1")
        for _ in range(2):
            for at in range(0, len(data), PAGE):
                assert array[at] == data[at]
            if region.discard_mode == "pressure":
                assert region.resident().total_bytes <= budget + MIB
        assert (region.stats.evictions > 0) == (region.discard_mode == "pressure")
        del array


@pytest.mark.parametrize("faults", ["thread", "signal"])
def test_a_large_region_costs_what_is_touched(faults: str) -> None:
    script = """
import sys, quire
from support import MIB, status_bytes
size = 1 << 40
source = quire.FileSource(sys.argv[1])
before = status_bytes("VmRSS")
with quire.Region(source, faults=sys.argv[2], window_bytes=4096) as region:
    assert region.size == size
    array = region.array("u1")
    for at in (0, size // 2 + 5, size - 1):
        assert array[at] == 0
    assert region.discard() == 3
    assert region.stats.fills == 3
    assert status_bytes("VmRSS") - before < 24 * MIB, status_bytes("VmRSS") - before
    del array
"""
    # A sparse file; the file system's own limit may be lower.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = os.path.join(folder, "sparse")
        with open(path, "wb") as file:
            file.truncate(1 << 40)
        run_script(script, path, faults)


def test_bookkeeping_that_does_not_fit_is_an_error() -> None:
    def work() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 35, 1 << 35))
        source = quire.FunctionSource(bytes, 1 << 46)
        with pytest.raises((OSError, MemoryError)):
            quire.Region(source, window_bytes=4096)

    run_forked(work)


@pytest.mark.parametrize("window", [4096, 16 * MIB])
@pytest.mark.parametrize("faults", [*MAPPED, "eager"])
def test_extreme_windows(faults: str, window: int) -> None:
    data = pattern(16 * MIB + 3 * PAGE + 1, 3)
    with quire.Region(data, faults=faults, window_bytes=window) as region:
        assert region.window_bytes == window
        array = region.array("u1")
        assert array[len(data) - 1] == data[-1]
        assert np.array_equal(array, data)
        del array


def test_thousands_of_regions() -> None:
    data = pattern(3 * PAGE, 4).tobytes()
    for faults in MAPPED:
        regions = [quire.Region(data, faults=faults, window_bytes=PAGE) for _ in range(1500)]
        assert all(region[PAGE] == data[PAGE] for region in regions)
        for region in regions[::2]:
            region.close()
        assert all(bytes(region) == data for region in regions[1::2])
        for region in regions:
            region.close()


def test_there_is_a_limit_of_regions_for_signal_handlers_and_it_is_told() -> None:
    data = bytes(range(1, 101))
    regions = []

    def make_too_many() -> None:
        for _ in range(5000):
            regions.append(quire.Region(data, faults="sigsegv"))  # noqa: PERF401 - those made count

    with pytest.raises(quire.Unsupported, match="signal handlers"):
        make_too_many()
    assert len(regions) > 4000
    assert regions[-1][99] == data[99]
    for region in regions:
        region.close()
    with quire.Region(data, faults="sigsegv") as region:
        assert bytes(region) == data


@pytest.mark.parametrize("faults", ["thread", "signal"])
def test_what_is_pinned_is_not_taken(tmp_path, faults: str) -> None:
    """Under a limit that the rest of the region exceeds by far, while others touch and discard."""
    path = data_file(tmp_path)

    def work() -> None:
        with open(group, "w", encoding="ascii") as procs:
            procs.write(str(os.getpid()))
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with quire.open(path, faults=faults) as region:
            failures: list[BaseException] = []
            done = threading.Event()

            def touch(start: int) -> None:
                at = start
                while not done.is_set():
                    at = (at * 1103515245 + 12345) % SIZE
                    assert region[at] >= 0
                    if at % 50 == 0:
                        region.discard(0, 32 * WINDOW)

            def pin() -> None:
                try:
                    for turn in range(300):
                        first = (turn * 7) % 30 * WINDOW
                        with region.pin(first, 2 * WINDOW) as view:
                            assert region.resident().total_bytes >= 2 * WINDOW
                            for part in range(0, 2 * WINDOW, PAGE):
                                # A system call on a page that is missing would fail.
                                assert os.write(writer, view[part : part + 16]) == 16
                            got = os.read(reader, 1 << 16)
                            assert got == b"".join(
                                region[first + part : first + part + 16]
                                for part in range(0, 2 * WINDOW, PAGE)
                            )
                except BaseException as error:  # noqa: BLE001 - told by the main thread
                    failures.append(error)

            touchers = [threading.Thread(target=touch, args=(n,)) for n in (1, 2)]
            pinner = threading.Thread(target=pin)
            for thread in [*touchers, pinner]:
                thread.start()
            pinner.join()
            done.set()
            for thread in touchers:
                thread.join()
            if failures:
                raise failures[0]

    with memory_limit(LIMIT) as group:
        assert wait(fork(work)) == 0
