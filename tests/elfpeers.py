"""What readelf and pyelftools say of ELF files, in the words of `quire.image`, and where ours differs."""

import os
import pathlib
import re
import subprocess
import zlib
from collections.abc import Iterator
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from quire.image import Image, Symbol
from quire.image.elf import ElfImage

FOLDERS = ("/usr/bin", "/usr/sbin", "/usr/lib", "/usr/libexec", "/usr/local/lib")

_SEGMENT = re.compile(r"^  (\S+) +((?:0x[0-9a-f]+ +){5})([R ][W ][E ]) +(0x[0-9a-f]+|0)$", re.MULTILINE)
_SYMBOLS = re.compile(
    r"^Symbol table '(\S+)' contains \d+ entr(?:y|ies):\n.*\n((?: *\d+: .*\n)*)", re.MULTILINE
)
_SYMBOL = re.compile(
    r"^ *\d+: ([0-9a-f]+) +(0x[0-9a-f]+|\d+) (.{7}) (\S+) +(\S+) +(?:\[.*?\] +)?(\S+) ?(.*)$", re.MULTILINE
)
_RELOCATION = re.compile(r"^([0-9a-f]{8,16})  ([0-9a-f]{8,16}) (\S+)", re.MULTILINE)


def elf_files(folders: tuple[str, ...] = FOLDERS) -> Iterator[pathlib.Path]:
    """Every ELF file below the folders, by its first bytes, each once."""
    seen = set()
    for top in folders:
        for folder, _, names in os.walk(top):
            for name in sorted(names):
                path = os.path.join(folder, name)
                if os.path.islink(path) or not os.path.isfile(path):
                    continue
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with open(path, "rb") as file:
                    if file.read(4) == b"\x7fELF":
                        yield pathlib.Path(path)


def is_sampled(path: pathlib.Path, one_in: int) -> bool:
    """A choice that is the same on every run."""
    return zlib.crc32(os.fsencode(path.name)) % one_in == 0


def readelf(path: pathlib.Path, *options: str) -> str:
    done = subprocess.run(
        ["readelf", "-W", *options, str(path)],
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C", "LANGUAGE": "C"},
    )
    return done.stdout.decode("utf-8", "surrogateescape")


def against_objdump(image: ElfImage, path: pathlib.Path) -> list[str]:
    """Compare the stubs of functions, which objdump labels ``name@plt``."""
    done = subprocess.run(
        ["objdump", "-d", "-j", ".plt", "-j", ".plt.sec", "-j", ".plt.got", str(path)],
        capture_output=True,
        check=False,  # It fails if there is no such section.
        env={**os.environ, "LC_ALL": "C", "LANGUAGE": "C"},
    )
    text = done.stdout.decode("utf-8", "surrogateescape")
    labels = re.findall(r"^([0-9a-f]+) <(.*)@plt>:$", text, re.MULTILINE)
    # With versions; what a function of the object decides has none but a number.
    theirs = {
        (int(address, 16), None if name[0] == "*" else name.partition("@")[0]) for address, name in labels
    }
    ours = {(slot.stub, slot.symbol and slot.symbol.name) for slot in image.slots() if slot.stub is not None}
    return [*_differing("stubs", ours, theirs)]


def _differing(what: str, ours: Any, theirs: Any) -> Iterator[str]:
    if ours == theirs:
        return
    if isinstance(ours, list) and isinstance(theirs, list):
        only_ours = [each for each in ours if each not in theirs][:3] if len(ours) < 20000 else []
        only_theirs = [each for each in theirs if each not in ours][:3] if len(ours) < 20000 else []
        yield f"{what}: {len(ours)} and {len(theirs)}; only ours {only_ours}, only theirs {only_theirs}"
    else:
        yield f"{what}: {ours!r}, theirs {theirs!r}"


def against_readelf(image: ElfImage, path: pathlib.Path) -> list[str]:
    """What readelf says differently."""
    text = readelf(path, "--segments", "--syms", "--relocs", "--notes", "--dynamic", "--file-header")
    found = list(
        _differing("segments", _our_segments(image), [_segment(*each) for each in _SEGMENT.findall(text)])
    )
    tables = dict(_SYMBOLS.findall(text.replace("<OS specific>: 10", "UNIQUE")))
    dynamic = [_symbol(*each) for each in _SYMBOL.findall(tables.get(".dynsym", ""))]
    found += _differing("dynamic symbols", [_our_symbol(each) for each in image.dynamic_symbols()], dynamic)
    if ".symtab" in tables:
        static = [_symbol(*each) for each in _SYMBOL.findall(tables[".symtab"])]
        ours = [_our_symbol(each._replace(version=None)) for each in image.symbols()]
        # Versions of these are parts of the names, as the linker was given them.
        found += _differing("symbols", [each[:6] for each in ours], [each[:6] for each in static])
    theirs = sorted(
        (int(at, 16), kind.replace("JMP_SLOT", "JUMP_SLOT")[:22]) for at, _, kind in _RELOCATION.findall(text)
    )
    # readelf lists the words of DT_RELR in another form.
    has_relr = any(entry.kind == "RELR" for entry in image.dynamic)
    ours = sorted(
        (each.address, each.kind.replace("JMP_SLOT", "JUMP_SLOT")[:22])
        for each in image.relocations()
        if not (has_relr and each.kind.endswith("_RELATIVE") and each.addend is None)
    )
    found += _differing("relocations", ours, theirs)
    build_id = re.search(r"Build ID: ([0-9a-f]+)$", text, re.MULTILINE)
    found += _differing("build id", image.build_id, build_id and build_id[1])
    needed = tuple(re.findall(r"\(NEEDED\) +Shared library: \[(.*)\]$", text, re.MULTILINE))
    found += _differing("needed", image.needed, needed)
    entry = re.search(r"Entry point address: +(0x[0-9a-f]+)$", text, re.MULTILINE)
    found += _differing("entry", image.entry or 0, int(entry[1], 16) if entry else None)
    return found


def _our_segments(image: Image) -> list[Any]:
    return [
        (
            each.kind,
            each.offset,
            each.address,
            each.file_size,
            each.memory_size,
            each.protection.letters,
            each.align,
        )
        for each in image.segments
    ]


def _segment(kind: str, numbers: str, flags: str, align: str) -> Any:
    offset, address, _, file_size, memory_size = (int(each, 16) for each in numbers.split())
    letters = "".join(letter if mark != " " else "-" for letter, mark in zip("rwx", flags, strict=True))
    if kind.startswith("LOOS+"):
        kind = f"{0x60000000 + int(kind[5:], 16):#x}"
    return kind, offset, address, file_size, memory_size, letters, int(align, 16)


def _our_symbol(symbol: Symbol) -> Any:
    place = (
        "UND" if symbol.section is None else {-15: "ABS", -14: "COM"}.get(symbol.section, str(symbol.section))
    )
    version = symbol.version
    shown = ""
    # The symbol that stands for a version is shown without one.
    if version is not None and version.name != symbol.name:
        # A program's copy of a library's variable is defined here, with a version that is needed.
        shown = ("@" if version.is_hidden or version.library is not None else "@@") + version.name
    kind = {"GNU_IFUNC": "IFUNC"}.get(symbol.kind, symbol.kind)
    binding = {"GNU_UNIQUE": "UNIQUE"}.get(symbol.binding, symbol.binding)
    return symbol.value, symbol.size, kind, binding, symbol.visibility, place, symbol.name + shown


def _symbol(value: str, size: str, kind: str, binding: str, visibility: str, place: str, name: str) -> Any:
    # The number behind the version of an undefined symbol is an index.
    shown = "" if kind.strip() == "SECTION" else re.sub(r" \(\d+\)$", "", name)
    return int(value, 16), int(size, 0), kind.strip(), binding, visibility, place, shown


def against_pyelftools(image: ElfImage, path: pathlib.Path, *, symbols: bool) -> list[str]:
    """What pyelftools says differently. It takes seconds for the symbols of large files."""
    with open(path, "rb") as file:
        try:
            theirs = ELFFile(file)
            found = _against_elffile(image, theirs, symbols=symbols)
        except ELFError as error:
            found = [f"pyelftools cannot read it: {error}"]
    return found


def _against_elffile(image: ElfImage, theirs: ELFFile, *, symbols: bool) -> list[str]:
    found = list(_differing("bits", image.bits, theirs.elfclass))
    found += _differing("byte order", image.byte_order == "little", theirs.little_endian)
    header = theirs.header
    found += _differing("entry", image.entry or 0, header["e_entry"])
    sections = [
        (
            each.name,
            each.address,
            each.offset,
            each.size,
            each.align,
            each.flags,
            each.link,
            each.info,
            each.entry_size,
        )
        for each in image.sections
    ]
    fields = (
        "sh_addr",
        "sh_offset",
        "sh_size",
        "sh_addralign",
        "sh_flags",
        "sh_link",
        "sh_info",
        "sh_entsize",
    )
    found += _differing(
        "sections",
        sections,
        [(each.name, *(each[field] for field in fields)) for each in theirs.iter_sections()],
    )
    fields = ("p_offset", "p_vaddr", "p_filesz", "p_memsz", "p_align", "p_flags")
    ours = [(e.offset, e.address, e.file_size, e.memory_size, e.align, e.flags) for e in image.segments]
    found += _differing(
        "segments", ours, [tuple(each[field] for field in fields) for each in theirs.iter_segments()]
    )
    # In files of debugging symbols alone the segment is said to be there, and is not.
    interpreters = [e for e in theirs.iter_segments() if e["p_type"] == "PT_INTERP" and e["p_filesz"]]
    found += _differing(
        "interpreter", image.interpreter, interpreters[0].get_interp_name() if interpreters else None
    )
    dynamic = [each for each in theirs.iter_segments() if each["p_type"] == "PT_DYNAMIC"]
    # So it is with the dynamic section.
    if dynamic and image.dynamic:
        tags = [(tag.entry.d_val) for tag in dynamic[0].iter_tags() if tag.entry.d_tag != "DT_NULL"]
        found += _differing("dynamic", [entry.value for entry in image.dynamic], tags)
        for tag, name in (
            ("DT_SONAME", image.soname),
            ("DT_RPATH", image.rpath),
            ("DT_RUNPATH", image.runpath),
        ):
            values = [getattr(each, tag.lower()[3:]) for each in dynamic[0].iter_tags(tag)]
            found += _differing(tag, name, values[-1] if values else None)
        if symbols:
            table = [(each.name, each["st_value"], each["st_size"]) for each in dynamic[0].iter_symbols()]
            ours = [(each.name, each.value, each.size) for each in image.dynamic_symbols()]
            # Without section headers, as here, it finds only what the hash tables have.
            found += _differing("dynamic symbols", ours[: len(table)], table)
    return found
