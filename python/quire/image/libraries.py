"""Where glibc's dynamic linker finds the libraries that a program needs; nothing is run to learn it.

The rules are those of ld.so(8). Not considered: ``LD_PRELOAD``, ``/etc/ld.so.preload``, audit libraries,
variants for certain processors (``glibc-hwcaps``), and what a program loads with ``dlopen``.
"""

from __future__ import annotations

import functools
import os
import struct
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from quire.errors import Malformed
from quire.image.elf import ElfImage
from quire.image.machines import IDENT_BYTES, Ident, identify
from quire.image.reading import read

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from quire.image.model import Symbol

__all__ = ["CACHE", "Library", "cached", "resolve"]

CACHE = "/etc/ld.so.cache"
"""What ldconfig has found in the directories of its configuration."""

_CACHE_MAGIC = b"glibc-ld.so.cache1.1"
_CACHE_HEADER = struct.Struct("=20sIIB3xI12x")
_CACHE_ENTRY = struct.Struct("=iIIIQ")
_CACHE_BYTES_MAX = 64 << 20
_NODEFLIB = 0x800
_DT_FLAGS_1 = 0x6FFFFFFB
# So many libraries has no program; a file that needs more was made to waste time.
_LIBRARIES_MAX = 10_000
# What Debian and its children call the directories of each machine.
_MULTIARCH = {
    (62, 64, "little"): "x86_64-linux-gnu",
    (62, 32, "little"): "x86_64-linux-gnux32",
    (3, 32, "little"): "i386-linux-gnu",
    (183, 64, "little"): "aarch64-linux-gnu",
    (40, 32, "little"): "arm-linux-gnueabihf",
    (243, 64, "little"): "riscv64-linux-gnu",
    (21, 64, "little"): "powerpc64le-linux-gnu",
    (22, 64, "big"): "s390x-linux-gnu",
    (258, 64, "little"): "loongarch64-linux-gnu",
}


class Library(NamedTuple):
    """A library that is needed, and where it is."""

    name: str
    """As whoever needs it calls it."""
    path: str | None
    """The file that the linker takes; None if there is none."""
    needed_by: str
    """The name of the file that needs it first."""
    lacks: tuple[str, ...] = ()
    """Versions of symbols that it is to have, and has not."""


class _Object(NamedTuple):
    """What was loaded, and what it was loaded for."""

    image: ElfImage
    origin: str
    parent: _Object | None

    def searched(self) -> Iterator[str]:
        """List the directories that the object, and those it is needed for, say to look into first."""
        if self.image.runpath is not None:
            return
        this: _Object | None = self
        while this:
            if this.image.runpath is None and this.image.rpath:
                yield from _directories(this.image.rpath, this.origin, self.image.bits)
            this = this.parent


def resolve(image: ElfImage, path: str | None, environ: Mapping[str, str] | None = None) -> list[Library]:
    """Find every library that a program or shared object needs, and those need, in the order of loading.

    Args:
        image: Stays the caller's.
        path: Of its file, for ``$ORIGIN``; None if it has none, as a program in memory.
        environ: The environment it runs with, for ``LD_LIBRARY_PATH``; by default this process's.

    Returns:
        Each once, found or not, without the dynamic linker, which is there before.

    Raises:
        Malformed: The dynamic section of the image is damaged. A damaged library counts as not found.
        PageError: The image cannot be read.
    """
    variables = os.environ if environ is None else environ
    # As in the linker, an empty variable is none, and an empty entry in one the current directory.
    given = variables.get("LD_LIBRARY_PATH") or None
    origin = "/" if path is None else os.path.dirname(os.path.realpath(path))
    queue = deque([_Object(image, origin, None)])
    found: list[Library] = []
    known: dict[str, ElfImage | None] = {}
    opened: list[ElfImage] = []
    linker = _library(image.interpreter, image) if image.interpreter else None
    if linker is not None:
        opened.append(linker)
        known[linker.soname or os.path.basename(image.interpreter or "")] = linker
    try:
        while queue:
            this = queue.popleft()
            for name in this.image.needed:
                if name not in known:
                    place, library = _find(name, this, given)
                    known[name] = library
                    if library is not None:
                        opened.append(library)
                        if library.soname:
                            known.setdefault(library.soname, library)
                        queue.append(_Object(library, os.path.dirname(os.path.realpath(place or "")), this))
                    found.append(Library(name, place, this.image.name))
                if len(found) > _LIBRARIES_MAX:
                    raise Malformed(f"{image.name}: it needs more than {_LIBRARIES_MAX} libraries")
        return _with_versions(image, opened, found, known)
    finally:
        for library in opened:
            library.close()


def _with_versions(
    image: ElfImage, opened: list[ElfImage], found: list[Library], known: dict[str, ElfImage | None]
) -> list[Library]:
    """Add to each library what versions of symbols it lacks that somebody needs of it."""
    wanted: dict[str, set[str]] = {}
    for user in (image, *opened):
        for symbol in _of_symbols(user, "imports"):
            if symbol.version is not None and symbol.version.library is not None and symbol.binding != "WEAK":
                wanted.setdefault(symbol.version.library, set()).add(symbol.version.name)
    lacks: dict[str, set[str]] = {}
    for name, versions in wanted.items():
        library = known.get(name)
        there = set() if library is None else _versions(library)
        # A library without versions satisfies all, as the linker has it.
        if there:
            lacks[name] = versions - there
    return [each._replace(lacks=tuple(sorted(lacks.get(each.name, ())))) for each in found]


def _of_symbols(image: ElfImage, which: str) -> list[Symbol]:
    """List imports or exports; none of a library whose tables are damaged, which is told elsewhere."""
    try:
        return image.imports() if which == "imports" else image.exports()
    except Malformed:
        return []


def _versions(image: ElfImage) -> set[str]:
    return {symbol.version.name for symbol in _of_symbols(image, "exports") if symbol.version is not None}


def _find(name: str, user: _Object, given: str | None) -> tuple[str | None, ElfImage | None]:
    """Find a library that an object needs, in the linker's order; its path and image, or two times None."""
    for place in _places(name, user, given):
        library = _library(place, user.image)
        if library is not None:
            return place, library
    return None, None


def _places(name: str, user: _Object, given: str | None) -> Iterator[str]:
    bits = user.image.bits
    if "/" in name:
        yield _expanded(name, user.origin, bits)
        return
    folders = [*user.searched()]
    if given is not None:
        folders += [
            _expanded(entry, user.origin, bits) or "." for entry in given.replace(";", ":").split(":")
        ]
    if user.image.runpath is not None:
        folders += _directories(user.image.runpath, user.origin, bits)
    yield from (os.path.join(folder, name) for folder in folders)
    flags = next((entry.value for entry in user.image.dynamic if entry.tag == _DT_FLAGS_1), 0)
    if not flags & _NODEFLIB:
        yield from cached().get(name, ())
        image = user.image
        multiarch = _MULTIARCH.get((image.machine_number, image.bits, image.byte_order))
        folders = [f"/lib/{multiarch}", f"/usr/lib/{multiarch}"] if multiarch else []
        folders += ["/lib64", "/usr/lib64"] if bits == 64 else ["/lib32", "/usr/lib32"]
        yield from (os.path.join(folder, name) for folder in (*folders, "/lib", "/usr/lib"))


def _directories(search: str, origin: str, bits: int) -> Iterator[str]:
    for entry in search.split(":"):
        yield _expanded(entry, origin, bits) or "."


def _expanded(text: str, origin: str, bits: int) -> str:
    for name, value in (
        ("ORIGIN", origin),
        ("LIB", "lib64" if bits == 64 else "lib"),
        ("PLATFORM", os.uname().machine),
    ):
        text = text.replace(f"${{{name}}}", value).replace(f"${name}", value)
    return text


def _library(place: str, user: ElfImage) -> ElfImage | None:
    """Open a file if it is a library for the same machine; the linker goes on looking if it is not."""
    wanted = (user.machine_number, user.bits, user.byte_order)
    try:
        if not os.path.isfile(place):
            return None
        with open(place, "rb") as file:
            ident = identify(file.read(IDENT_BYTES))
        if ident is None or _key(ident) != wanted:
            return None
        image = read(place)
        # Damage in it shows here, and not later where it would be taken for the program's.
        if not isinstance(image, ElfImage) or image.needed is None:
            return None
    except (OSError, Malformed):
        return None
    return image


def _key(ident: Ident) -> tuple[int, int, str]:
    return ident.machine, ident.bits, ident.byte_order


@functools.lru_cache(maxsize=1)
def _cached(path: str, mtime_ns: int, size: int) -> dict[str, tuple[str, ...]]:  # noqa: ARG001 - tell states apart
    with open(path, "rb") as file:
        data = file.read(_CACHE_BYTES_MAX + 1)
    # Older ldconfig writes its older format before it.
    start = data.find(_CACHE_MAGIC)
    if start < 0 or len(data) > _CACHE_BYTES_MAX or start + _CACHE_HEADER.size > len(data):
        raise Malformed(f"{path}: it has no table of the form that begins with {_CACHE_MAGIC.decode()}")
    _, count, _, _, _ = _CACHE_HEADER.unpack_from(data, start)
    first = start + _CACHE_HEADER.size
    if first + count * _CACHE_ENTRY.size > len(data):
        raise Malformed(f"{path}: its {count} entries end behind the file")
    found: dict[str, dict[str, None]] = {}
    for _, key, value, _, hwcap in _CACHE_ENTRY.iter_unpack(data[first : first + count * _CACHE_ENTRY.size]):
        if not hwcap:
            found.setdefault(_text(data, start + key, path), {})[_text(data, start + value, path)] = None
    return {name: (*paths,) for name, paths in found.items()}


def _text(data: bytes, offset: int, path: str) -> str:
    end = data.find(b"\0", offset)
    if end < 0:
        raise Malformed(f"{path}: the name at byte {offset} does not end")
    return os.fsdecode(data[offset:end])


def cached(path: str = CACHE) -> dict[str, tuple[str, ...]]:
    """Read the linker's cache: the files for each name, of all machines, without variants for processors.

    Returns:
        Empty if there is no cache.

    Raises:
        Malformed: It is damaged, or in a form that is not known.
        OSError: It cannot be read.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return {}
    return _cached(path, status.st_mtime_ns, status.st_size)
