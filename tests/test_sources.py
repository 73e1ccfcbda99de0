"""Sources give the bytes that plain reading gives, in any order, or an error."""

import gzip
import os
import pickle
import random
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstdfiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import MIB, PAGE, descriptor_count

import quire
from quire import sources
from quire.errors import PageError, Unsupported

WINDOW = 64 * 1024
Make = Callable[[Path, bytes], sources.Source]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quire"


def text(size: int, seed: int = 0) -> bytes:
    """Bytes that compress like text does, with references far back."""
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randint(2, 12)).hex().encode() for _ in range(3000)]
    out = b" ".join(rng.choices(words, k=size // 8 + 8))
    while len(out) < size:
        out += out
    return out[:size]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def members(data: bytes) -> bytes:
    """A gzip file of several members, with padding between them."""
    return b"\0\0".join(gzip.compress(part, 6) for part in zstdfiles.parts(data, 700_001))


def snapshot_source(_path: Path, data: bytes) -> sources.Source:
    with quire.Segment(max(len(data), 1)) as segment:
        segment[: len(data)] = data
        segment.snapshot()
        segment[: len(data)] = data[::-1]
        segment.snapshot()
        segment[: len(data)] = data
        return sources.SnapshotSource(segment.snapshot())


def zst(packed: Callable[[bytes], bytes]) -> Make:
    return lambda path, data: sources.ZstdSource(written(path, packed(data)))


MAKERS: dict[str, Make] = {
    "file": lambda path, data: sources.FileSource(written(path, data)),
    "bytes": lambda _path, data: sources.BytesSource(data),
    "snapshot": snapshot_source,
    "gzip": lambda path, data: sources.GzipSource(written(path, gzip.compress(data, 6))),
    "gzip, members": lambda path, data: sources.GzipSource(written(path, members(data))),
    "zstd, one frame": zst(zstdfiles.frame),
    "zstd, one frame of unknown size": zst(lambda data: zstdfiles.frame(data, size=False)),
    "zstd, frames": zst(lambda data: b"".join(map(zstdfiles.frame, zstdfiles.parts(data, 300_000)))),
    "zstd, frames of unknown size": zst(
        lambda data: b"".join(zstdfiles.frame(part, size=False) for part in zstdfiles.parts(data, 300_000))
    ),
    "zstd, seekable": zst(lambda data: zstdfiles.seekable(data, 200_000)),
}
BIG = text(7 * MIB + 123)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, WINDOW, WINDOW + 1, MIB, 2 * MIB + 1])
def test_sizes(make: Make, size: int, tmp_path: Path) -> None:
    if size == 0 and make is snapshot_source:
        pytest.skip("a segment has at least one byte")
    data = text(size)
    with make(tmp_path / "file", data) as source:
        assert (source.size, source.read()) == (size, data)
        assert source.read(size, 0) == b""
        with pytest.raises(ValueError, match="outside"):
            source.read(size, 1)
        with pytest.raises(ValueError, match="outside"):
            source.read(-1, 1)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    reads=st.lists(st.tuples(st.integers(0, len(BIG) - 1), st.integers(0, 2 * MIB)), min_size=1, max_size=8),
    threads=st.integers(1, 3),
)
def test_any_order_by_any_threads(
    make: Make, reads: list[tuple[int, int]], threads: int, tmp_path: Path
) -> None:
    source = make(tmp_path / "file", BIG)
    wrong: list[str] = []

    def work(number: int) -> None:
        for offset, wanted in reads[number:] + reads[:number]:
            length = min(wanted, len(BIG) - offset)
            try:
                if source.read(offset, length) != BIG[offset : offset + length]:
                    wrong.append(f"{length} bytes at {offset}")
            except PageError as error:
                wrong.append(str(error))

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong
    source.close()


@pytest.mark.parametrize(
    "name", ["gzip", "zstd, one frame", "zstd, seekable", "zstd, frames of unknown size"]
)
def test_no_flipped_byte_gives_wrong_bytes(name: str, tmp_path: Path) -> None:
    data = text(300_000)
    path = tmp_path / "file"
    MAKERS[name](path, data).close()
    good = path.read_bytes()
    rng = random.Random(1)
    for at in [*range(12), *rng.sample(range(len(good)), 60), *range(len(good) - 12, len(good))]:
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
        try:
            with sources.open_source(path) as source:
                # Without its magic it is taken as it is, and a frame may turn into one to be skipped.
                if type(source) is sources.FileSource or not source.size:
                    continue
                # As much as there can be, whatever length is declared.
                assert source.read(0, min(source.size, len(data) + 1)) == data, f"byte {at}"
        except PageError:
            pass


@pytest.mark.parametrize("make", [MAKERS["gzip"], MAKERS["zstd, frames"], MAKERS["zstd, seekable"]])
def test_a_file_that_is_cut_short_fails(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with make(path, BIG) as source:
        good = path.read_bytes()
        kind = type(source)
    for cut in (1, 5, 9, 1000, len(good) // 2):
        path.write_bytes(good[:-cut])
        with pytest.raises(PageError), kind(path) as source:
            assert source.read() != BIG


@pytest.mark.parametrize("change", ["truncate", "grow", "rewrite"])
@pytest.mark.parametrize("name", ["file", "zstd, seekable", "gzip"])
def test_a_file_that_changes_while_it_is_used_fails(name: str, change: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with MAKERS[name](path, BIG) as source:
        packed = path.read_bytes()
        if change == "truncate":
            os.truncate(path, len(packed) - 5)
        elif change == "grow":
            with path.open("ab") as file:
                file.write(b"x")
        else:
            path.write_bytes(packed)
            os.utime(path, ns=(1, 1))
        with pytest.raises(PageError, match=f"{path}.*changed"):
            source.read(0, 100)


def test_gzip_treats_what_follows_as_python_does(tmp_path: Path) -> None:
    path = written(tmp_path / "file", gzip.compress(b"abc") + bytes(100))
    assert sources.GzipSource(path).read() == gzip.decompress(path.read_bytes()) == b"abc"
    written(path, gzip.compress(b"abc") + b"garbage")
    with pytest.raises(PageError, match="no gzip member"):
        sources.GzipSource(path)


def test_gzip_verifies_every_member(tmp_path: Path) -> None:
    two = gzip.compress(b"abc") + gzip.compress(b"def")
    for at in (-8, -4, len(two) // 2 - 8, len(two) // 2 - 4):
        bad = bytearray(two)
        bad[at] ^= 1
        with pytest.raises(PageError, match=r"CRC|length"):
            sources.GzipSource(written(tmp_path / "file", bytes(bad)))


def test_a_zstd_frame_that_lies_about_its_length_fails(tmp_path: Path) -> None:
    packed = zstdfiles.frame(bytes(100_000))
    lie = packed.replace((100_000).to_bytes(4, "little"), (90_000).to_bytes(4, "little"))
    assert lie != packed
    with sources.ZstdSource(written(tmp_path / "file", lie)) as source, pytest.raises(PageError):
        source.read()


@pytest.mark.parametrize("entries", [[(1, 1)], [], [(2**32 - 1, 2**32 - 1)] * 3])
def test_a_seek_table_that_lies_fails(entries: list[tuple[int, int]], tmp_path: Path) -> None:
    path = written(tmp_path / "file", zstdfiles.frame(b"abc") + zstdfiles.table(entries))
    with pytest.raises(PageError, match="seek table"):
        sources.ZstdSource(path)


def test_a_seek_table_with_wrong_lengths_fails(tmp_path: Path) -> None:
    packed = zstdfiles.frame(b"abc")
    path = written(tmp_path / "file", packed + zstdfiles.table([(len(packed), 4)]))
    with sources.ZstdSource(path) as source, pytest.raises(PageError):
        source.read()


def test_a_frame_that_wants_too_large_a_window_fails(tmp_path: Path) -> None:
    # Frame header: no size, a window of 1 GiB; then one raw block that is the last.
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([(30 - 10) << 3]) + (3 << 3 | 1).to_bytes(3, "little") + b"abc"
    with pytest.raises(PageError, match="memory"):
        sources.ZstdSource(written(tmp_path / "file", frame))


BOMB = """
import sys
from quire import sources
source = sources.open_source(sys.argv[1])
assert source.size == 1 << 30, source.size
step = 1 << 16
for offset in [(1 << 30) - step, 1 << 29, *range(0, 1 << 28, 1 << 24)]:
    assert source.read(offset, step) == bytes(step)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_is_paged_in_constant_memory(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    zeros = bytes(1 << 24)
    if kind == "gzip":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(64):
                file.write(zeros)
    else:
        import zstandard

        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as out:
            for _ in range(64):
                out.write(zeros)
    done = subprocess.run([sys.executable, "-c", BOMB, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150 * 1024


def test_the_cache_spares_the_first_pass(own_cache: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "file", gzip.compress(BIG, 1))
    sources.GzipSource(path).close()
    (index,) = own_cache.glob("*.idx")
    assert own_cache.stat().st_mode & 0o777 == 0o700
    before = index.read_bytes()
    # A wrong byte near the end is found by reading all of it, and by nothing else.
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-2000, 2)
        byte = file.read(1)
        file.seek(-2000, 2)
        file.write(bytes([byte[0] ^ 255]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with sources.GzipSource(path) as source:
        assert source.size == len(BIG)
        assert source.read(3 * MIB, MIB) == BIG[3 * MIB : 4 * MIB]
        with pytest.raises(PageError, match=r"CRC|invalid"):
            source.read(len(BIG) - 10, 10)
    assert index.read_bytes() == before
    # The same damage with another mtime is another file.
    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    with pytest.raises(PageError):
        sources.GzipSource(path)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "pipe", "link", "directory"])
def test_a_damaged_cache_is_built_again(damage: str, own_cache: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "file", gzip.compress(BIG, 1))
    sources.GzipSource(path).close()
    (index,) = own_cache.glob("*.idx")
    good = index.read_bytes()
    if damage == "flip":
        for at in (0, 9, 20, len(good) // 2, len(good) - 1):
            index.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            assert sources.GzipSource(path).read(MIB, 10) == BIG[MIB : MIB + 10]
    elif damage in ("cut", "empty"):
        index.write_bytes(good[:-1] if damage == "cut" else b"")
    else:
        index.unlink()
        if damage == "pipe":
            os.mkfifo(index)
        elif damage == "link":
            index.symlink_to(path)
        else:
            index.mkdir()
    with sources.GzipSource(path) as source:
        assert source.read() == BIG
    assert index.is_dir() or index.read_bytes() == good


@pytest.mark.parametrize("hostile", ["open", "file", "link", "no parent"])
def test_a_cache_directory_that_is_not_ours_alone_is_not_used(
    hostile: str, own_cache: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if hostile == "no parent":
        written(own_cache.parent, b"a file")
    else:
        own_cache.parent.mkdir()
        if hostile == "open":
            own_cache.mkdir()
            own_cache.chmod(0o777)
        elif hostile == "file":
            written(own_cache, b"")
        else:
            own_cache.symlink_to(elsewhere)
    path = written(tmp_path / "file", gzip.compress(b"abc" * 1000))
    for _ in range(2):
        with sources.GzipSource(path) as source:
            assert source.read() == b"abc" * 1000
    assert not list(elsewhere.iterdir())
    assert not own_cache.is_dir() or not list(own_cache.iterdir())


def test_two_processes_share_the_cache(own_cache: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "file", gzip.compress(BIG, 1))
    code = "import sys; from quire import sources; print(sources.GzipSource(sys.argv[1]).size)"
    children = [
        subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [int(child.communicate()[0]) for child in children] == [len(BIG)] * 3
    assert [name.suffix for name in own_cache.iterdir()] == [".idx"]


def test_buffers_of_every_kind() -> None:
    array = np.arange(10_000, dtype="f8").reshape(100, 100)
    with sources.BytesSource(array) as source:
        assert source.read() == array.tobytes()
    with pytest.raises(TypeError, match="contiguous"):
        sources.BytesSource(array[:, ::2])
    with pytest.raises(TypeError):
        sources.BytesSource("text")  # type: ignore[arg-type]
    assert sources.BytesSource(np.empty((0, 3))).size == 0
    growing = bytearray(b"abc")
    with sources.BytesSource(growing), pytest.raises(BufferError):
        growing += b"d"


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "snapshot"])
def test_pickles_open_the_same_bytes(name: str, tmp_path: Path) -> None:
    with MAKERS[name](tmp_path / "file", BIG) as source:
        again = pickle.loads(pickle.dumps(source))
        assert again.read(MIB, 1000) == BIG[MIB : MIB + 1000]


def test_a_pickle_of_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "file", b"abc")
    pickled = pickle.dumps(sources.FileSource(path))
    written(path, b"abcd")
    before = descriptor_count()
    with pytest.raises(PageError, match="changed since"):
        pickle.loads(pickled)
    assert descriptor_count() == before


def test_closed_sources_say_so_and_hold_nothing(tmp_path: Path) -> None:
    before = descriptor_count()
    source = sources.GzipSource(written(tmp_path / "file", gzip.compress(b"abc")))
    source.close()
    source.close()
    assert source.closed
    assert "closed" in repr(source)
    with pytest.raises(ValueError, match="closed"):
        source.read()
    assert descriptor_count() == before


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="no regular file"):
            sources.open_source(path)
    with pytest.raises(FileNotFoundError):
        sources.open_source(tmp_path / "missing")


def test_files_are_told_apart_by_their_first_bytes(tmp_path: Path) -> None:
    for data, kind in [
        (b"", sources.FileSource),
        (b"\x1f", sources.FileSource),
        (b"plain", sources.FileSource),
        (gzip.compress(b"x"), sources.GzipSource),
        (zstdfiles.frame(b"x"), sources.ZstdSource),
        (b"\x50\x2a\x4d\x18" + bytes(4) + zstdfiles.frame(b"x"), sources.ZstdSource),
    ]:
        path = written(tmp_path / "name.gz", data)
        assert type(sources.open_source(path)) is kind
        assert type(sources.open_source(str(path))) is kind
        assert type(sources.open_source(path.as_uri())) is kind


def test_urls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ftp"):
        sources.open_source("ftp://host/file")
    with pytest.raises(ValueError, match="another machine"):
        sources.open_source("file://host/file")
    with pytest.raises(TypeError, match="no options"):
        sources.open_source(written(tmp_path / "file", b""), timeout=1)


def test_schemes_whose_module_is_missing_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.REMOTE, "http", "quire.module_that_is_missing")
    with pytest.raises(Unsupported, match="install"):
        sources.open_source("http://host/file")


def test_urls_name_compressed_files_and_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[sources.Source] = []

    def open_remote(url: str, **options: str) -> sources.Source:
        assert options == {"token": "t"}
        opened.append(sources.FileSource(tmp_path / url.removeprefix("test://")))
        return opened[-1]

    module = types.ModuleType("quire_test_remote")
    module.open_remote = open_remote  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sources.REMOTE, "test", module.__name__)
    written(tmp_path / "plain", b"abc")
    written(tmp_path / "gzip", gzip.compress(BIG))
    written(tmp_path / "zstd", zstdfiles.seekable(BIG, 100_000))
    with zipfile.ZipFile(tmp_path / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dir/member", BIG)
    for name, want in [("plain", b"abc"), ("gzip", BIG), ("zstd", BIG), ("zip!/dir/member", BIG)]:
        with sources.open_source(f"test://{name}", token="t") as source:
            assert source.read() == want
            assert pickle.loads(pickle.dumps(source)).read() == want
        assert opened[-1].closed
    with pytest.raises(FileNotFoundError, match="no such member"):
        sources.open_source("test://zip!/missing", token="t")
    assert opened[-1].closed


def test_codecs_sit_on_raw_bytes_only() -> None:
    native = quire._native.Source.buffer(gzip.compress(gzip.compress(b"abc")))
    with pytest.raises(ValueError, match="decoded already"):
        native.gzip().gzip()
    with pytest.raises(ValueError, match="outside"):
        native.slice(2**64 - 1, 2)
    with pytest.raises(ValueError, match="no descriptor"):
        quire._native.Source.file(-1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        quire._native.Source.file(10**6)
