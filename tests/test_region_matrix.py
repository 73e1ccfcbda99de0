"""Every source by every backend and way of discarding shows the bytes that plain reading gives."""

import gzip
import itertools
import random
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
import zstdfiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import PAGE, fork, pattern, wait

import quire
from quire import sources

WINDOW = 65536
SIZE = 9 * WINDOW + 1234
BACKENDS = ["thread", "signal", "sigsegv", "eager"]
DISCARDS = ["kernel", "pressure", "never"]
# Half of it compresses, and no page is all zeros.
DATA = b"".join(
    pattern(PAGE // 2, at).tobytes() + b"%7d " % at * (PAGE // 16) for at in range(SIZE // PAGE + 1)
)[:SIZE]


def zip_member(folder: Path, method: int) -> Path | str:
    path = folder / f"archive-{method}.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("other", b"x" * 777)
        archive.writestr("member", DATA)
    return f"{path}!/member"


def zstandard_member(folder: Path) -> str:
    """The library has no method 93 yet, so a stored member of the packed bytes is renamed."""
    packed = zstandard.compress(DATA)
    path = folder / "archive-93.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("member", packed)
    raw = bytearray(path.read_bytes())
    check = gzip.zlib.crc32(DATA).to_bytes(4, "little")
    for mark, method, crc in ((b"PK\1\2", 10, 16), (b"PK\3\4", 8, 14)):
        at = raw.rindex(mark)
        raw[at + method : at + method + 2] = (93).to_bytes(2, "little")
        raw[at + crc : at + crc + 4] = check
        raw[at + crc + 8 : at + crc + 12] = len(DATA).to_bytes(4, "little")
    path.write_bytes(raw)
    return f"{path}!/member"


def written(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def snapshot_of(data: bytes) -> quire.Snapshot:
    with quire.Segment(len(data)) as segment:
        segment[: len(data)] = data
        return segment.snapshot()


SOURCES: dict[str, Callable[[Path], object]] = {
    "file": lambda folder: written(folder / "plain", DATA),
    "bytes": lambda _: DATA,
    "snapshot": lambda _: snapshot_of(DATA),
    "stored": lambda folder: zip_member(folder, zipfile.ZIP_STORED),
    "deflated": lambda folder: zip_member(folder, zipfile.ZIP_DEFLATED),
    "zip zstandard": zstandard_member,
    "gzip": lambda folder: written(folder / "a.gz", gzip.compress(DATA, 1)),
    "zstandard": lambda folder: written(folder / "a.zst", zstdfiles.frame(DATA)),
    "seekable": lambda folder: written(folder / "b.zst", zstdfiles.seekable(DATA, 100_000)),
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    made = SOURCES[request.param](tmp_path_factory.mktemp("source"))
    return sources.open_source(made) if isinstance(made, str) else made


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("discard", DISCARDS)
@pytest.mark.parametrize("faults", BACKENDS)
def test_every_source_shows_its_bytes(source: object, faults: str, discard: str, shared: bool) -> None:
    with quire.Region(source, faults=faults, discard=discard, shared=shared) as region:
        assert region.size == SIZE
        for at in random.Random(1).sample(range(SIZE), 25):
            assert region[at] == DATA[at]
        assert bytes(region) == DATA
        region.discard(WINDOW)
        assert region.read(5, SIZE - 5) == DATA[5:]
        with region.pin(3 * WINDOW - 7, WINDOW) as view:
            region.discard()
            assert view == DATA[3 * WINDOW - 7 : 4 * WINDOW - 7]
        assert bytes(region) == DATA
        assert wait(fork(lambda: np.testing.assert_array_equal(region, np.frombuffer(DATA, "u1")))) == 0


def test_modes_become_what_the_backend_can_notice() -> None:
    for faults, discard, shared in itertools.product(BACKENDS, DISCARDS, [False, True]):
        with quire.Region(DATA, faults=faults, discard=discard, shared=shared) as region:
            can = {
                "kernel": faults in ("thread", "signal") and not shared,
                "pressure": faults in ("thread", "signal") or (faults == "sigsegv" and not shared),
                "never": True,
            }
            assert region.discard_mode == (discard if can[discard] else "never")


SPANS = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * WINDOW))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["touch", "read", "discard", "pin", "prefetch", "prefetch later"]), SPANS),
        st.tuples(st.just("fork"), SPANS),
    ),
    min_size=1,
    max_size=12,
)


def take(region: quire.Region, call: str, span: tuple[int, int]) -> None:
    at, length = span
    end = min(at + length, SIZE)
    if call == "touch":
        assert region[at:end] == DATA[at:end]
    elif call == "read":
        assert region.read(at, end - at) == DATA[at:end]
    elif call == "discard":
        region.discard(at, end - at)
    elif call == "pin":
        with region.pin(at, end - at) as view:
            assert view == DATA[at:end]
    elif call == "fork":
        assert wait(fork(lambda: take(region, "touch", (at, SIZE)))) == 0
    else:
        region.prefetch(at, end - at, wait=call == "prefetch")


@pytest.mark.parametrize("faults", BACKENDS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(STEPS, min_size=1, max_size=3),
    st.sampled_from(DISCARDS),
    st.sampled_from([4096, WINDOW]),
    st.booleans(),
)
def test_any_pattern_by_any_threads(
    source: object, faults: str, threads: list, discard: str, window: int, shared: bool
) -> None:
    failures: list[BaseException] = []
    with quire.Region(source, faults=faults, discard=discard, window_bytes=window, shared=shared) as region:

        def work(steps: list) -> None:
            try:
                for call, span in steps:
                    take(region, call, span)
            except BaseException as error:  # noqa: BLE001 - raised by the main thread
                failures.append(error)

        workers = [threading.Thread(target=work, args=(steps,)) for steps in threads]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failures:
            raise failures[0]
        assert bytes(region) == DATA
