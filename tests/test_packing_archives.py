"""Packing whole archives: what is kept, what is refused, against zipfile and other tools."""

import random
import shutil
import stat
import struct
import subprocess
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
import zstdfiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import MIB, PAGE, nothing_left

from quire import sources
from quire.costs import costs
from quire.errors import PageError, Unsupported
from quire.packing import FAILURES, FRAME_BYTES, is_archive, pack, unpack
from quire.zipwriter import ZipWriter

TEXT = random.Random(5).randbytes(2000) * 2000
NOISE = random.Random(6).randbytes(MIB)

KEPT = [
    "filename",
    "orig_filename",
    "date_time",
    "comment",
    "create_system",
    "create_version",
    "internal_attr",
    "external_attr",
    "file_size",
    "CRC",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def local_extra(path: Path, info: zipfile.ZipInfo) -> bytes:
    whole = path.read_bytes()
    name, extra = struct.unpack_from("<HH", whole, info.header_offset + 26)
    start = info.header_offset + 30 + name
    return whole[start : start + extra]


def data_start(path: Path, info: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name + extra


def content(path: Path, info: zipfile.ZipInfo) -> bytes:
    """Decode a member with nothing of quire; its CRC is compared."""
    whole = path.read_bytes()
    start = data_start(path, info)
    data = whole[start : start + info.compress_size]
    if info.compress_type == 93:
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as stream:
            data = stream.read()
    elif info.compress_type == 8:
        data = zlib.decompress(data, -15)
    else:
        assert info.compress_type == 0
    assert zlib.crc32(data) == info.CRC
    return data


def infos(path: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return archive.infolist()


def all_kinds(path: Path) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        warnings.simplefilter("ignore", UserWarning)
        out.comment = b"of the archive \xff"
        out.writestr("dir/", b"")
        out.writestr("dir/text", TEXT)
        out.writestr("empty", b"")
        out.writestr("noise", NOISE)
        out.writestr("small noise", NOISE[:100])
        out.writestr("twice", b"first" * 100)
        out.writestr("twice", b"second" * 100)
        out.writestr("ü/ñ/漢字", TEXT[:5000])
        out.writestr("../../up", TEXT[:5001])
        out.writestr(zipfile.ZipInfo("stored text", (1999, 12, 31, 23, 59, 58)), TEXT[:FRAME_BYTES])
        link = zipfile.ZipInfo("link", (1980, 1, 1, 0, 0, 0))
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        link.create_system = 3
        out.writestr(link, "dir/text")
        noted = zipfile.ZipInfo("noted", (2107, 12, 31, 23, 59, 58))
        noted.comment = b"of the member"
        noted.extra = struct.pack("<HHBI", 0x5455, 5, 1, 1_700_000_000)
        noted.internal_attr = 1
        noted.create_system = 0
        out.writestr(noted, TEXT[: FRAME_BYTES + 1], zipfile.ZIP_DEFLATED)
    return path


def assert_same_archive(old: Path, new: Path) -> None:
    """All that is kept is kept, in order."""
    before, after = infos(old), infos(new)
    assert [[getattr(info, name) for name in KEPT] for info in before] == [
        [getattr(info, name) for name in KEPT] for info in after
    ]
    for one, other in zip(before, after, strict=True):
        assert content(old, one) == content(new, other), one.filename
    with zipfile.ZipFile(old) as one_archive, zipfile.ZipFile(new) as other_archive:
        assert one_archive.comment == other_archive.comment


def test_everything_is_kept(tmp_path: Path) -> None:
    old = all_kinds(tmp_path / "old.zip")
    packed, again, stored = tmp_path / "packed.zip", tmp_path / "again.zip", tmp_path / "stored.zip"
    done = pack(old, packed)
    assert (done.archive, done.members) == (True, len(infos(old)))
    assert done.output_bytes == packed.stat().st_size
    unpack(packed, again)
    unpack(packed, stored, stored=True)
    for new in (packed, again, stored):
        assert_same_archive(old, new)
    assert {info.compress_type for info in infos(again)} == {0, 8}
    assert {info.compress_type for info in infos(stored)} == {0}
    with zipfile.ZipFile(again) as archive:
        assert archive.testzip() is None
    noted = struct.pack("<HHBI", 0x5455, 5, 1, 1_700_000_000)
    for new in (packed, again, stored):
        assert infos(new)[-1].extra == noted
        assert noted in local_extra(new, infos(new)[-1])
    # The old padding does not stay.
    assert local_extra(again, infos(again)[3]) == b""


def test_methods_and_layout(tmp_path: Path) -> None:
    pack(all_kinds(tmp_path / "old.zip"), tmp_path / "packed.zip")
    found = {info.filename: info for info in infos(tmp_path / "packed.zip")}
    methods = {name: info.compress_type for name, info in found.items()}
    assert {name for name, method in methods.items() if method == 0} == {
        "dir/",
        "empty",
        "noise",
        "small noise",
        "link",
    }
    assert set(methods.values()) == {0, 93}
    assert data_start(tmp_path / "packed.zip", found["noise"]) % PAGE == 0
    whole = (tmp_path / "packed.zip").read_bytes()
    for name in ("dir/text", "stored text", "noted"):
        info = found[name]
        start = data_start(tmp_path / "packed.zip", info)
        data = whole[start : start + info.compress_size]
        # A single frame, which every reader of method 93 knows, or frames with a table.
        assert data[:4] == b"\x28\xb5\x2f\xfd"
        assert data.endswith(struct.pack("<I", 0x8F92EAB1)) == (info.file_size > FRAME_BYTES)
        with sources.open_source(f"{tmp_path}/packed.zip!/{name}") as source:
            assert source.read() == content(tmp_path / "packed.zip", info)
            assert source._native.unit(0) == (0, min(FRAME_BYTES, info.file_size))
        assert info.extract_version == 63


def test_packing_again_changes_nothing(tmp_path: Path) -> None:
    one, two = tmp_path / "one.zip", tmp_path / "two.zip"
    pack(all_kinds(tmp_path / "old.zip"), one)
    pack(one, two)
    assert one.read_bytes() == two.read_bytes()
    pack(one, one, force=True)
    assert one.read_bytes() == two.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 9 * PAGE]), max_size=6),
    noisy=st.booleans(),
    head=st.sampled_from([b"", b"#!/usr/bin/env python\n"]),
)
def test_round_trips(sizes: list[int], noisy: bool, head: bytes, tmp_path: Path) -> None:
    old, packed, again = tmp_path / "old.zip", tmp_path / "packed.zip", tmp_path / "again.zip"
    with zipfile.ZipFile(old, "w", zipfile.ZIP_DEFLATED) as out:
        for number, size in enumerate(sizes):
            out.writestr(str(number), (NOISE if noisy else TEXT)[:size])
    old.write_bytes(head + old.read_bytes())
    assert is_archive(old)
    pack(old, packed, frame_bytes=PAGE, force=True)
    unpack(packed, again, force=True)
    for new in (packed, again):
        assert_same_archive(old, new)
        assert new.read_bytes().startswith(head)
        for info in infos(new):
            if new == packed and info.compress_type == 0 and info.file_size >= PAGE:
                assert data_start(new, info) % PAGE == 0


def test_names_in_the_old_code_page(tmp_path: Path) -> None:
    old = tmp_path / "old.zip"
    with zipfile.ZipFile(old, "w") as out:
        out.writestr("xx", b"content" * 100)
    old.write_bytes(old.read_bytes().replace(b"xx", b"\x81\xfe"))
    pack(old, tmp_path / "packed.zip")
    assert_same_archive(old, tmp_path / "packed.zip")
    assert (tmp_path / "packed.zip").read_bytes().count(b"\x81\xfe") == 2


def test_streamed_archives_and_zip64(tmp_path: Path) -> None:
    old = tmp_path / "old.zip"
    with zipfile.ZipFile(old, "w", zipfile.ZIP_DEFLATED) as out:
        with out.open("one", "w", force_zip64=True) as member:
            member.write(TEXT)
        out.writestr("two", TEXT)
    pack(old, tmp_path / "packed.zip")
    assert_same_archive(old, tmp_path / "packed.zip")
    assert struct.pack("<HH", 1, 16) not in local_extra(
        tmp_path / "packed.zip", infos(tmp_path / "packed.zip")[0]
    )


def test_lengths_and_offsets_of_64_bits(tmp_path: Path) -> None:
    """A sparse archive with a member, and an offset, behind 4 GiB."""
    path = tmp_path / "large.zip"
    size = (4 << 30) + 5
    large = zipfile.ZipInfo("large")
    large.file_size = size
    small = zipfile.ZipInfo("small")
    small.file_size = 5
    with path.open("w+b") as file:
        writer = ZipWriter(file)
        writer.begin(large, b"", 0, aligned=True)
        file.truncate(file.tell() + size)
        file.seek(0, 2)
        writer.end(0)
        writer.begin(small, b"", 0)
        file.write(b"small")
        writer.end(zlib.crc32(b"small"))
        writer.finish(b"")
    first, second = infos(path)
    assert (first.file_size, first.compress_size, first.header_offset) == (size, size, 0)
    assert second.header_offset > size
    with zipfile.ZipFile(path) as archive:
        assert archive.read("small") == b"small"
    with sources.open_source(f"{path}!/large") as source:
        assert source.size == size
        assert source.read(size - 5) == bytes(5)


def test_more_members_than_16_bits_count(tmp_path: Path) -> None:
    old = tmp_path / "old.zip"
    with zipfile.ZipFile(old, "w") as out:
        for number in range(66_000):
            out.writestr(zipfile.ZipInfo(str(number)), b"")
    pack(old, tmp_path / "packed.zip")
    assert len(infos(tmp_path / "packed.zip")) == 66_000


def patched(path: Path, name: bytes, field: int, value: int, size: int = 4) -> Path:
    """Change a field of the directory's entry of this name."""
    whole = bytearray(path.read_bytes())
    at = whole.index(b"PK\1\2")
    while whole[at + 46 : at + 46 + len(name)] != name:
        at = whole.index(b"PK\1\2", at + 1)
    whole[at + field : at + field + size] = value.to_bytes(size, "little")
    path.write_bytes(whole)
    return path


FLAGS, METHOD, CRC, PACKED, SIZE, OFFSET = 8, 10, 16, 20, 24, 42


@pytest.mark.parametrize("call", [pack, unpack])
@pytest.mark.parametrize("name", [b"dir/text", b"noise", b"link"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        (CRC, 1),
        (SIZE, 0),
        (SIZE, 5),
        (SIZE, 1 << 31),
        (PACKED, 3),
        (PACKED, 1 << 31),
        (OFFSET, 7),
        (OFFSET, 1 << 31),
    ],
)
def test_a_directory_that_lies(call, name: bytes, field: int, value: int, tmp_path: Path) -> None:
    old = patched(all_kinds(tmp_path / "old.zip"), name, field, value)
    with nothing_left(), pytest.raises((zipfile.BadZipFile, PageError)):
        call(old, tmp_path / "new.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["old.zip"]


@pytest.mark.parametrize("field", [CRC, SIZE])
def test_a_directory_that_lies_of_a_packed_member(field: int, tmp_path: Path) -> None:
    pack(all_kinds(tmp_path / "old.zip"), tmp_path / "packed.zip")
    patched(tmp_path / "packed.zip", b"dir/text", field, 12345)
    for call in (pack, unpack):
        with pytest.raises(zipfile.BadZipFile, match="dir/text"):
            call(tmp_path / "packed.zip", tmp_path / "new.zip")


@pytest.mark.parametrize("method", [0, 8, 93])
def test_damaged_data_names_the_member(method: int, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", 8 if method == 8 else 0) as out:
        out.writestr("member", TEXT)
    if method == 93:
        pack(path, path, force=True)
    (info,) = infos(path)
    whole = bytearray(path.read_bytes())
    whole[data_start(path, info) + info.compress_size // 2] ^= 0x55
    path.write_bytes(whole)
    for call in (pack, unpack):
        with pytest.raises((zipfile.BadZipFile, PageError), match="member"):
            call(path, tmp_path / "new.zip")
    assert not (tmp_path / "new.zip").exists()


@pytest.mark.parametrize(("method", "name"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")])
def test_other_methods_are_refused_by_name(method: int, name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as out:
        out.writestr("member", TEXT)
    with pytest.raises(Unsupported, match=f"member is compressed by method .*{name}"):
        pack(tmp_path / "a.zip", tmp_path / "new.zip")


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    patched(all_kinds(tmp_path / "a.zip"), b"dir/text", FLAGS, 1, 2)
    with pytest.raises(Unsupported, match="dir/text is encrypted"):
        pack(tmp_path / "a.zip", tmp_path / "new.zip")


def test_what_only_starts_as_an_archive(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 and no directory")
    with pytest.raises(zipfile.BadZipFile):
        pack(tmp_path / "a.zip", tmp_path / "new.zip")


def test_extra_fields_that_leave_no_room(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("full")
    info.extra = struct.pack("<HH", 0x7777, 65_526) + bytes(65_526)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr(info, b"x")
    with pytest.raises(ValueError, match="full: its extra fields"):
        pack(tmp_path / "a.zip", tmp_path / "new.zip")
    info.extra = struct.pack("<HH", 0x7777, 65_000) + bytes(65_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr(info, NOISE)
    pack(tmp_path / "a.zip", tmp_path / "new.zip")
    assert_same_archive(tmp_path / "a.zip", tmp_path / "new.zip")


@pytest.mark.parametrize("seed", range(4))
def test_archives_with_changed_bytes_raise_what_is_documented(seed: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as out:
        for name in ("d/", "ü", "noise", "text"):
            out.writestr(
                name, {"d/": b"", "ü": b"abc" * 100, "noise": NOISE[:5000], "text": TEXT[:9000]}[name]
            )
    pack(tmp_path / "a.zip", tmp_path / "b.zip", frame_bytes=PAGE)
    rng = random.Random(seed)
    whole = (tmp_path / rng.choice(["a.zip", "b.zip"])).read_bytes()
    directory = whole.index(b"PK\1\2")
    raised = 0
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(rng.choice([0, directory]), len(whole))
            changed[at] = rng.choice([0, 1, 0xFF, changed[at] ^ 1 << rng.randrange(8)])
        (tmp_path / "x.zip").write_bytes(changed)
        for call in (pack, unpack):
            try:
                call(tmp_path / "x.zip", tmp_path / "out", force=True)
            except FAILURES:
                raised += 1
    assert raised > 150
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "out") == [
        "a.zip",
        "b.zip",
        "x.zip",
    ]


def test_an_empty_name_and_a_directory_with_content(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with path.open("w+b") as file:
        writer = ZipWriter(file)
        for name in ("", "d/"):
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            info.file_size = 5
            writer.begin(info, b"", 0)
            file.write(b"bytes")
            writer.end(zlib.crc32(b"bytes"))
        writer.finish(b"")
    pack(path, tmp_path / "new.zip")
    assert_same_archive(path, tmp_path / "new.zip")
    largest = costs(path).largest
    assert largest is not None
    assert largest.target.endswith("!/")
    assert sources.ZipSource(path, "").read() == b"bytes"


def test_a_version_that_nobody_knows(tmp_path: Path) -> None:
    patched(all_kinds(tmp_path / "a.zip"), b"dir/text", 6, 255, 2)
    for call in (lambda: pack(tmp_path / "a.zip", tmp_path / "new.zip"), lambda: costs(tmp_path / "a.zip")):
        with pytest.raises(Unsupported, match=r"version 25\.5"):
            call()
    with pytest.raises(Unsupported, match=r"version 25\.5"):
        sources.ZipSource(tmp_path / "a.zip", "dir/text")


def test_a_wheel_of_numpy(tmp_path: Path) -> None:
    root = Path(np.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.is_file() and "tests" not in path.parts)
    biggest = max(files, key=lambda path: path.stat().st_size)
    wheel, packed, again = tmp_path / "numpy.whl", tmp_path / "packed.whl", tmp_path / "again.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as out:
        for path in sorted({*files[::10], biggest}):
            out.write(path, path.relative_to(root.parent))
    pack(wheel, packed)
    unpack(packed, again)
    assert_same_archive(wheel, packed)
    assert_same_archive(wheel, again)
    rng = random.Random(3)
    want = biggest.read_bytes()
    with sources.open_source(f"{packed}!/{biggest.relative_to(root.parent)}") as source:
        for _ in range(20):
            offset = rng.randrange(len(want))
            assert source.read(offset, min(5000, len(want) - offset)) == want[offset : offset + 5000]


@pytest.mark.skipif(shutil.which("unzip") is None, reason="there is no unzip command")
def test_unzip_reads_what_unpack_writes(tmp_path: Path) -> None:
    pack(all_kinds(tmp_path / "old.zip"), tmp_path / "packed.zip")
    subprocess.run(["unzip", "-l", tmp_path / "packed.zip"], check=True, capture_output=True)
    for stored in (False, True):
        unpack(tmp_path / "packed.zip", tmp_path / "new.zip", stored=stored, force=True)
        subprocess.run(["unzip", "-tq", tmp_path / "new.zip"], check=True, capture_output=True)


def test_frames_of_other_writers(tmp_path: Path) -> None:
    """A member of one long frame is cut into short ones."""
    path = tmp_path / "a.zip"
    info = zipfile.ZipInfo("member")
    info.file_size = len(TEXT)
    with path.open("w+b") as file:
        writer = ZipWriter(file)
        writer.begin(info, b"", 93)
        file.write(zstdfiles.frame(TEXT, size=False))
        writer.end(zlib.crc32(TEXT))
        writer.finish(b"")
    pack(path, tmp_path / "new.zip")
    with sources.open_source(f"{tmp_path}/new.zip!/member") as source:
        assert source._native.unit(0) == (0, FRAME_BYTES)
        assert source.read() == TEXT
