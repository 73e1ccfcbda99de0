"""Zstandard files, made with the `zstandard` package."""

import struct

import zstandard


def frame(data: bytes, *, size: bool = True, checksum: bool = True, level: int = 3) -> bytes:
    """One frame; without ``size`` its header does not tell the length of its content."""
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size)
    if size:
        return compressor.compress(data)
    stream = compressor.compressobj()
    return stream.compress(data) + stream.flush()


def parts(data: bytes, length: int) -> list[bytes]:
    return [data[at : at + length] for at in range(0, len(data), length)]


def seekable(data: bytes, length: int) -> bytes:
    """Frames of ``length`` bytes of content, with a seek table behind them."""
    frames = [(frame(part), part) for part in parts(data, length)]
    return b"".join(packed for packed, _ in frames) + table(
        [(len(packed), len(part)) for packed, part in frames]
    )


def table(entries: list[tuple[int, int]]) -> bytes:
    body = b"".join(struct.pack("<II", *entry) for entry in entries)
    content = body + struct.pack("<IBI", len(entries), 0, 0x8F92EAB1)
    return struct.pack("<II", 0x184D2A5E, len(content)) + content
