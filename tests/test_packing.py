"""Packing files: round trips, what other tools make of the output, what a failure leaves behind."""

import gzip
import io
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import zstandard
import zstdfiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import MIB, PAGE, fork, nothing_left, run_forked, status_bytes, wait

from quire import cli, sources
from quire.errors import PageError
from quire.packing import FRAME_BYTES, pack, unpack

TEXT = random.Random(5).randbytes(2000) * 2000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def decoded(packed: bytes) -> bytes:
    """What the reference implementation makes of all frames."""
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed), read_across_frames=True) as stream:
        return stream.read()


def entries(packed: bytes) -> list[tuple[int, int]]:
    """The seek table."""
    count, flags, magic = struct.unpack("<IBI", packed[-9:])
    assert (flags, magic) == (0, 0x8F92EAB1)
    start = len(packed) - 9 - 8 * count
    assert struct.unpack_from("<II", packed, start - 8) == (0x184D2A5E, 8 * count + 9)
    return list(struct.iter_unpack("<II", packed[start:-9]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    frames=st.integers(0, 5),
    rest=st.sampled_from([-1, 0, 1, PAGE]),
    frame_bytes=st.sampled_from([PAGE, 3 * PAGE, 64 << 10]),
    level=st.sampled_from([1, 3, 12]),
)
def test_round_trips(frames: int, rest: int, frame_bytes: int, level: int, tmp_path: Path) -> None:
    data = TEXT[: max(0, frames * frame_bytes + rest)]
    plain = written(tmp_path / "plain", data)
    done = pack(plain, tmp_path / "packed", frame_bytes=frame_bytes, level=level, force=True)
    packed = (tmp_path / "packed").read_bytes()
    assert (done.content_bytes, done.input_bytes, done.output_bytes) == (len(data), len(data), len(packed))
    assert decoded(packed) == data
    table = entries(packed)
    assert [length for _, length in table] == [len(part) for part in zstdfiles.parts(data, frame_bytes)] or [
        0
    ]
    with sources.ZstdSource(tmp_path / "packed") as source:
        assert source.read() == data
        if data:
            assert source._native.unit(0) == (0, min(frame_bytes, len(data)))
    unpack(tmp_path / "packed", tmp_path / "again", force=True)
    assert (tmp_path / "again").read_bytes() == data


@pytest.mark.skipif(shutil.which("zstd") is None, reason="there is no zstd command")
@pytest.mark.parametrize("size", [0, 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * MIB])
def test_the_zstd_command_reads_it(size: int, tmp_path: Path) -> None:
    pack(written(tmp_path / "plain", TEXT[:size]), tmp_path / "packed.zst")
    done = subprocess.run(["zstd", "-dc", tmp_path / "packed.zst"], check=True, capture_output=True)
    assert done.stdout == TEXT[:size]


def test_every_frame_has_a_checksum(tmp_path: Path) -> None:
    pack(written(tmp_path / "plain", TEXT), tmp_path / "packed", frame_bytes=64 << 10)
    packed = bytearray((tmp_path / "packed").read_bytes())
    at = 0
    for length, _ in entries(packed):
        parameters = zstandard.get_frame_parameters(bytes(packed[at : at + length]))
        assert parameters.has_checksum
        at += length
    packed[at - 1] ^= 1
    (tmp_path / "packed").write_bytes(packed)
    with sources.ZstdSource(tmp_path / "packed") as source:
        assert source.read(0, 100) == TEXT[:100]
        with pytest.raises(PageError, match="checksum"):
            source.read(source.size - 1, 1)


def zipped(path: Path, data: bytes) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("member", data)
    return f"{path}!/member"


def test_what_is_compressed_already_is_packed_anew(tmp_path: Path) -> None:
    for target in (
        written(tmp_path / "a.gz", gzip.compress(TEXT)),
        written(tmp_path / "a.zst", zstdfiles.frame(TEXT)),
        zipped(tmp_path / "a.zip", TEXT),
    ):
        pack(target, tmp_path / "packed", force=True)
        packed = (tmp_path / "packed").read_bytes()
        assert decoded(packed) == TEXT
        assert len(entries(packed)) == -(-len(TEXT) // FRAME_BYTES)
        unpack(target, tmp_path / "plain", force=True)
        assert (tmp_path / "plain").read_bytes() == TEXT


def test_the_output_may_be_the_input(tmp_path: Path) -> None:
    path = written(tmp_path / "file", TEXT)
    path.chmod(0o750)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(FileExistsError, match="force"):
        pack(path, path)
    pack(path, link, force=True)
    assert link.is_symlink()
    assert decoded(path.read_bytes()) == TEXT
    assert path.stat().st_mode & 0o777 == 0o750
    unpack(path, path, force=True)
    assert path.read_bytes() == TEXT


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = written(tmp_path / "file", TEXT)
    there = written(tmp_path / "there", b"precious")
    for call in (pack, unpack):
        with pytest.raises(FileExistsError, match="there"):
            call(path, there)
        with pytest.raises(ValueError, match="no regular file"):
            call(path, tmp_path, force=True)
        with pytest.raises(FileNotFoundError):
            call(path, tmp_path / "missing" / "file")
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "missing", tmp_path / "new")
    assert there.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "there"]


def test_arguments_out_of_range(tmp_path: Path) -> None:
    path = written(tmp_path / "file", TEXT)
    for frame_bytes in (0, -4096, 1, 4095, 5000, (4 << 20) + 4096):
        with pytest.raises(ValueError, match="multiples of 4096"):
            pack(path, tmp_path / "out", frame_bytes=frame_bytes)
    for level in (0, -1, 23):
        with pytest.raises(ValueError, match="level"):
            pack(path, tmp_path / "out", level=level)
    with pytest.raises(ValueError, match="not compressed"):
        unpack(path, tmp_path / "out")
    with pytest.raises(ValueError, match="no archive"):
        unpack(written(tmp_path / "gz", gzip.compress(b"x")), tmp_path / "out", stored=True)
    assert not (tmp_path / "out").exists()


def test_damaged_input_leaves_nothing(tmp_path: Path) -> None:
    good = zstdfiles.frame(TEXT)
    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), gzip.compress(TEXT)[:-5]):
        path = written(tmp_path / "bad", bad)
        there = written(tmp_path / "there", b"precious")
        for call in (pack, unpack):
            with nothing_left(), pytest.raises(PageError):
                call(path, there, force=True)
        assert there.read_bytes() == b"precious"
        assert sorted(os.listdir(tmp_path)) == ["bad", "there"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    noise = written(tmp_path / "noise", random.Random(1).randbytes(4 * MIB))
    archive = zipped(tmp_path / "a.zip", noise.read_bytes()).partition("!/")[0]
    there = written(tmp_path / "there", b"precious")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
        for call, target in [
            (pack, noise),
            (pack, archive),
            (unpack, archive),
            (unpack, archive + "!/member"),
        ]:
            with pytest.raises(OSError, match="File too large"):
                call(target, there, force=True)

    run_forked(work)
    assert there.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "noise", "there"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_being_stopped_leaves_what_was_there(number: int, tmp_path: Path) -> None:
    """The child is stopped in the middle of reading, with a part of the output written."""
    path = written(tmp_path / "file", TEXT)
    there = written(tmp_path / "there", b"precious")
    begun, tell = os.pipe()

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        read = sources.Source.read

        def slowly(source: sources.Source, offset: int = 0, length: int | None = None) -> bytes:
            if offset:
                os.write(tell, b"x")
                signal.pause()
            return read(source, offset, length)

        sources.Source.read = slowly  # type: ignore[method-assign]
        os._exit(cli.main(["pack", str(path), str(there), "--force"]))

    pid = fork(work)
    os.close(tell)
    assert os.read(begun, 1) == b"x"
    os.close(begun)
    os.kill(pid, number)
    assert wait(pid) == (130 if number == signal.SIGINT else -number)
    assert there.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "there"]


def test_a_name_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "file", TEXT)
    read = sources.Source.read

    def and_somebody_writes(source: sources.Source, offset: int = 0, length: int | None = None) -> bytes:
        (tmp_path / "out").write_bytes(b"precious")
        return read(source, offset, length)

    monkeypatch.setattr(sources.Source, "read", and_somebody_writes)
    with pytest.raises(FileExistsError):
        pack(path, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """512 MiB of zeros through each way, in less than 64 MiB more than a small file needs."""
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out, out.open("zeros", "w") as member:
        for _ in range(512):
            member.write(bytes(MIB))
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(512 * MIB)
    small = zipped(tmp_path / "small.zip", TEXT).partition("!/")[0]

    def work() -> None:
        pack(small, tmp_path / "out")
        unpack(small, tmp_path / "out", force=True)
        before = status_bytes("VmHWM")
        pack(bomb, tmp_path / "out", force=True)
        unpack(tmp_path / "out", tmp_path / "out", force=True)
        pack(sparse, tmp_path / "out", force=True)
        grown = status_bytes("VmHWM") - before
        assert grown < 64 * MIB, f"{grown >> 20} MiB more"

    run_forked(work)


def test_commands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = str(written(tmp_path / "plain", TEXT))
    packed, again = str(tmp_path / "packed"), str(tmp_path / "again")
    assert cli.main(["pack", plain, packed, "--frame-size", "64KiB", "--level", "5"]) == 0
    assert f"{len(TEXT):,} of content" in capfd.readouterr().out
    assert entries(Path(packed).read_bytes())[0][1] == 64 << 10
    assert cli.main(["unpack", packed, again]) == 0
    assert Path(again).read_bytes() == TEXT
    capfd.readouterr()
    for arguments, text in [
        (["pack", plain, packed], "force"),
        (["pack", plain + "x", again + "x"], "No such file"),
        (["pack", plain, again + "x", "--level", "40"], "level 40"),
        (["unpack", plain, again + "x"], "not compressed"),
    ]:
        assert cli.main(arguments) == 1
        assert text in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("4k", 4096), ("64 KiB", 65536), ("1MiB", MIB), ("4MB", 4 * MIB)]
)
def test_frame_sizes(text: str, size: int) -> None:
    from quire.commands.pack import frame_size

    assert frame_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "1", "-4096", "5MiB", "1GiB", "64 QiB", "99999999999999"])
def test_frame_sizes_that_are_none(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["pack", "a", "b", f"--frame-size={text}"])
    assert "--frame-size" in capfd.readouterr().err


def test_the_command_line_of_the_package(tmp_path: Path) -> None:
    path = written(tmp_path / "plain", TEXT)
    command = [sys.executable, "-m", "quire", "pack", str(path), str(tmp_path / "packed")]
    subprocess.run(command, check=True, capture_output=True)
    assert decoded((tmp_path / "packed").read_bytes()) == TEXT
