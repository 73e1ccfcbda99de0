"""What is said of the costs of paging, against what sources really do."""

import gzip
import json
import random
import zipfile
from pathlib import Path

import pytest
import zstdfiles
from support import MIB, nothing_left

from quire import cli, sources
from quire import costs as costs_module
from quire.costs import Costs, costs
from quire.errors import PageError, Unsupported
from quire.packing import FRAME_BYTES, pack

WORDS = [random.Random(5).randbytes(random.Random(n).randint(2, 9)) for n in range(3000)]
TEXT = b"".join(random.Random(6).choices(WORDS, k=1_000_000))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def zipped(path: Path, method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr("small", b"small")
        out.writestr("empty", b"")
        out.writestr("member", TEXT)
    return f"{path}!/member"


def made(kind: str, folder: Path) -> tuple[str | Path, str, str]:
    """An input, and the kind and paging that must be found."""
    if kind == "plain":
        return written(folder / "plain", TEXT), "file", "plain"
    if kind == "gzip":
        return written(folder / "a.gz", gzip.compress(TEXT, 1)), "gzip", "checkpoints"
    if kind == "packed":
        pack(written(folder / "plain", TEXT), folder / "packed")
        return folder / "packed", "zstandard", "frames"
    if kind == "long":
        return written(folder / "long", zstdfiles.frame(TEXT)), "zstandard", "long frames"
    if kind == "piped":
        return written(folder / "piped", zstdfiles.frame(TEXT, size=False)), "zstandard", "long frames"
    if kind == "deflated":
        return zipped(folder / "a.zip"), "deflated", "checkpoints"
    if kind == "stored":
        return zipped(folder / "a.zip", zipfile.ZIP_STORED), "stored", "plain"
    zipped(folder / "a.zip")
    pack(folder / "a.zip", folder / "packed.zip")
    return f"{folder}/packed.zip!/member", "zstandard", "frames"


KINDS = ["plain", "gzip", "packed", "long", "piped", "deflated", "stored", "packed member"]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, tmp_path: Path, own_cache: Path) -> None:
    target, named, paged = made(kind, tmp_path)
    with nothing_left():
        found = costs(target)
    assert (found.kind, found.paged, found.content_bytes) == (named, paged, len(TEXT))
    assert found.estimated == ()
    assert not own_cache.exists(), "nothing is written to the cache"
    for figure in (found.open_ms, found.first_byte_ms, found.random_ms, found.forward_bytes_per_s):
        assert figure is not None
        assert figure > 0
    needs_pass = kind in ("gzip", "piped", "deflated")
    assert found.cached is (False if needs_pass else None)
    assert found.pass_ms is not None
    assert (found.pass_ms > 0) is needs_pass
    if paged == "frames":
        assert found.unit_bytes == FRAME_BYTES
        assert found.gain is None
    else:
        assert found.gain is not None
        packed = pack(target, tmp_path / "really").output_bytes
        assert found.gain.output_bytes == pytest.approx(packed, rel=0.05)


@pytest.mark.parametrize("kind", ["gzip", "piped", "deflated"])
def test_what_is_remembered_is_seen(kind: str, tmp_path: Path) -> None:
    target, _, _ = made(kind, tmp_path)
    with sources.open_source(target) as source:
        source.read()
    found = costs(target)
    assert found.cached is True
    assert found.pass_ms == 0


@pytest.mark.parametrize("kind", ["long", "deflated"])
def test_what_takes_too_long_is_estimated(kind: str, tmp_path: Path) -> None:
    target, _, _ = made(kind, tmp_path)
    found = costs(target, limit_s=1e-9)
    assert found.estimated == (("random_ms",) if kind == "long" else ("pass_ms",))
    assert found.content_bytes == len(TEXT)


@pytest.mark.parametrize("members", [1, 100])
def test_a_long_gzip_file_is_not_decoded(
    members: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs_module, "_PASS_BYTES", FRAME_BYTES)
    parts = zstdfiles.parts(TEXT, len(TEXT) // members + 1)
    path = written(tmp_path / "a.gz", b"".join(gzip.compress(part, 1) + bytes(5) for part in parts))
    found = costs(path)
    assert (found.kind, found.content_bytes, found.cached) == ("gzip", None, False)
    assert found.estimated == ("open_ms", "pass_ms")
    assert found.gain is not None
    assert found.gain.output_bytes == pytest.approx(pack(path, tmp_path / "out").output_bytes, rel=0.3)


@pytest.mark.parametrize("limit_s", [0.0, 1.0])
def test_a_long_gzip_file_that_is_none(
    limit_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs_module, "_PASS_BYTES", FRAME_BYTES)
    head = gzip.compress(TEXT, 1)[:10]
    for data in (head + b"\xff" * MIB, head[:3] + b"\x08" + head[4:] + b"x" * MIB):
        with pytest.raises(PageError, match=r"a\.gz"):
            costs(written(tmp_path / "a.gz", data), limit_s=limit_s)


def test_whole_archives(tmp_path: Path) -> None:
    zipped(tmp_path / "a.zip")
    found = costs(tmp_path / "a.zip")
    assert (found.kind, found.content_bytes) == ("zip", len(TEXT) + 5)
    assert found.members is not None
    assert (found.members.count, found.members.methods, found.members.mappable) == (3, {"deflated": 2}, 0)
    assert found.largest is not None
    assert (found.largest.kind, found.largest.content_bytes) == ("deflated", len(TEXT))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as out:
        out.writestr("noise", random.Random(1).randbytes(MIB))
    pack(tmp_path / "b.zip", tmp_path / "c.zip")
    members = costs(tmp_path / "c.zip").members
    assert members is not None
    assert (members.methods, members.mappable) == ({"stored": 1}, 1)
    with zipfile.ZipFile(tmp_path / "d.zip", "w"):
        pass
    assert costs(tmp_path / "d.zip").largest is None


@pytest.mark.parametrize("data", [b"", gzip.compress(b""), zstdfiles.frame(b""), b"x", gzip.compress(b"x")])
def test_small_inputs(data: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "file", data)
    with sources.open_source(path) as source:
        assert costs(path).content_bytes == source.size
    assert cli.main(["stat", str(path)]) == 0
    assert str(path) in capfd.readouterr().out


def test_what_cannot_be_examined(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        costs(tmp_path / "missing")
    with pytest.raises(ValueError, match="no regular file"):
        costs(tmp_path)
    with pytest.raises(PageError, match="file"):
        costs(written(tmp_path / "file", zstdfiles.frame(TEXT)[:-100]))
    with pytest.raises(zipfile.BadZipFile):
        costs(written(tmp_path / "file", b"PK\3\4"))
    zipped(tmp_path / "a.zip", zipfile.ZIP_BZIP2)
    assert costs(tmp_path / "a.zip").largest is None
    with pytest.raises(Unsupported, match="bzip2"):
        costs(f"{tmp_path}/a.zip!/member")


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = [str(made(kind, tmp_path)[0]) for kind in ("gzip", "deflated", "packed")]
    assert cli.main(["stat", *inputs, str(tmp_path / "a.zip")]) == 0
    text = capfd.readouterr().out
    assert text.count("  random read  ") == 4
    assert "The largest member:" in text
    assert max(map(len, text.splitlines())) < 120 + len(str(tmp_path))
    assert cli.main(["stat", "--json", "--limit", "0.1", *inputs, str(tmp_path / "missing")]) == 1
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert [each["kind"] for each in found] == ["gzip", "deflated", "zstandard"]
    assert set(found[0]) == set(Costs.__dataclass_fields__)
    assert "No such file" in err
