"""Saved files: what is damaged raises, what is replaced is replaced whole, what crashes leaves no debris."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from support import MIB, PAGE, content, nothing_left, pattern

import quire


@pytest.fixture(autouse=True)
def _nothing_leaks():
    with nothing_left():
        yield


def small() -> quire.Snapshot:
    """Two pages of data among zeros, and a part of a page."""
    with quire.Segment(5 * PAGE + 17) as segment:
        segment[:PAGE] = pattern(PAGE, 1)
        segment[3 * PAGE : 4 * PAGE] = pattern(PAGE, 2)
        return segment.snapshot()


@pytest.fixture
def saved(tmp_path):
    """A small saved file, and its content as a snapshot."""
    path = tmp_path / "saved"
    with small() as snapshot:
        snapshot.save(path)
        yield path, content(snapshot)


both_ways = pytest.mark.parametrize("copy", [False, True])


@both_ways
@pytest.mark.parametrize("check", [False, True])
def test_what_is_saved_comes_back(saved, copy: bool, check: bool) -> None:
    path, expected = saved
    with quire.load(path, copy=copy, check=check) as loaded:
        assert loaded.size == len(expected)
        assert loaded.layers == 1
        assert content(loaded) == expected
        assert loaded.stats == (0, 0, 0, 0)
        with loaded.fork() as segment:
            segment[7] = 7
            with segment.snapshot() as again:
                again.verify()
                assert again.diff(loaded) == [(0, PAGE)]


@both_ways
def test_every_byte_counts(saved, copy: bool) -> None:
    path, _ = saved
    right = path.read_bytes()
    accepted = []
    with path.open("r+b", buffering=0) as file:
        for place in range(len(right)):
            os.pwrite(file.fileno(), bytes([right[place] ^ (1 << place % 8)]), place)
            try:
                quire.load(path, copy=copy, check=True).close()
                accepted.append(place)
            except quire.QuireError:
                pass
            finally:
                os.pwrite(file.fileno(), right[place : place + 1], place)
    assert not accepted, f"{len(accepted)} flipped bytes were accepted, first at {accepted[0]}"
    quire.load(path, copy=copy).close()


def test_what_is_not_hashed_is_still_sound(saved) -> None:
    """Without the hash a flipped byte may go unseen in data, never in the table or the trailer."""
    path, expected = saved
    right = path.read_bytes()
    trailer = len(right) - PAGE
    with path.open("r+b", buffering=0) as file:
        for place in [*range(2 * PAGE, trailer, 97), *range(trailer, trailer + 4064, 13)]:
            os.pwrite(file.fileno(), bytes([right[place] ^ 0x5A]), place)
            try:
                with quire.load(path, check=False) as loaded:
                    loaded._core.check_invariants()
                    assert place < trailer
                    assert loaded.size == len(expected)
                    assert len(content(loaded)) == len(expected)
            except quire.Malformed:
                pass
            finally:
                os.pwrite(file.fileno(), right[place : place + 1], place)


@both_ways
@pytest.mark.parametrize("check", [False, True])
def test_cut_short(saved, copy: bool, check: bool) -> None:
    path, _ = saved
    right = path.read_bytes()
    lengths = {
        *range(0, len(right), PAGE),
        1,
        31,
        PAGE - 1,
        PAGE + 1,
        len(right) - PAGE + 4064,
        len(right) - 1,
    }
    for length in sorted(lengths):
        os.truncate(path, length)
        with pytest.raises(quire.Malformed):
            quire.load(path, copy=copy, check=check)
        path.write_bytes(right)
    for more in (1, PAGE, 3 * PAGE):
        os.truncate(path, len(right) + more)
        with pytest.raises(quire.Malformed):
            quire.load(path, copy=copy, check=check)
        path.write_bytes(right)
    for cut in range(0, len(right), PAGE):
        path.write_bytes(right[:cut] + right[cut + PAGE :])
        with pytest.raises(quire.Malformed):
            quire.load(path, copy=copy, check=True)


@both_ways
@pytest.mark.parametrize("check", [False, True])
def test_what_is_no_file(tmp_path, copy: bool, check: bool) -> None:
    fifo, empty, sparse, folder = (tmp_path / name for name in ("fifo", "empty", "sparse", "folder"))
    os.mkfifo(fifo)
    empty.touch()
    folder.mkdir()
    sparse.touch()
    os.truncate(sparse, 1 << 42)
    for path in (fifo, empty, sparse, folder, pathlib.Path("/dev/zero"), pathlib.Path("/dev/null")):
        with pytest.raises((quire.Malformed, OSError)):
            quire.load(path, copy=copy, check=check)
    with pytest.raises(FileNotFoundError):
        quire.load(tmp_path / "nothing", copy=copy, check=check)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        quire.load(tmp_path / "dangling", copy=copy, check=check)


def test_only_a_copy_is_immutable(saved) -> None:
    path, expected = saved
    with quire.load(path) as mapped, quire.load(path, copy=True) as copied:
        with pytest.raises(quire.NotImmutable):
            mapped.verify()
        copied.verify()
        path.write_bytes(b"something else")
        path.unlink()
        assert content(copied) == expected


def test_holes_take_no_space(tmp_path) -> None:
    with quire.Segment(1 << 36) as segment:
        segment[1 << 35 : (1 << 35) + PAGE] = pattern(PAGE, 3)
        with segment.snapshot() as snapshot:
            snapshot.save(tmp_path / "sparse")
            assert (tmp_path / "sparse").stat().st_size <= 16 * PAGE
            with quire.load(tmp_path / "sparse") as loaded:
                assert loaded.size == 1 << 36
                assert loaded.diff(snapshot) == []


def test_many_layers_become_one_file(tmp_path) -> None:
    with quire.Segment.from_buffer(pattern(2 * MIB, 4)) as segment:
        for number in range(80):
            segment[number * 5 * PAGE] = number
            snapshot = segment.snapshot()
        assert snapshot.layers > 1
        snapshot.save(tmp_path / "one")
        with quire.load(tmp_path / "one") as loaded:
            assert loaded.layers == 1
            assert loaded.diff(snapshot) == []
            # Saved again, from the file onto itself.
            loaded.save(tmp_path / "one")
            assert content(loaded) == segment[:]
        with quire.load(tmp_path / "one") as again:
            assert content(again) == segment[:]
        snapshot.close()


def test_replacing_is_atomic(tmp_path) -> None:
    """Whoever has the old file open keeps it; whoever opens the name sees one or the other."""
    path = tmp_path / "saved"
    with quire.Segment(3 * PAGE) as segment:
        segment[:3] = b"old"
        with segment.snapshot() as old:
            old.save(path)
        with quire.load(path) as loaded, path.open("rb") as opened:
            before = opened.read()
            segment[:3] = b"new"
            with segment.snapshot() as new:
                new.save(path)
            assert content(loaded)[:3] == b"old"
            opened.seek(0)
            assert opened.read() == before
            with quire.load(path) as again:
                assert content(again)[:3] == b"new"
    assert os.listdir(tmp_path) == ["saved"]


def test_errors_name_the_path(tmp_path) -> None:
    missing = tmp_path / "missing" / "file"
    with quire.Segment(PAGE) as segment, segment.snapshot() as snapshot:
        for call in (snapshot.save, quire.load):
            with pytest.raises(FileNotFoundError, match=str(tmp_path / "missing")):
                call(missing)
            with pytest.raises(ValueError, match="NUL"):
                call(f"{tmp_path}/a\0b")
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            snapshot.save(tmp_path)


def test_saving_where_nothing_can_be_saved(tmp_path) -> None:
    with small() as snapshot:
        with pytest.raises(FileNotFoundError):
            snapshot.save(tmp_path / "no folder" / "saved")
        (tmp_path / "folder").mkdir()
        with pytest.raises(OSError, match=r"."):
            snapshot.save(tmp_path / "folder")
        with pytest.raises(OSError, match=r"."):
            snapshot.save("/proc/saved")
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == []


SAVER = """
import sys
import numpy as np, quire
segment = quire.Segment(24 << 20)
array = segment.array(np.uint64)
number = 0
while True:
    number += 1
    array[:] = number
    snapshot = segment.snapshot()
    print(number, flush=True)
    snapshot.save(sys.argv[1])
    snapshot.close()
"""


def test_kill_in_the_middle_of_a_save(tmp_path) -> None:
    """Somewhere between the first bytes and the end of the third save, wherever the counting gets to."""
    path = tmp_path / "saved"
    generator = np.random.default_rng(9)
    for _ in range(5):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, path], stdout=subprocess.PIPE)
        with saver, saver.stdout as lines:
            begun = [int(lines.readline()) for _ in range(3)][-1]
            spin(int(generator.integers(0, 200_000)))
            saver.send_signal(signal.SIGKILL)
            begun = max([begun, *map(int, lines.read().split())])
        assert saver.returncode == -signal.SIGKILL
        assert os.listdir(tmp_path) == ["saved"]
        with quire.load(path, check=True) as loaded, loaded.map() as mapping:
            array = mapping.array(np.uint64)
            assert array.min() == array.max()
            # The save that was begun last, or the one before.
            assert begun - 1 <= array[0] <= begun
            del array


def spin(rounds: int) -> None:
    """Let a little time pass, of no set length."""
    for _ in range(rounds):
        os.getppid()
