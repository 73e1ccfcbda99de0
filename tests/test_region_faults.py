"""Fills that fail: who is told, who is stopped, and that nobody else is hurt."""

import gzip
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstdfiles
from support import PAGE, TESTS, pattern

import quire
from quire.errors import PageError

WINDOW = 65536
SIZE = 64 * WINDOW
DATA = pattern(SIZE, 11).tobytes()
MAPPED = ["thread", "signal", "sigsegv"]


@pytest.fixture(params=MAPPED)
def faults(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def changed_size(path: Path) -> None:
    os.truncate(path, SIZE - 3 * WINDOW)


def changed_content(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(1, 1))


CHANGES = {"shorter": changed_size, "other mtime": changed_content}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shared", [False, True])
def test_a_file_that_changes_fails_what_is_not_filled(
    tmp_path: Path, faults: str, change: str, shared: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with quire.open(path, faults=faults, shared=shared, discard="never") as region:
        filled = region.window_bytes
        assert region.read(0, filled) == DATA[:filled]
        before = region.stats.failures
        status = path.stat()
        CHANGES[change](path)
        calls: list[Callable[[], object]] = [
            lambda: region.read(SIZE // 2, 10),
            lambda: region.prefetch(SIZE // 2, 10),
            lambda: region.pin(SIZE // 2, 10).__enter__(),
        ]
        for call in calls:
            with pytest.raises(PageError, match="changed after it was opened"):
                call()
        assert region.stats.failures > before
        # What is there stays right, and what failed is tried again once the cause is gone.
        assert region[:filled] == DATA[:filled]
        path.write_bytes(DATA)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert bytes(region) == DATA
    assert "quire" not in capfd.readouterr().err


def damaged_zip(folder: Path) -> str:
    """A deflated member with a wrong CRC, which is met at its end."""
    path = folder / "a.zip"
    text = b"".join(b"%d " % (n * n) for n in range(SIZE // 8))[:SIZE]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m", text)
    packed = bytearray(path.read_bytes())
    for mark, at in ((b"PK\1\2", 16), (b"PK\3\4", 14)):
        packed[packed.index(mark) + at] ^= 1
    path.write_bytes(packed)
    return f"{path}!/m"


def damaged_frame(folder: Path) -> str:
    """Frames of which one in the middle does not match the check of the seek table, or its own."""
    path = folder / "a.zst"
    packed = bytearray(zstdfiles.seekable(DATA, 4 * WINDOW))
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)
    return str(path)


@pytest.mark.parametrize("damage", [damaged_zip, damaged_frame])
def test_damage_is_told_and_the_rest_is_right(
    tmp_path: Path, faults: str, damage: Callable[[Path], str]
) -> None:
    target = damage(tmp_path)
    with quire.open(target, faults=faults) as region:
        failed = 0
        source = quire.open(target, faults=faults)
        for at in range(0, SIZE, WINDOW):
            try:
                got = region.read(at, WINDOW)
            except PageError:
                failed += 1
                continue
            assert got == source.read(at, WINDOW)
            if damage is damaged_frame:
                assert got == DATA[at : at + WINDOW]
        source.close()
        assert 0 < failed < SIZE // WINDOW
        with pytest.raises(PageError):
            region.prefetch()
        region.prefetch(wait=False)


def test_a_wrong_member_of_gzip_is_refused_at_opening(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(DATA))
    packed[-8] ^= 1
    path = tmp_path / "a.gz"
    path.write_bytes(packed)
    with pytest.raises(PageError):
        quire.open(path)


STOPPED = """
import faulthandler, os, sys
before, after, faults, path, fill = sys.argv[1:]
if before == "yes":
    faulthandler.enable()
import quire
source = quire.FileSource(path) if fill == "file" else None
if fill == "slow":
    import zipfile
    source = quire.ZipSource(path, "m")
region = quire.Region(source, faults=faults, discard="never")
array = region.array("u1")
array[0]
if after == "yes":
    faulthandler.enable()
    other = quire.Region(b"x", faults=faults)
    other[0]
if fill == "file":
    os.truncate(path, region.size - 1)
else:
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        file.write(bytes(5))
print("touching", flush=True)
array[region.size // 2]
print("went on", flush=True)
"""


def stopped(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STOPPED, *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=TESTS,
    )


@pytest.mark.parametrize("handlers", [("no", "no"), ("yes", "no"), ("no", "yes")])
@pytest.mark.parametrize("source", ["file", "slow"])
def test_a_touch_that_cannot_be_served_ends_the_process_with_a_message(
    tmp_path: Path, faults: str, handlers: tuple[str, str], source: str
) -> None:
    path = tmp_path / "input"
    if source == "file":
        path.write_bytes(DATA)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("m", DATA)
    done = stopped(*handlers, faults, str(path), source)
    assert done.stdout == "touching\n"
    assert done.returncode == -signal.SIGBUS, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    told = [line for line in lines if line.startswith("quire: region ")]
    assert len(told) == 1, done.stderr[-2000:]
    assert re.search(rf"{re.escape(str(path))}.*: bytes \d+ to \d+ cannot be filled: .*changed", told[0])
    if "yes" in handlers:
        # The traceback comes once, and names the line.
        assert len([line for line in lines if line.startswith("Fatal Python error")]) == 1, done.stderr[
            -3000:
        ]
        assert 'File "<string>", line' in done.stderr


def test_a_failed_window_is_tried_again_after_discard(tmp_path: Path, faults: str) -> None:
    """Touched by a system call, which a window that failed does not end but refuse."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with quire.open(path, faults=faults, discard="never") as region:
        status = path.stat()
        os.utime(path, ns=(1, 1))
        target = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        half = memoryview(region)[SIZE // 2 :]
        for _ in range(2):
            with pytest.raises(OSError, match=r"Bad address|Memory page has hardware error|Input/output"):
                os.write(target, half[:10])
        if region.serves_system_calls:
            # The window remembers it, and a call that could say why does.
            with pytest.raises(PageError, match="changed"):
                region.read(SIZE // 2, 1)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if region.serves_system_calls:
            with pytest.raises(PageError, match="changed"):
                region.read(SIZE // 2, 1)
            assert region.discard() == 1
        assert half == DATA[SIZE // 2 :]
        # Neighbours were never concerned.
        assert region[:WINDOW] == DATA[:WINDOW]
        half.release()
        os.close(target)


def test_readahead_that_fails_is_silent(
    tmp_path: Path, faults: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """All frames from the ninth on are damaged; those before it are touched, one after the other."""
    path = tmp_path / "a.zst"
    packed = bytearray(zstdfiles.seekable(DATA, WINDOW))
    for at in range(len(packed) * 9 // 64 + 200, len(packed) * 60 // 64, 997):
        packed[at] ^= 0xFF
    path.write_bytes(packed)
    with quire.open(path, faults=faults) as region:
        array = region.array("u1")
        for at in range(0, 8 * WINDOW, PAGE):
            assert array[at] == DATA[at]
        del array
        region.prefetch(wait=False)
        while region.stats.failures == 0:
            os.sched_yield()
        with pytest.raises(PageError):
            region.read(9 * WINDOW, 1)
    assert capfd.readouterr().err == ""


def test_a_function_that_fails_is_told_and_tried_again(tmp_path: Path, faults: str) -> None:
    flag = tmp_path / "flag"
    flag.touch()

    def fill(offset: int, length: int) -> bytes:
        if offset >= WINDOW and flag.exists():
            raise LookupError("no such row")
        return bytes([1 + offset // WINDOW]) * length

    with quire.FunctionSource(fill, 4 * WINDOW) as source, quire.Region(source, faults=faults) as region:
        assert region[5] == 1
        with pytest.raises(PageError, match="no such row"):
            region.read(2 * WINDOW, 1)
        flag.unlink()
        assert np.all(np.frombuffer(region.read(2 * WINDOW, WINDOW), np.uint8) == 3)
