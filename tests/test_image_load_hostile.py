"""Damaged and hostile shared objects: refused before the dynamic linker gets them, or harmless."""

import collections
import itertools
import json
import os
import pathlib
import random
import resource
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator

import pytest
from elfpeers import elf_files, is_sampled
from libraries import LARGE, compiled, zipped
from support import MIB, TESTS
from test_image_load import refusal

import quire
from quire import _native, image
from quire.image.elf import ElfImage
from quire.linking import WINDOW_BYTES
from quire.sources import BytesSource, FileSource

# Nothing of it runs while it is linked: whatever happens then is the dynamic linker's doing.
VICTIM = """
#include <errno.h>
#include <stdio.h>
__thread int own = 1, other;
int counter = 3, *where = &counter;
static int hidden;
int *const table[40] = {&counter, &hidden, &counter, &hidden};
int bump_1(int by) { own += by; errno = 0; return *where + *table[by & 1]; }
int bump_2(int by) { other += by; return puts("bump") + bump_1(by); }
__asm__(".symver bump_1,bump@V1\\n.symver bump_2,bump@@V2");
"""
VERSIONS = "V1 { global: where; bump; local: hidden; };\nV2 { global: own; table; } V1;\n"
INTERESTING = (
    0,
    1,
    7,
    0x7F,
    0xFF,
    0xFFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 63,
    (1 << 64) - 1,
    (1 << 64) - 4096,
)
MACHINE = {"x86_64": 62, "aarch64": 183}[os.uname().machine]
# Why nothing can be left until it is touched here.
REFUSAL = refusal()
# All shared objects of this machine: QUIRE_ALL_IMAGES=1.
ONE_IN = 1 if os.environ.get("QUIRE_ALL_IMAGES") else 20
PT_LOAD, PT_DYNAMIC, PT_NOTE, PT_PHDR, PT_TLS, PT_RELRO = 1, 2, 4, 6, 7, 0x6474E552
# What sections of tables are called; code and data, which run, are left as they are.
TABLES = (
    ".gnu.hash",
    ".hash",
    ".dynsym",
    ".dynstr",
    ".gnu.version",
    ".gnu.version_d",
    ".gnu.version_r",
    ".rela.dyn",
    ".rela.plt",
    ".relr.dyn",
    ".dynamic",
)
TAGS = {
    "NEEDED": 1,
    "PLTRELSZ": 2,
    "PLTGOT": 3,
    "HASH": 4,
    "STRTAB": 5,
    "SYMTAB": 6,
    "RELA": 7,
    "RELASZ": 8,
    "RELAENT": 9,
    "STRSZ": 10,
    "INIT": 12,
    "FINI": 13,
    "SONAME": 14,
    "RPATH": 15,
    "REL": 17,
    "PLTREL": 20,
    "JMPREL": 23,
    "INIT_ARRAY": 25,
    "FINI_ARRAY": 26,
    "INIT_ARRAYSZ": 27,
    "RUNPATH": 29,
    "FLAGS": 30,
    "RELRSZ": 35,
    "RELR": 36,
    "RELRENT": 37,
    "GNU_HASH": 0x6FFFFEF5,
    "VERSYM": 0x6FFFFFF0,
    "RELACOUNT": 0x6FFFFFF9,
    "FLAGS_1": 0x6FFFFFFB,
    "VERDEF": 0x6FFFFFFC,
    "VERNEED": 0x6FFFFFFE,
}
IGNORED_TAG = 0x60001234
# The field of a program header, and where it stands in it.
FIELDS = {"type": (0, "I"), "flags": (4, "I"), "offset": (8, "Q"), "vaddr": (16, "Q"), "filesz": (32, "Q")}
FIELDS |= {"memsz": (40, "Q"), "align": (48, "Q")}


class Bent:
    """A shared object of 64 bits, little-endian, whose fields can be set by name."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def get(self, at: int, kind: str) -> int:
        return int(struct.unpack_from(f"<{kind}", self.data, at)[0])

    def put(self, at: int, kind: str, value: int) -> None:
        struct.pack_into(f"<{kind}", self.data, at, value)

    def headers(self, kind: int) -> list[int]:
        """Where the program headers of a type stand."""
        start, count = self.get(32, "Q"), self.get(56, "H")
        return [at for at in range(start, start + 56 * count, 56) if self.get(at, "I") == kind]

    def header(self, kind: int, field: str, value: int | None = None, number: int = 0) -> int:
        """A field of a program header, which is set if a value is given."""
        at, size = FIELDS[field]
        at += self.headers(kind)[number]
        if value is not None:
            self.put(at, size, value)
        return self.get(at, size)

    def entries(self) -> Iterator[tuple[int, int, int]]:
        """The entries of the dynamic section: where, tag, value."""
        start = self.header(PT_DYNAMIC, "offset")
        for at in itertools.count(start, 16):
            if not self.get(at, "Q"):
                return
            yield at, self.get(at, "Q"), self.get(at + 8, "Q")

    def entry(self, name: str, value: int | None = None) -> int:
        """The value of an entry of the dynamic section, which is set if a value is given."""
        at = next(at for at, tag, _ in self.entries() if tag == TAGS[name])
        if value is not None:
            self.put(at + 8, "Q", value & (1 << 64) - 1)
        return self.get(at + 8, "Q")

    def retag(self, name: str, tag: int = IGNORED_TAG) -> None:
        """Make another entry of it, one that says nothing by default."""
        at = next(at for at, found, _ in self.entries() if found == TAGS[name])
        self.put(at, "Q", tag)

    def offset(self, address: int) -> int:
        """Where in the file an address comes from."""
        for at in self.headers(PT_LOAD):
            inside = address - self.get(at + 16, "Q")
            if 0 <= inside < self.get(at + 32, "Q"):
                return self.get(at + 8, "Q") + inside
        raise AssertionError(hex(address))

    def table(self, name: str) -> int:
        """Where in the file the table is that an entry points to."""
        return self.offset(self.entry(name))

    def relocation(self, kind: int, table: str = "RELA") -> int:
        """Where in the file the first relocation of a type stands."""
        size = self.entry("RELASZ" if table == "RELA" else "PLTRELSZ")
        start = self.table(table)
        return next(at for at in range(start, start + size, 24) if self.get(at + 8, "I") == kind)


def check(data: bytes) -> str:
    """Lay it out and check it, and nothing more; why it is loaded whole, if it is."""
    return _native.Library(BytesSource(data)._native, "victim.so", WINDOW_BYTES, None).share()[0]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return built(tmp_path_factory.mktemp("victim"))


def built(folder: pathlib.Path, *flags: str) -> bytes:
    (folder / "versions").write_text(VERSIONS, "ascii")
    options = [
        "-nostartfiles",
        "-Wl,--hash-style=both",
        "-Wl,-soname,victim.so",
        "-Wl,-rpath,$ORIGIN/x",
        "-Wl,-z,lazy",
    ]
    return compiled(
        folder, "victim.so", VICTIM, *options, f"-Wl,--version-script={folder / 'versions'}", *flags
    ).read_bytes()


RELATIVE, GLOBAL, SLOT, TLS_MODULE = (
    (1027, 1025, 1026, 1028) if os.uname().machine == "aarch64" else (8, 6, 7, 16)
)
COPY, INDIRECT = (1024, 1032) if os.uname().machine == "aarch64" else (5, 37)

Change = Callable[[Bent], object]


def chained(bent: Bent) -> None:
    """Let the first chain of ``DT_HASH`` come back to its first symbol."""
    table = bent.table("HASH")
    buckets = bent.get(table, "I")
    symbol = next(filter(None, (bent.get(table + 8 + 4 * bucket, "I") for bucket in range(buckets))))
    bent.put(table + 8 + 4 * buckets + 4 * symbol, "I", symbol)


def endless(bent: Bent) -> None:
    """Take the end of every chain of ``DT_GNU_HASH`` away, to the end of its segment."""
    table = bent.table("GNU_HASH")
    buckets, _, words, _ = struct.unpack_from("<4I", bent.data, table)
    end = bent.header(PT_LOAD, "offset") + bent.header(PT_LOAD, "filesz")
    for at in range(table + 16 + 8 * words + 4 * buckets, end - 3, 4):
        bent.put(at, "I", bent.get(at, "I") & ~1)


# What is changed, and what the message says.
CASES: dict[str, tuple[Change, str]] = {
    "cut in the header": (lambda b: b.data.__delitem__(slice(40, None)), r"e_ident: 40 bytes"),
    "cut in the program headers": (lambda b: b.data.__delitem__(slice(200, None)), r"e_phoff: .* not within"),
    "cut in a segment": (
        lambda b: b.data.__delitem__(slice(5000, None)),
        r"PT_LOAD \d: .* not within the file",
    ),
    "no ELF file": (lambda b: b.put(0, "I", 0), r"e_ident: .* not those of an ELF file"),
    "32 bits": (lambda b: b.put(4, "B", 1), r"EI_CLASS: 1: not a 64-bit object"),
    "big-endian": (lambda b: b.put(5, "B", 2), r"EI_DATA: 2: not little-endian"),
    "another machine": (lambda b: b.put(18, "H", 8), r"e_machine: 8: not for this machine"),
    "a program": (lambda b: b.put(16, "H", 2), r"e_type: 2: no shared object"),
    "a position-independent program": (
        lambda b: (b.entry("RUNPATH", 1 << 27), b.retag("RUNPATH", TAGS["FLAGS_1"])),
        r"DT_FLAGS_1: it is a program",
    ),
    "too many program headers": (lambda b: b.put(56, "H", 0xFFFF), r"e_phnum: 65535"),
    "overlapping segments": (
        lambda b: b.header(PT_LOAD, "memsz", 1 << 20),
        r"PT_LOAD 1: overlaps the segment before it",
    ),
    "a segment that overflows in memory": (
        lambda b: b.header(PT_LOAD, "memsz", (1 << 64) - 1, -1),
        r"PT_LOAD \d: .*beyond the address space",
    ),
    "a segment that overflows in the file": (
        lambda b: b.header(PT_LOAD, "filesz", (1 << 64) - 1, -1),
        r"PT_LOAD \d: .*not within the file",
    ),
    "less memory than file": (lambda b: b.header(PT_LOAD, "memsz", 1), r"PT_LOAD 0: p_memsz is less"),
    "no page of the file": (
        lambda b: b.header(PT_LOAD, "vaddr", b.header(PT_LOAD, "vaddr", None, -1) + 8, -1),
        r"PT_LOAD \d: p_vaddr and p_offset differ",
    ),
    "a dynamic section outside": (
        lambda b: b.header(PT_DYNAMIC, "vaddr", 0x40000000),
        r"PT_DYNAMIC: .* in no loaded segment",
    ),
    "a dynamic section in constants": (
        lambda b: b.header(PT_DYNAMIC, "vaddr", 0),
        r"PT_DYNAMIC: is not within a segment that is written",
    ),
    "a dynamic section without bytes": (
        lambda b: b.header(PT_DYNAMIC, "filesz", 0),
        r"PT_DYNAMIC: has no bytes",
    ),
    "a dynamic section without an end": (
        lambda b: b.header(PT_DYNAMIC, "filesz", 32),
        r"PT_DYNAMIC: has no end",
    ),
    "another one for readers": (
        lambda b: b.header(PT_DYNAMIC, "offset", b.header(PT_DYNAMIC, "offset") + 16),
        r"PT_DYNAMIC: p_offset and p_vaddr",
    ),
    "program headers outside": (
        lambda b: (b.put(b.headers(PT_NOTE)[0], "I", PT_PHDR), b.header(PT_PHDR, "vaddr", 1 << 40)),
        r"PT_PHDR: .* in no loaded segment",
    ),
    "tables that may not be read": (
        lambda b: b.header(PT_LOAD, "flags", 0),
        r"PT_NOTE|DT_[A-Z]+: .*in no loaded segment",
    ),
    "constants written by RELRO": (lambda b: b.header(PT_RELRO, "vaddr", 0), r"PT_GNU_RELRO: is not within"),
    "thread-local bytes outside": (
        lambda b: b.header(PT_TLS, "vaddr", 1 << 40),
        r"PT_TLS: .* in no loaded segment",
    ),
    "more thread-local bytes than memory": (
        lambda b: b.header(PT_TLS, "memsz", 1),
        r"PT_TLS: 0x1 bytes, 0x4 in",
    ),
    "terabytes for each thread": (
        lambda b: b.header(PT_TLS, "memsz", 1 << 40),
        r"PT_TLS: 0x10000000000 bytes",
    ),
    "thread-local bytes aligned to 0": (lambda b: b.header(PT_TLS, "align", 0), r"PT_TLS: p_align is 0x0"),
    "thread-local variables without memory": (
        lambda b: b.header(PT_TLS, "type", 0x60000000),
        r"DT_RELA: entry \d+ is for thread-local memory",
    ),
    "strings outside": (lambda b: b.entry("STRTAB", 1 << 40), r"DT_STRTAB: .* in no loaded segment"),
    "strings that are too long": (lambda b: b.entry("STRSZ", -1), r"DT_STRTAB: .* in no loaded segment"),
    "strings that do not end": (lambda b: b.entry("STRSZ", 2), r"DT_STRTAB: its last name does not end"),
    "no strings": (lambda b: b.retag("STRTAB"), r"DT_STRTAB: is missing"),
    "a needed library without a name": (
        lambda b: b.entry("NEEDED", 1 << 30),
        r"DT_NEEDED: a name at .* outside",
    ),
    "a name of its own outside": (lambda b: b.entry("SONAME", 1 << 63), r"DT_SONAME: a name at .* outside"),
    "a filter outside": (
        lambda b: (b.entry("SONAME", 1 << 30), b.retag("SONAME", 0x7FFFFFFF)),
        r"DT_FILTER: a name at .* outside",
    ),
    "no symbols": (lambda b: b.retag("SYMTAB"), r"DT_SYMTAB: is missing"),
    "symbols outside": (lambda b: b.entry("SYMTAB", 1 << 40), r"DT_SYMTAB: address .* in no loaded segment"),
    "a symbol's name outside": (
        lambda b: b.put(b.table("SYMTAB") + 24, "I", 1 << 30),
        r"DT_SYMTAB: the name of symbol 1 is outside",
    ),
    "a hash table outside": (lambda b: b.entry("HASH", 1 << 40), r"DT_HASH: address .* in no loaded segment"),
    "a hash table without buckets": (lambda b: b.put(b.table("HASH"), "I", 0), r"DT_HASH: it has no buckets"),
    "a hash table that is too large": (
        lambda b: b.put(b.table("HASH") + 4, "I", 0xFFFFFFFF),
        r"DT_HASH: .* in no loaded segment",
    ),
    "a hash chain in circles": (chained, r"DT_HASH: its chains go round in circles"),
    "a GNU hash table outside": (
        lambda b: b.entry("GNU_HASH", 1 << 40),
        r"DT_GNU_HASH: address .* in no loaded",
    ),
    "a GNU hash table without buckets": (
        lambda b: b.put(b.table("GNU_HASH"), "I", 0),
        r"DT_GNU_HASH: 0 buckets",
    ),
    "a GNU hash table with an odd filter": (
        lambda b: b.put(b.table("GNU_HASH") + 8, "I", 3),
        r"DT_GNU_HASH: .* 3 words of filter",
    ),
    "a GNU hash table that is too large": (
        lambda b: b.put(b.table("GNU_HASH"), "I", 1 << 30),
        r"DT_GNU_HASH: is not within the segment",
    ),
    "a GNU hash chain without end": (endless, r"DT_GNU_HASH: its last chain does not end"),
    "versions outside": (
        lambda b: b.entry("VERNEED", 1 << 40),
        r"DT_VERNEED: address .* in no loaded segment",
    ),
    "versions that do not end": (
        lambda b: b.put(b.table("VERNEED") + 12, "I", 1 << 30),
        r"DT_VERNEED: an entry at .* is not within the segment",
    ),
    "needed versions that do not end": (
        lambda b: b.put(b.table("VERNEED") + 16 + 12, "I", 1 << 30),
        r"DT_VERNEED: an entry at .* is not within the segment",
    ),
    "defined versions that do not end": (
        lambda b: b.put(b.table("VERDEF") + 16, "I", 1 << 30),
        r"DT_VERDEF: an entry at .* is not within the segment",
    ),
    "versions of a library that is not needed": (
        lambda b: b.put(b.table("VERNEED") + 4, "I", b.entry("SONAME")),
        r"DT_VERNEED: \"victim.so\" has versions, but is not in DT_NEEDED",
    ),
    "a version that is not there": (
        lambda b: b.put(b.table("VERSYM") + 2, "H", 99),
        r"DT_VERSYM: the version of symbol 1 does not exist",
    ),
    "no versions of symbols": (lambda b: b.retag("VERSYM"), r"DT_VERSYM: is missing"),
    "relocations outside": (lambda b: b.entry("RELA", 1 << 40), r"DT_RELA: address .* in no loaded segment"),
    "too many relocations": (lambda b: b.entry("RELASZ", 1 << 40), r"DT_RELA: .* not within the file"),
    "relocations of another size": (lambda b: b.entry("RELAENT", 16), r"DT_RELAENT: 16 instead of 24"),
    "relocations of no size": (lambda b: b.retag("RELAENT"), r"DT_RELAENT: is missing"),
    "relocations without addends": (lambda b: b.retag("PLTGOT", TAGS["REL"]), r"DT_REL, DT_PLTREL: "),
    "no table of slots": (lambda b: b.retag("PLTGOT"), r"DT_PLTGOT: is missing"),
    "slots outside": (
        lambda b: b.entry("PLTGOT", 1 << 40),
        r"DT_PLTGOT: address .* not in a segment that is written",
    ),
    "no relocations of slots": (lambda b: b.retag("JMPREL"), r"DT_JMPREL: is missing"),
    "a relocation outside": (
        lambda b: b.put(b.relocation(RELATIVE), "Q", 1 << 40),
        r"DT_RELA: a relocation of address 0x10000000000",
    ),
    "a relocation of constants": (
        lambda b: b.put(b.relocation(GLOBAL), "Q", 8),
        r"DT_RELA: a relocation of address 0x8, which is not writable",
    ),
    "a relocation across the end": (
        lambda b: b.put(
            b.relocation(GLOBAL),
            "Q",
            b.header(PT_LOAD, "vaddr", None, -1) + b.header(PT_LOAD, "memsz", None, -1) - 4,
        ),
        r"DT_RELA: a relocation of address",
    ),
    "a slot outside": (
        lambda b: b.put(b.relocation(SLOT, "JMPREL"), "Q", (1 << 64) - 8),
        r"DT_JMPREL: a relocation of address 0xfffffffffffffff8",
    ),
    "a relocation with no symbol": (
        lambda b: b.put(b.relocation(GLOBAL) + 12, "I", 1 << 20),
        r"DT_SYMTAB: 1048577 symbols are not within the segment",
    ),
    "a copy relocation": (
        lambda b: b.put(b.relocation(GLOBAL) + 8, "I", COPY),
        r"DT_RELA: entry \d+ is a copy relocation",
    ),
    "a resolver outside": (
        lambda b: (
            b.put(b.relocation(GLOBAL) + 8, "I", INDIRECT),
            b.put(b.relocation(INDIRECT) + 16, "Q", 1 << 40),
        ),
        r"DT_RELA: entry \d+ has a resolver at 0x10000000000, which is not in code",
    ),
    "relative relocations that are not": (
        lambda b: b.entry("RELACOUNT", b.entry("RELASZ") // 24),
        r"DT_RELA: entry \d+ is not relative",
    ),
    "a constructor in data": (
        lambda b: b.retag("RUNPATH", TAGS["INIT"]),
        r"DT_INIT: address .* is not in code",
    ),
    "constructors of no number": (
        lambda b: b.retag("RUNPATH", TAGS["INIT_ARRAY"]),
        r"DT_INIT_ARRAYSZ: is missing",
    ),
    "relative words of no number": (lambda b: b.retag("RUNPATH", TAGS["RELR"]), r"DT_RELRSZ: is missing"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_refused(victim: bytes, case: str) -> None:
    change, message = CASES[case]
    bent = Bent(victim)
    change(bent)
    with pytest.raises(quire.Malformed, match=message):
        check(bytes(bent.data))


def test_relative_words_are_checked(tmp_path: pathlib.Path) -> None:
    try:
        data = built(tmp_path, "-Wl,-z,pack-relative-relocs")
        place = Bent(data).table("RELR")
    except (subprocess.CalledProcessError, StopIteration):
        pytest.skip("the linker packs no relative relocations (-z pack-relative-relocs)")
    check(data)
    for value, message in (
        (1 << 40, "a relocation of address 0x10000000000"),
        (8, "a relocation of address 0x8, which is not writable"),
        (3, "it begins with a bitmap"),
    ):
        bent = Bent(data)
        bent.put(place, "Q", value)
        with pytest.raises(quire.Malformed, match=f"DT_RELR: {message}"):
            check(bytes(bent.data))
    bent = Bent(data)
    bent.entry("RELRENT", 4)
    with pytest.raises(quire.Malformed, match="DT_RELRENT: 4 instead of 8"):
        check(bytes(bent.data))


def test_messages_name_file_and_field(victim: bytes, tmp_path: pathlib.Path) -> None:
    bent = Bent(victim)
    bent.entry("HASH", 1 << 40)
    path = tmp_path / "victim.so"
    path.write_bytes(bent.data)
    archive = zipped(tmp_path / "x.zip", path)
    with pytest.raises(
        quire.Malformed, match=r"x\.zip/victim\.so: DT_HASH: address 0x10000000000 is in no loaded"
    ):
        image.load(f"{archive}!/victim.so")
    with pytest.raises(quire.Malformed, match=r"DT_HASH"):
        image.load(bytes(bent.data))


def test_what_it_is_called_and_needs(victim: bytes) -> None:
    found = _native.Library(BytesSource(victim)._native, "victim.so", WINDOW_BYTES, None).linkage()
    with image.read(victim) as read:
        assert isinstance(read, ElfImage)
        assert found == ("victim.so", list(read.needed), None, "$ORIGIN/x")


def test_every_cut_is_refused(victim: bytes) -> None:
    dynamic = Bent(victim).header(PT_DYNAMIC, "offset")
    for length in (*range(600), *range(600, dynamic, 97)):
        with pytest.raises(quire.Malformed):
            check(victim[:length])


def regions_of(data: bytes) -> list[tuple[int, int]]:
    """The ranges of the file that the dynamic linker reads while it links, and its headers, half-open."""
    bent = Bent(data)
    found = [(0, 64 + 56 * bent.get(56, "H"))]
    with image.read(data) as read:
        sections = [each for each in read.sections if each.name in TABLES]
        found += [(each.offset, each.offset + each.size) for each in sections]
    return found


def mutated(data: bytes, regions: list[tuple[int, int]], rng: random.Random) -> bytes:
    """A copy with one to three fields of headers or tables changed: to extremes, to others, a little."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        start, end = rng.choice(regions)
        size = rng.choice((2, 4, 8, 8))
        at = start + rng.randrange(max(1, (end - start) // size)) * size
        old = int.from_bytes(out[at : at + size], "little")
        other = start + rng.randrange(max(1, (end - start) // size)) * size
        new = rng.choice(
            (
                rng.choice(INTERESTING),
                old ^ 1 << rng.randrange(8 * size),
                old + rng.choice((-4096, -8, -1, 1, 8, 4096)),
                int.from_bytes(out[other : other + size], "little"),
            )
        )
        out[at : at + size] = (new & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(out)


def survive(path: str, seed: int, count: int, links: int) -> None:
    """Check many damaged copies of an object, and link so many of those that were accepted.

    Each is linked in a process of its own.
    """
    data = pathlib.Path(path).read_bytes()
    regions = regions_of(data)
    rng = random.Random(seed)
    source = BytesSource(data)._native
    _native.Library(source, path, WINDOW_BYTES, None)
    # What an object says must not decide how much memory it takes to look at it.
    taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * quire.PAGE_SIZE
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2048 * MIB, resource.RLIM_INFINITY))
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(count):
        bad = mutated(data, regions, rng)
        try:
            library = _native.Library(_native.Source.buffer(bad), path, WINDOW_BYTES, None)
        except quire.Malformed as error:
            outcomes["refused" if ": " in str(error) else f"refused without a field: {error}"] += 1
            continue
        outcomes["accepted"] += 1
        if outcomes["accepted"] <= links:
            outcome = linked(library, os.RTLD_LAZY if number % 2 else os.RTLD_NOW)
            outcomes[outcome] += 1
            if outcome not in ("linked", "not linked"):
                changes = [at for at in range(len(data)) if data[at] != bad[at]]
                print(f"{outcome}: {[(hex(at), data[at], bad[at]) for at in changes]}")
        library.close()
    print(json.dumps(outcomes))


def linked(library: _native.Library, mode: int) -> str:
    """Link an object in a new process, and say how that ended."""
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            library.open(mode)
        except OSError:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {0: "linked", 1: "not linked"}.get(code) or f"ended by signal {-code}"


def survived(path: pathlib.Path, seed: int, count: int, links: int) -> dict[str, int]:
    script = "import sys, test_image_load_hostile as t; t.survive(sys.argv[1], *map(int, sys.argv[2:]))"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script, path, *map(str, (seed, count, links))],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
    )
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}{done.stderr[-3000:]}"
    print(done.stdout, done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def test_damaged_copies_are_refused_or_harmless(victim: bytes, tmp_path: pathlib.Path) -> None:
    """Thousands of damaged copies are looked at, and hundreds of those that were accepted are linked."""
    path = tmp_path / "victim.so"
    path.write_bytes(victim)
    outcomes = survived(path, seed=4, count=2500, links=300)
    assert outcomes["refused"] > 500
    assert outcomes["accepted"] > 500
    assert outcomes["linked"] > 100
    assert outcomes["linked"] + outcomes["not linked"] == 300, outcomes


def test_damaged_copies_that_are_left_in_part(tmp_path: pathlib.Path) -> None:
    """The same for an object most of which is left until it is touched."""
    path = compiled(tmp_path, "liblarge.so", LARGE, "-nostartfiles", "-Wl,--hash-style=both")
    outcomes = survived(path, seed=5, count=150, links=20)
    assert outcomes["refused"] > 20
    assert outcomes["linked"] + outcomes["not linked"] == 20, outcomes


def is_loadable(path: pathlib.Path) -> bool:
    """Whether it is a shared object for this machine: no program, and no file of debugging symbols."""
    with image.read(path) as read:
        if not isinstance(read, ElfImage) or (read.kind, read.machine_number) != ("shared object", MACHINE):
            return False
        return any(each.kind == "DYNAMIC" and each.file_size for each in read.segments)


@pytest.fixture(scope="module")
def installed() -> list[pathlib.Path]:
    paths = [path for path in elf_files() if ".so" in path.name and is_sampled(path, ONE_IN)]
    return [path for path in paths if is_loadable(path)]


@pytest.mark.timeout(600)
def test_what_is_installed_is_accepted(installed: list[pathlib.Path]) -> None:
    assert installed, "no shared object is installed"
    for path in installed:
        with FileSource(path) as source:
            _native.Library(source._native, str(path), WINDOW_BYTES, None)


# Loads it, calls nothing, and compares the code that is filled in with the file's.
PROBE = """
import ctypes, pathlib, sys
import quire
archive, member, original = sys.argv[1:]
try:
    library = quire.image.load(f"{archive}!/{member}")
except OSError as error:
    print("refused", error)
    sys.exit()
data = pathlib.Path(original).read_bytes()
image = quire.image.read(data)
codes = [each for each in image.segments if each.kind == "LOAD" and each.protection.letters == "r-x"]
names = [each for each in image.exports() if each.kind == "FUNC" and each.size]
looked = 0
for symbol in names[:: max(1, len(names) // 20)]:
    code = next(each for each in codes if each.address <= symbol.value < each.address + each.file_size)
    at = symbol.value - code.address + code.offset
    # Versions of a symbol share its name, and another library may have come first.
    address = ctypes.cast(library[symbol.name], ctypes.c_void_p).value
    if address & 4095 == symbol.value & 4095:
        assert ctypes.string_at(address, symbol.size) == data[at : at + symbol.size], symbol
        looked += 1
stats = library.stats
print("loaded", repr(stats.whole), looked, stats.filled_bytes, stats.lazy_bytes)
"""


def loaded(path: pathlib.Path, folder: pathlib.Path) -> str:
    archive = zipped(folder / "x.zip", path, method=zipfile.ZIP_STORED)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PROBE, archive, path.name, path],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    archive.unlink()
    assert done.returncode == 0, f"{path} ended with {done.returncode}: {done.stdout}{done.stderr[-3000:]}"
    return done.stdout


def is_loaded_as_file(path: pathlib.Path) -> bool:
    """Whether the dynamic linker takes the plain file."""
    script = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], os.RTLD_NOW)"
    return not subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, check=False
    ).returncode


@pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL)
@pytest.mark.timeout(600)
def test_large_real_ones_are_loaded_in_part(tmp_path: pathlib.Path) -> None:
    large = [
        path
        for path in elf_files(("/usr/lib",))
        if ".so" in path.name and MIB < path.stat().st_size < 150 * MIB and is_loadable(path)
    ]
    paged = []
    for path in sorted(large)[:: 1 if ONE_IN == 1 else max(1, len(large) // 12)]:
        outcome = loaded(path, tmp_path)
        if outcome.startswith("refused"):
            assert not is_loaded_as_file(path), f"{path}: {outcome}"
        elif outcome.startswith("loaded ''"):
            paged.append(path)
    if not large:
        pytest.skip("no shared object of more than 1 MiB is installed")
    assert paged, "none of the large shared objects was left in part"
