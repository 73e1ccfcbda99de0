"""What it costs to page an input: measured on the input itself, within a limit of time."""

from __future__ import annotations

import functools
import os
import random
import statistics
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from quire import _native
from quire.errors import PageError
from quire.packing import FRAME_BYTES, LEVEL, is_archive
from quire.sources import (
    ZIP_DEFLATED,
    ZIP_METHODS,
    ZIP_STORED,
    ZIP_ZSTANDARD,
    FileSource,
    GzipSource,
    ZipSource,
    cache_directory,
    data_start,
    kind_of,
    open_archive,
)
from quire.zipwriter import ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Costs", "Gain", "Members", "costs"]

Path = str | os.PathLike[str]
_T = TypeVar("_T")

# What a region fills at a touch, unless told otherwise.
_WINDOW_BYTES = 64 << 10
_PIECE_BYTES = 1 << 20
_SAMPLES = 31
_FRAMES = 32
_GZIP = 16 + zlib.MAX_WBITS
# A longer gzip file is not decoded as a whole only to be measured.
_PASS_BYTES = 64 << 20
_METHODS = ZIP_METHODS | {ZIP_STORED: "stored", ZIP_DEFLATED: "deflated", ZIP_ZSTANDARD: "zstandard"}

# As docs/sources.md tells; for checkpoints 32 KiB for each MiB of output.
_MEMORY = {"plain": 0, "checkpoints": 10 << 20, "frames": 16 << 20, "long frames": (10 + 2 * 128) << 20}
_POINT_SHARE, _POINTS_BYTES = 32, 64 << 20


@dataclass(frozen=True)
class Gain:
    """What `quire.packing.pack` would make of the input, estimated from samples of it."""

    output_bytes: int
    random_ms: float
    """A read at a random place: decoding one frame."""


@dataclass(frozen=True)
class Members:
    """What is in an archive."""

    count: int
    methods: dict[str, int]
    """Members that are not empty, by how they are compressed."""
    mappable: int
    """Stored members whose data starts at a multiple of 4096."""


@dataclass(frozen=True)
class Costs:
    """How an input would be paged, and at what cost here and now. What is None is not known."""

    target: str
    kind: str
    """``file``, ``gzip``, ``zstandard`` or ``zip``; of a member ``stored``, ``deflated`` or ``zstandard``."""
    paged: str
    """``plain`` bytes, from ``checkpoints``, by ``frames`` on their own, by ``long frames`` from their start,
    or ``members`` of an archive, each in its way."""
    content_bytes: int | None
    packed_bytes: int
    """What the content takes where it is."""
    unit_bytes: int | None = None
    """What is decoded together; the median of the places looked at. None: any range is as good."""
    cached: bool | None = None
    """Whether a first pass of before is remembered; None where none is needed."""
    open_ms: float | None = None
    first_byte_ms: float | None = None
    """When it is open."""
    random_ms: float | None = None
    """64 KiB at a random place, the median. From checkpoints: once the first pass has been there."""
    pass_ms: float | None = None
    """A first pass over everything, for which opening waits, or the first read of the end; 0 without need."""
    forward_bytes_per_s: float | None = None
    estimated: tuple[str, ...] = ()
    """Which of these were calculated from a part of the input."""
    memory_bytes: int | None = None
    """At most, besides the pages themselves."""
    gain: Gain | None = None
    """None if there is nothing to pack, or it is packed already."""
    members: Members | None = None
    largest: Costs | None = None
    """The largest member of an archive, if it can be paged."""

    def as_dict(self) -> dict[str, Any]:
        """Give plain data, for JSON."""
        return asdict(self)


def costs(target: Path, *, limit_s: float = 1.0) -> Costs:
    """Find out how a local input would be paged, and measure at what cost.

    Nothing is written, to the cache neither. Blocks for a few times ``limit_s``, and longer for a zstandard
    file whose frames do not tell their lengths: that has to be read to its end.

    Args:
        target: A file, ``archive.zip!/member``, or a whole zip archive.
        limit_s: How long each measurement may take, about, in seconds.

    Raises:
        ValueError: It is no regular file.
        OSError: It cannot be read.
        PageError: It is damaged.
        zipfile.BadZipFile: The archive is damaged.
        Unsupported: The member is encrypted, or of a method that quire has no codec for.
    """
    path = os.fspath(target)
    if is_archive(path):
        return _archive(path, limit_s)
    archive, mark, member = path.partition("!/")
    if mark and not os.path.exists(path):
        return _member(path, archive, member, limit_s)
    with FileSource(path) as plain:
        raw, packed = plain._native, plain.size
        codec = kind_of(plain)
    if codec is None:
        return _measured(path, "file", packed, lambda: FileSource(path)._native, None, limit_s)
    try:
        if codec is not GzipSource:
            return _zstandard(path, raw, packed, limit_s)
        cached = raw.opens_at_once("gzip", cache_directory())
        if not cached and packed > _PASS_BYTES:
            return _unopened(path, raw, limit_s)
        # With the cache only if that knows it, so that nothing is written there.
        used = cache_directory() if cached else None
        return _measured(path, "gzip", packed, lambda: raw.gzip(used), cached, limit_s)
    except PageError as error:
        raise PageError(f"{path}: {error}") from None


def _zstandard(path: str, raw: _native.Source, packed: int, limit_s: float) -> Costs:
    cache = cache_directory()
    cached = None if raw.opens_at_once("zstd") else raw.opens_at_once("zstd", cache)
    used = cache if cached else None
    return _measured(path, "zstandard", packed, lambda: raw.zstd(used), cached, limit_s)


def _member(path: str, archive: str, member: str, limit_s: float) -> Costs:
    with (
        ZipSource(archive, member) as source,
        open(archive, "rb") as file,
        open_archive(file, archive) as directory,
    ):
        info = directory.getinfo(member)
        packed, size, crc = info.compress_size, info.file_size, info.CRC
        raw = _native.Source.file(file.fileno(), data_start(directory, file, info, path), packed)
        # A source that was not read yet knows of chunks only what the cache has told.
        cached = size > 0 and _unit(source._native, size - 1) > 0
    if info.compress_type == ZIP_STORED:
        return _measured(path, "stored", packed, lambda: raw, None, limit_s)
    try:
        if info.compress_type == ZIP_ZSTANDARD:
            return _zstandard(path, raw, packed, limit_s)
        used = cache_directory() if cached else None
        return _measured(path, "deflated", packed, lambda: raw.deflate(size, crc, used), cached, limit_s)
    except PageError as error:
        raise PageError(f"{path}: {error}") from None


def _archive(path: str, limit_s: float) -> Costs:
    with open(path, "rb") as file, open_archive(file, path) as archive:
        everything = archive.infolist()
        infos = [info for info in everything if info.file_size]
        mappable = sum(
            info.compress_type == ZIP_STORED
            and data_start(archive, file, info, f"{path}!/{info.filename}") % ALIGNMENT == 0
            for info in infos
        )
        packed = os.fstat(file.fileno()).st_size
    methods = Counter(_METHODS.get(info.compress_type, f"method {info.compress_type}") for info in infos)
    pageable = (ZIP_STORED, ZIP_DEFLATED, ZIP_ZSTANDARD)
    readable = [i for i in infos if i.compress_type in pageable and not i.filename.endswith("/")]
    largest = None
    if readable:
        name = max(readable, key=lambda info: info.file_size).filename
        largest = _member(f"{path}!/{name}", path, name, limit_s)
    return Costs(
        path,
        "zip",
        "members",
        sum(info.file_size for info in infos),
        packed,
        members=Members(len(everything), dict(methods), mappable),
        largest=largest,
    )


def _unopened(path: str, raw: _native.Source, limit_s: float) -> Costs:
    """Estimate a gzip file from its beginning."""
    decoder = zlib.decompressobj(_GZIP)
    packed = b""
    consumed = made = 0
    parts: list[bytes] = []
    start = time.perf_counter()
    while consumed < _PASS_BYTES and (not parts or time.perf_counter() - start < limit_s):
        if not packed:
            packed = raw.read(consumed, FRAME_BYTES)
            consumed += len(packed)
        try:
            part = decoder.decompress(packed, FRAME_BYTES)
        except zlib.error as error:
            raise PageError(f"{path}: {error}") from error
        packed = decoder.unconsumed_tail
        if decoder.eof:
            # Files that are made for random access have many members, with zeros as padding between them.
            packed = decoder.unused_data.lstrip(b"\0")
            decoder = zlib.decompressobj(_GZIP)
        made += len(part)
        if part and len(parts) < _FRAMES:
            parts.append(part)
    if not parts:
        raise PageError(f"{path}: there is no content in its first {consumed} bytes")
    rate = made / (time.perf_counter() - start)
    content = raw.size * made // (consumed - len(packed))
    pass_ms = content / rate * 1e3
    return Costs(
        path,
        "gzip",
        "checkpoints",
        None,
        raw.size,
        cached=False,
        open_ms=pass_ms,
        pass_ms=pass_ms,
        forward_bytes_per_s=rate,
        estimated=("open_ms", "pass_ms"),
        memory_bytes=_memory("checkpoints", content),
        gain=_gain(parts, content),
    )


def _measured(
    target: str,
    kind: str,
    packed: int,
    opener: Callable[[], _native.Source],
    cached: bool | None,
    limit_s: float,
) -> Costs:
    native, open_s = _timed(opener)
    size = native.size
    if not size:
        return Costs(
            target,
            kind,
            "plain",
            0,
            packed,
            cached=cached,
            open_ms=open_s * 1e3,
            pass_ms=open_s * 1e3 if cached is False else 0.0,
            memory_bytes=0,
        )
    paged = _paging(kind, native)
    _, first_s = _timed(lambda: native.read(0, 1))
    estimated = []
    # A first pass that opening did not need goes where reads go, so it is measured first.
    lazy = kind == "deflated" and not cached
    random_s = None if lazy or paged == "long frames" else _random_read(native, size, limit_s)
    passed, forward_s = _forward(native, size, limit_s)
    pass_s = open_s if cached is False else 0.0
    if lazy:
        pass_s = forward_s * size / passed
        if passed < size:
            estimated.append("pass_ms")
    if paged == "long frames" and passed < size:
        # Half of all that is before and in the frame: more than this only if another frame has to be left.
        random_s = forward_s * size / passed / 2
        estimated.append("random_ms")
    elif random_s is None:
        random_s = _random_read(native, passed, limit_s)
    units = [_unit(native, at) for at in _places(passed, 1, _SAMPLES)]
    gain = None
    if paged != "frames":
        parts = [native.read(at, min(FRAME_BYTES, size - at)) for at in _places(passed, FRAME_BYTES, _FRAMES)]
        gain = _gain(parts, size)
    return Costs(
        target,
        kind,
        paged,
        size,
        packed,
        unit_bytes=int(statistics.median(units)) or None,
        cached=cached,
        open_ms=open_s * 1e3,
        first_byte_ms=first_s * 1e3,
        random_ms=random_s * 1e3,
        pass_ms=pass_s * 1e3,
        forward_bytes_per_s=passed / forward_s,
        estimated=tuple(estimated),
        memory_bytes=_memory(paged, size),
        gain=gain,
    )


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _unit(native: _native.Source, offset: int) -> int:
    start, stop = native.unit(offset)
    return stop - start


def _paging(kind: str, native: _native.Source) -> str:
    if kind in ("file", "stored"):
        return "plain"
    if kind in ("gzip", "deflated"):
        return "checkpoints"
    return "frames" if all(_unit(native, at) for at in _places(native.size, 1, _SAMPLES)) else "long frames"


def _memory(paged: str, size: int) -> int:
    points = min(size // _POINT_SHARE, _POINTS_BYTES) if paged == "checkpoints" else 0
    most = min(_MEMORY[paged], size) if paged == "frames" else _MEMORY[paged]
    return most + points


def _places(size: int, length: int, count: int) -> Iterator[int]:
    """Offsets spread evenly, where so many bytes are, or all there are."""
    room = max(0, size - length)
    count = min(count, room // length + 1)
    return (room * number // max(1, count - 1) for number in range(count))


def _random_read(native: _native.Source, size: int, limit_s: float) -> float:
    """The median time of a read somewhere in the first ``size`` bytes, in seconds."""
    chance = random.Random(size)  # noqa: S311 - the same places each time are what is wanted
    length = min(_WINDOW_BYTES, size)
    times: list[float] = []
    while len(times) < _SAMPLES and sum(times) < limit_s:
        at = chance.randint(0, size - length)
        times.append(_timed(functools.partial(native.read, at, length))[1])
    return statistics.median(times)


def _forward(native: _native.Source, size: int, limit_s: float) -> tuple[int, float]:
    """Read forwards for a while; how many bytes, in how many seconds."""
    at, spent = 0, 0.0
    while at < size and spent < limit_s:
        length = min(_PIECE_BYTES, size - at)
        spent += _timed(functools.partial(native.read, at, length))[1]
        at += length
    return at, spent


def _gain(parts: list[bytes], size: int) -> Gain:
    """Pack samples of content, and decode them."""
    encoder = _native.FrameEncoder(LEVEL)
    frames = [encoder.frame(part) for part in parts]
    times = [
        _timed(functools.partial(_decode, frame, len(part)))[1]
        for frame, part in zip(frames, parts, strict=True)
    ]
    share = sum(map(len, frames)) / sum(map(len, parts))
    return Gain(round(size * share), statistics.median(times) * 1e3)


def _decode(frame: bytes, length: int) -> bytes:
    return _native.Source.buffer(frame).zstd().read(0, length)
