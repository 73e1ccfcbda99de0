"""Opening a program file: what it is, its first bytes tell, never its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire import _native
from quire.errors import Malformed
from quire.image import fatelf, script
from quire.image.containers import FatImage, ScriptImage
from quire.image.content import as_source
from quire.image.elf import ElfImage
from quire.image.macho import MachOImage, machine
from quire.image.naming import named
from quire.image.pe import PeImage

if TYPE_CHECKING:
    from quire.image.content import Content
    from quire.image.model import Image
    from quire.sources import Source

__all__ = ["read"]

_HEAD_BYTES = 8
_MACHO = {b"\xfe\xed\xfa\xce", b"\xce\xfa\xed\xfe", b"\xfe\xed\xfa\xcf", b"\xcf\xfa\xed\xfe"}
_UNIVERSAL = {b"\xca\xfe\xba\xbe", b"\xca\xfe\xba\xbf"}


def read(target: Content) -> Image:
    """Describe a program file. Reads its first headers; tables are read when they are asked for.

    Args:
        target: A path; a member of an archive (``app.whl!/pkg/x.so``); a url; a source; a snapshot; a region,
            whose source is read and whose pages are not; or a bytes-like object, which must not change.

    Returns:
        The image. Close it, or leave that to the collector, if a path or url was given.

    Raises:
        Malformed: It is of no known format, or its headers are damaged; the message names file and field.
        OSError: It cannot be opened.
        PageError: It cannot be read, or has changed while it was.
    """
    source, is_owned = as_source(target)
    try:
        image = _image(source, source.name, 0, source.size)
    except BaseException:
        if is_owned:
            source.close()
        raise
    if is_owned:
        image._owned = source
    return image


def _image(source: Source, name: str, offset: int, size: int) -> Image:
    head = source.read(offset, min(_HEAD_BYTES, size))
    if head[:4] == b"\x7fELF":
        return ElfImage(source, name, offset, size)
    if head[:2] == b"MZ":
        return PeImage(source, name, offset, size)
    if head[:4] in _MACHO:
        return MachOImage(source, name, offset, size)
    if head[:4] in _UNIVERSAL and (fat := _universal(source, name, size)) is not None:
        return fat
    if fatelf.is_fatelf(head):
        members = [
            ElfImage(source, f"{name} ({record.target})", record.offset, record.size)
            for record in fatelf.records(source)
        ]
        return FatImage("fatelf", source, name, size, members)
    if script.is_script(head):
        return ScriptImage(source, name, size)
    raise Malformed(f"{name}: of no known format: it begins with the bytes {head.hex(' ') or '(none)'}")


def _universal(source: Source, name: str, size: int) -> FatImage | None:
    """Read a universal file; None if it is a Java class, which begins with the same bytes."""
    with named(name):
        found = _native.macho_members(source._native, size)
    if found is None:
        return None
    members = [
        MachOImage(source, f"{name} ({machine(cpu_type)})", offset, member_size)
        for cpu_type, _, offset, member_size, _ in found
    ]
    return FatImage("universal", source, name, size, members)
