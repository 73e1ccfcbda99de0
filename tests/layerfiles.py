"""Layer files byte by byte, for tests that must be able to write wrong ones (docs/formats.md)."""

import fcntl
import os
import struct
import zlib
from dataclasses import dataclass, field

PAGE = 4096
FANOUT = 512
ALL_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

RUN = 1
NODE = 2


def run(index: int, slot: int = 0) -> int:
    return RUN << 62 | slot << 48 | index


def node(index: int, slot: int = 0) -> int:
    return NODE << 62 | slot << 48 | index


def layer_id(number: int) -> bytes:
    return struct.pack("<QQ", 0x7172, number)


def page(number: int) -> bytes:
    return bytes([number % 255 + 1]) * PAGE


def table(entries: dict[int, int]) -> bytes:
    """A node with these entries at these places and zeros elsewhere."""
    numbers = [0] * FANOUT
    for place, entry in entries.items():
        numbers[place] = entry
    return struct.pack(f"<{FANOUT}Q", *numbers)


@dataclass
class LayerFile:
    """What a layer says of itself, right unless a test says otherwise.

    ``claims`` replaces fields of the trailer by name; the checksum is right unless ``checksum`` is given.
    """

    number: int = 1
    data: list[bytes] = field(default_factory=list)
    nodes: list[dict[int, int]] = field(default_factory=list)
    imports: list[bytes] = field(default_factory=list)
    size: int = 0
    root: int = 0
    claims: dict[str, int | bytes] = field(default_factory=dict)
    checksum: int | None = None

    def trailer(self) -> bytes:
        fields: dict[str, int | bytes] = {
            "magic": b"QUIRELYR",
            "version": 1,
            "flags": 0,
            "id": layer_id(self.number),
            "data_pages": len(self.data),
            "node_pages": len(self.nodes),
            "imports": len(self.imports),
            "size": self.size,
            "root": self.root,
            "page_size": PAGE,
            "hash": bytes(32),
        } | self.claims
        formats = {"version": "<I", "flags": "<I"}
        offsets = {
            "magic": 0,
            "version": 8,
            "flags": 12,
            "id": 16,
            "data_pages": 32,
            "node_pages": 40,
            "imports": 48,
            "size": 56,
            "root": 64,
            "page_size": 72,
            "hash": 4064,
        }
        out = bytearray(PAGE)
        for name, value in fields.items():
            raw = value if isinstance(value, bytes) else struct.pack(formats.get(name, "<Q"), value)
            out[offsets[name] : offsets[name] + len(raw)] = raw
        for place, import_id in enumerate(self.imports):
            out[128 + 16 * place : 144 + 16 * place] = import_id
        checksum = zlib.crc32(out[:4060]) if self.checksum is None else self.checksum
        struct.pack_into("<I", out, 4060, checksum)
        return bytes(out)

    def content(self) -> bytes:
        return b"".join([*self.data, *map(table, self.nodes), self.trailer()])

    def descriptor(self, seals: int = ALL_SEALS) -> int:
        """A memfd with the content, sealed as asked; the caller's to close."""
        return memfd(self.content(), seals)


def memfd(content: bytes, seals: int = ALL_SEALS, length: int | None = None) -> int:
    """A memfd with the content and these seals; the caller's to close."""
    fd = os.memfd_create("layer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    if length is not None:
        os.ftruncate(fd, length)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def simple(number: int = 1, pages: int = 3) -> LayerFile:
    """A right snapshot of one layer: all pages, one after another."""
    return LayerFile(number, data=[page(i) for i in range(pages)], nodes=[], size=pages * PAGE, root=run(0))


def with_table(entries: dict[int, int], pages: int = 4, **more: object) -> LayerFile:
    """A snapshot of one layer whose root is one node; as many data pages as pages."""
    layer = LayerFile(data=[page(i) for i in range(pages)], nodes=[entries], size=pages * PAGE, root=node(0))
    for name, value in more.items():
        setattr(layer, name, value)
    return layer
