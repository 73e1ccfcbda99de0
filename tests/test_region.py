"""What a region is to its user; the backends side by side."""

import multiprocessing
import pickle

import numpy as np
import pytest
from support import PAGE, pattern

import quire

BACKENDS = ["thread", "signal", "sigsegv", "eager"]
WINDOW = 65536
DATA = pattern(20 * WINDOW + 1234, 1).tobytes()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def test_it_is_a_read_only_buffer_of_the_bytes(backend: str) -> None:
    with quire.Region(DATA, faults=backend) as region:
        assert region.size == len(region) == len(DATA)
        assert region.faults == backend
        with memoryview(region) as view:
            assert view.readonly
            assert view == DATA
        array = region.array("u1")
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(BufferError, match="exported"):
            region.close()
        del array


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_sizes(backend: str, size: int) -> None:
    with quire.Region(DATA[:size], faults=backend) as region:
        assert bytes(region) == DATA[:size]
        assert region.read(0, size) == DATA[:size]
        assert region.read(size, 0) == b""
        region.prefetch()
        with region.pin() as view:
            assert view == DATA[:size]


def test_only_what_is_touched_is_filled() -> None:
    with quire.Region(DATA, faults="thread") as region:
        assert region.stats.fills == 0
        assert region.resident().total_bytes == 0
        assert region[5 * WINDOW] == DATA[5 * WINDOW]
        assert region.stats.fills == region.stats.faults == 1
        assert region.resident() == [(5 * WINDOW, 6 * WINDOW)]
        # Counted by whoever filled, who may not be done yet.
        assert sum(count for _, count in region.stats.latency_us) <= 1


def test_reading_copies_without_views(backend: str) -> None:
    with quire.Region(DATA, faults=backend) as region:
        assert region.read(WINDOW - 3, 7) == DATA[WINDOW - 3 : WINDOW + 4]
        for offset, length in [(-1, 1), (0, len(DATA) + 1), (len(DATA) + 1, 0), (1 << 63, 1)]:
            with pytest.raises((ValueError, OverflowError)):
                region.read(offset, length)


@pytest.mark.parametrize("call", ["pin", "prefetch", "discard"])
def test_ranges_outside_are_refused(call: str) -> None:
    with quire.Region(DATA) as region:
        for offset, length in [(-1, 1), (0, len(DATA) + 1), (len(DATA) + 1, None), (0, -1)]:
            with pytest.raises(ValueError, match="outside"):
                getattr(region, call)(offset, length)


def test_discarded_windows_are_filled_again(backend: str) -> None:
    with quire.Region(DATA, faults=backend) as region:
        assert bytes(region) == DATA
        dropped = region.discard(WINDOW, 3 * WINDOW + 10)
        assert dropped == (0 if backend == "eager" else 3)
        assert bytes(region) == DATA
        assert region.stats.refills == dropped


def test_a_pinned_range_stays(backend: str) -> None:
    with quire.Region(DATA, faults=backend) as region:
        with region.pin(WINDOW + 1, 10) as view:
            assert view == DATA[WINDOW + 1 : WINDOW + 11]
            region.discard()
            assert (WINDOW, 2 * WINDOW) in list(region.resident()) or backend == "eager"
            with region.pin(WINDOW, 1):
                pass
            region.discard()
            assert region.resident().total_bytes >= WINDOW
        region.discard()
        assert region.resident().total_bytes == 0 or backend == "eager"


def test_closing_inside_a_pin_is_refused_and_after_it_works() -> None:
    region = quire.Region(DATA)
    with region.pin(0, 10), pytest.raises(BufferError):
        region.close()
    region.close()
    region.close()
    for call in (
        region.prefetch,
        region.discard,
        region.resident,
        lambda: region.read(0, 1),
        lambda: region.stats,
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert "closed" in repr(region)


def test_a_working_set_is_recorded_and_replayed(tmp_path) -> None:
    record = tmp_path / "set.json"
    with quire.Region(DATA, faults="thread") as region:
        for window in (7, 3, 12):
            assert region[window * WINDOW] == DATA[window * WINDOW]
        assert region.record(record) == 3
    with quire.Region(DATA) as region:
        assert region.replay(record, wait=True) == 3 * WINDOW
        assert region.resident().total_bytes == 3 * WINDOW
        assert region.stats.faults == 0
    with quire.Region(DATA[:-1]) as other, pytest.raises(quire.Malformed, match="recorded of"):
        other.replay(record)
    for text in ["", "[]", "{}", '{"quire": "working set", "version": 2, "size": 1, "ranges": []}']:
        record.write_text(text)
        with quire.Region(DATA) as region, pytest.raises(quire.Malformed):
            region.replay(record)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"discard": "sometimes"}, "discard is one of"),
        ({"faults": "magic"}, "faults is one of"),
        ({"window_bytes": 5000}, "power of two"),
        ({"window_bytes": 0}, "window"),
        ({"window_bytes": -4096}, "window"),
        ({"window_bytes": 1 << 40}, "power of two"),
        ({"budget_bytes": 0, "discard": "pressure"}, "budget"),
        ({"budget_bytes": 1 << 20}, "budget"),
    ],
)
def test_options_that_make_no_sense(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        quire.Region(DATA, **options)


def test_the_environment_chooses_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_FAULTS", "sigsegv")
    with quire.Region(DATA) as region:
        assert (region.faults, region.discard_mode) == ("sigsegv", "never")
    with quire.Region(DATA, faults="eager") as region:
        assert region.faults == "eager"
    monkeypatch.setenv("QUIRE_FAULTS", "magic")
    with pytest.raises(ValueError, match="names no backend"):
        quire.Region(DATA)


def test_a_snapshot_is_a_source() -> None:
    with quire.Segment(1 << 20) as segment:
        segment.array("u1")[:] = pattern(1 << 20, 3)
        with segment.snapshot() as snapshot, quire.Region(snapshot) as region:
            assert np.array_equal(region.array("u1"), pattern(1 << 20, 3))


def touch_all(region: quire.Region, results) -> None:
    results.put((bytes(region) == DATA, region.stats.fills))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("faults", ["thread", "signal", "sigsegv"])
def test_processes_share_filled_pages(method: str, faults: str) -> None:
    context = multiprocessing.get_context(method)
    results = context.Queue()
    with quire.Region(DATA, shared=True, faults=faults) as region:
        assert region[WINDOW] == DATA[WINDOW]
        child = context.Process(target=touch_all, args=(region, results))
        child.start()
        right, fills = results.get(timeout=60)
        child.join()
        assert right
        assert fills <= 21
        resident = region.resident()
        assert resident.total_bytes >= len(DATA)
        before = region.stats.fills
        assert bytes(region) == DATA
        if faults != "sigsegv":
            assert region.stats.fills == before


def test_what_is_not_shared_is_made_anew_elsewhere() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with quire.Region(DATA) as region:
        child = context.Process(target=touch_all, args=(region, results))
        child.start()
        assert results.get(timeout=60)[0]
        child.join()
    with pytest.raises(ValueError, match="closed"):
        pickle.dumps(region)


@pytest.mark.parametrize("inner", BACKENDS)
def test_a_region_of_a_region(backend: str, inner: str) -> None:
    with quire.Region(DATA, faults=inner) as below:
        with quire.Region(below, faults=backend) as region:
            assert bytes(region) == DATA
        below.discard()
