"""Members of zip archives, against zipfile."""

import io
import os
import random
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstdfiles
from support import MIB

from quire import sources
from quire.errors import PageError, Unsupported

DATA = random.Random(5).randbytes(2000) * 2000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def archive(
    path: Path, method: int = zipfile.ZIP_DEFLATED, name: str = "dir/member", data: bytes = DATA
) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr("other", b"other")
        out.writestr(name, data)
        out.writestr("last", b"last")
    return path


def patched(path: Path, old: bytes, new: bytes) -> Path:
    """Replace bytes that must be there."""
    packed = path.read_bytes()
    assert old in packed
    path.write_bytes(packed.replace(old, new))
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 3 * MIB + 1])
def test_members(method: int, size: int, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", method, data=DATA[:size])
    with sources.ZipSource(path, "dir/member") as source:
        assert source.read() == DATA[:size]
        assert "a.zip!/dir/member" in source.name
    with sources.open_source(f"{path}!/dir/member") as source:
        assert source.read(size // 2) == DATA[size // 2 : size]


def zstandard_archive(path: Path, data: bytes, size: int | None = None) -> Path:
    """Made as a stored member that says method 93, since zipfile of this Python may not write it."""
    packed = zstdfiles.seekable(data, 100_000)
    archive(path, zipfile.ZIP_STORED, "z", packed)
    whole = bytearray(path.read_bytes())
    local = whole.index(b"PK\3\4", whole.index(b"other") + 1)
    central = whole.index(b"PK\1\2", whole.index(b"PK\1\2") + 1)
    struct.pack_into("<H", whole, local + 8, 93)
    struct.pack_into("<H", whole, central + 10, 93)
    struct.pack_into("<I", whole, central + 24, len(data) if size is None else size)
    path.write_bytes(whole)
    return path


def test_zstandard_members(tmp_path: Path) -> None:
    path = zstandard_archive(tmp_path / "a.zip", DATA)
    with sources.ZipSource(path, "z") as source:
        assert source.read() == DATA
    with pytest.raises(PageError, match="directory says 5"):
        sources.ZipSource(zstandard_archive(path, DATA, 5), "z")


@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\n" * 100])
@pytest.mark.parametrize("after", [b"", b"\0" * 100])
def test_bytes_around_the_archive(before: bytes, after: bytes, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip")
    path.write_bytes(before + path.read_bytes() + after)
    assert sources.ZipSource(path, "dir/member").read() == zipfile.ZipFile(path).read("dir/member") == DATA


def test_zip64_and_streamed_archives(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        """Cannot seek, so sizes come behind the data."""

        def __init__(self, out: io.BufferedWriter) -> None:
            self.out = out

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:
            return self.out.write(data)

    path = tmp_path / "a.zip"
    with (
        path.open("wb") as raw,
        zipfile.ZipFile(Pipe(raw), "w", zipfile.ZIP_DEFLATED) as out,
        out.open("member", "w", force_zip64=True) as member,
    ):
        member.write(DATA)
    assert sources.ZipSource(path, "member").read() == DATA


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as out:
        for name, data in [("../../up", b"1"), ("twice", b"2"), ("ü/ñ", b"4"), ("d/", b"")]:
            out.writestr(name, data)
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("twice", b"3")
    for name, data in [("../../up", b"1"), ("twice", b"3"), ("ü/ñ", b"4")]:
        assert sources.ZipSource(path, name).read() == data
    with pytest.raises(FileNotFoundError, match="did you mean 'twice'"):
        sources.ZipSource(path, "twcie")
    for name in ("d/", "d"):
        with pytest.raises(IsADirectoryError):
            sources.ZipSource(path, name)
    with pytest.raises(zipfile.BadZipFile):
        sources.ZipSource(Path(__file__), "x")


def test_a_path_with_the_mark_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "odd!").mkdir()
    (tmp_path / "odd!" / "file").write_bytes(b"abc")
    assert sources.open_source(f"{tmp_path}/odd!/file").read() == b"abc"


@pytest.mark.parametrize(("method", "name"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")])
def test_other_methods_are_named(method: int, name: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=name):
        sources.ZipSource(archive(tmp_path / "a.zip", method), "dir/member")


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip")
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\1\2", whole.index(b"PK\1\2") + 1) + 8] |= 1
    path.write_bytes(whole)
    with pytest.raises(Unsupported, match="encrypted"):
        sources.ZipSource(path, "dir/member")


def central(path: Path, field: int, change: int) -> Path:
    """Change a 32-bit field of the directory's entry of dir/member."""
    whole = bytearray(path.read_bytes())
    at = whole.index(b"PK\1\2", whole.index(b"PK\1\2") + 1) + field
    (value,) = struct.unpack_from("<I", whole, at)
    struct.pack_into("<I", whole, at, (value + change) % 2**32)
    path.write_bytes(whole)
    return path


CRC, PACKED, SIZE, OFFSET = 16, 20, 24, 42


@pytest.mark.parametrize(
    ("field", "change"), [(CRC, 1), (SIZE, 1), (SIZE, -1), (SIZE, 1 << 30), (PACKED, -1000)]
)
def test_a_directory_that_lies_is_found_out(field: int, change: int, tmp_path: Path) -> None:
    path = central(archive(tmp_path / "a.zip"), field, change)
    with sources.ZipSource(path, "dir/member") as source:
        assert source.read(0, 100) == DATA[:100]
        with pytest.raises(PageError):
            source.read(source.size - 1, 1)
        # What failed its verification is not believed any more.
        with pytest.raises(PageError):
            source.read(0, 100)


@pytest.mark.parametrize(
    ("field", "change"), [(PACKED, 10_000_000), (OFFSET, 3), (OFFSET, 10_000_000), (OFFSET, -35)]
)
def test_data_that_lies_elsewhere_is_refused(field: int, change: int, tmp_path: Path) -> None:
    path = central(archive(tmp_path / "a.zip"), field, change)
    with pytest.raises(zipfile.BadZipFile):
        sources.ZipSource(path, "dir/member")


def test_a_declared_length_of_nothing_is_verified_at_once(tmp_path: Path) -> None:
    path = central(archive(tmp_path / "a.zip"), SIZE, -len(DATA))
    with pytest.raises(PageError, match="more data than declared"):
        sources.ZipSource(path, "dir/member")


def test_a_wheel_of_numpy(tmp_path: Path) -> None:
    root = Path(np.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.is_file() and "tests" not in path.parts)
    biggest = max(files, key=lambda path: path.stat().st_size)
    chosen = {*files[::20], biggest}
    wheel = tmp_path / "numpy.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as out:
        for path in chosen:
            out.write(path, path.relative_to(root.parent))
    rng = random.Random(3)
    for path in chosen:
        want = path.read_bytes()
        with sources.open_source(f"{wheel}!/{path.relative_to(root.parent)}") as source:
            for _ in range(5):
                offset = rng.randint(0, len(want))
                length = rng.randint(0, len(want) - offset)
                assert source.read(offset, length) == want[offset : offset + length], path
            assert source.read() == want


def test_a_tar_file_compressed_with_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as out:
        out.add(Path(np.__file__).parent / "core", "core")
        out.add(Path(os.__file__).parent / "json", "json")
    with sources.open_source(path) as source:
        content = io.BytesIO(source.read())
    with tarfile.open(fileobj=content) as tar:
        assert "json/__init__.py" in tar.getnames()
