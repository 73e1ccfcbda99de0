"""``quire image``: what is in a program file, how it becomes an address space, and what would run it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import zipfile
from typing import TYPE_CHECKING

from quire.commands.drawing import console, write
from quire.errors import Malformed, QuireError
from quire.image.facts import as_dict, security
from quire.image.layout import layout_of
from quire.image.machines import native
from quire.image.reading import read
from quire.image.running import exec  # noqa: A004
from quire.image.verdict import Verdict, why
from quire.pictures.filemap import FileMap, FilePart, MemoryRange, few, svg
from quire.pictures.text import address, printable, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.image.layout import Piece
    from quire.image.model import Image

__all__ = ["ACTIONS", "add_arguments", "run"]

ACTIONS = ("show", "why", "exec")
"""What can be done; the first if none is named."""

_FAILURES = (QuireError, OSError, ValueError, LookupError, zipfile.BadZipFile)
_FORMATS = {
    "elf": "ELF",
    "pe": "PE",
    "mach-o": "Mach-O",
    "universal": "universal Mach-O",
    "fatelf": "FatELF",
    "script": "script",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of ``quire image``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    summaries = {
        "show": "print what is in FILE, and which of its bytes become which addresses (the default)",
        "why": "say what would run FILE here, and what is missing; the status is 0 if it would run",
    }
    for name in ("show", "why"):
        action = actions.add_parser(name, help=summaries[name], description=summaries[name])
        action.add_argument("file", metavar="FILE", help="a program file; archive.zip!/member too")
        action.add_argument("--json", action="store_true", help="print all as JSON")
        if name == "show":
            action.add_argument(
                "--tables", action="store_true", help="with --json: symbols and relocations too"
            )
            action.add_argument(
                "--svg", metavar="OUT", help="write the picture of file and memory; - prints it"
            )
            action.add_argument(
                "--bias",
                type=_address,
                default=0,
                metavar="N",
                help="how far from its own addresses it is loaded (0)",
            )
            action.add_argument("--force", action="store_true", help="replace OUT if it exists")
    summary = "run FILE from memory if it is in an archive or a FatELF file; a plain file as it is"
    action = actions.add_parser("exec", help=summary, description=summary)
    action.add_argument("file", metavar="FILE", help="a program file; archive.zip!/member too")
    action.add_argument("arguments", metavar="ARG", nargs=argparse.REMAINDER, help="for the program")


def _address(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write for example 0x10000") from None


def run(args: argparse.Namespace) -> int:
    """Print what was found; return 0, or 1 if it could not be, or if the file would not run."""
    try:
        if args.action == "exec":
            exec(args.file, [args.file, *args.arguments])
        return _why(args) if args.action == "why" else _show(args)
    except _FAILURES as error:
        more = f"; quire image why {args.file} says what would run it" if args.action == "show" else ""
        sys.stderr.write(f"quire image: {printable(str(error))}{more if _is_unknown(error) else ''}\n")
        return 1


def _is_unknown(error: Exception) -> bool:
    return isinstance(error, Malformed) and "no known format" in str(error)


def _why(args: argparse.Namespace) -> int:
    verdict = why(args.file)
    if args.json:
        _print_json(verdict.as_dict())
    else:
        sys.stdout.write("".join(f"{printable(line)}\n" for line in _verdict(verdict)))
    return 0 if verdict.runs else 1


def _print_json(found: dict[str, object]) -> None:
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _verdict(verdict: Verdict) -> Iterator[str]:
    answers = {True: "would run", False: "would not run", None: "cannot be told"}
    error = f" ({os.strerror(verdict.errno)})" if verdict.errno else ""
    yield f"{verdict.name}: {answers[verdict.runs]}{error}"
    for number, step in enumerate(verdict.steps, 1):
        yield f"  {number}. {step}"
    if verdict.libraries:
        yield "libraries:"
        width = min(32, max(len(library.name) for library in verdict.libraries))
        for library in verdict.libraries:
            yield f"  {library.name:<{width}}  {library.path or 'not found'}"
    for title, lines in (("missing", verdict.missing), ("besides", verdict.hints)):
        if lines:
            yield f"{title}:"
            yield from (f"  {line}" for line in lines)


def _show(args: argparse.Namespace) -> int:
    with read(args.file) as image:
        if args.json:
            _print_json(as_dict(image, tables=args.tables, bias=args.bias))
            return 0
        if args.tables:
            raise ValueError("--tables is for --json")
        if args.svg:
            picture = svg(_drawn(_member(image), args.bias))
            if args.svg == "-":
                sys.stdout.write(picture)
            else:
                write(args.svg, picture, force=args.force)
            return 0
        _print(image, args.bias)
    return 0


def _member(image: Image) -> Image:
    """Choose what is drawn of a fat file: the member for this machine, else the first."""
    if not image.members:
        return image
    here = native()
    same = (each for each in image.members if (each.machine, each.bits) == (here.name, here.bits))
    return next(same, image.members[0])


def _print(image: Image, bias: int) -> None:
    screen = console()
    from rich.table import Table  # noqa: PLC0415 - an extra
    from rich.text import Text  # noqa: PLC0415

    from quire.pictures import filetext  # noqa: PLC0415 - it needs rich

    for each in [image, *([_member(image)] if image.members else [])]:
        screen.print(Text(printable(each.name), style="bold"))
        facts = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column()
        for label, text in _facts(each):
            facts.add_row(label, Text(printable(text)))
        screen.print(facts)
        if not each.members:
            drawn = _drawn(each, bias)
            if drawn.ranges:
                screen.print()
                screen.print(filetext.table(drawn, screen.width))
                screen.print(filetext.legend(drawn))


def _facts(image: Image) -> Iterator[tuple[str, str]]:
    yield "what", _what(image)
    if image.entry is not None:
        yield "entry", address(image.entry)
    if image.interpreter is not None:
        label = "interpreter" if image.format == "script" else "linker"
        script = getattr(image, "script", None)
        argument = script.argument if script is not None else None
        yield label, image.interpreter + (f", argument {os.fsdecode(argument)!r}" if argument else "")
    for label, name in (("own name", "soname"), ("own name", "install_name"), ("build id", "build_id")):
        value = getattr(image, name, None)
        if value:
            yield label, value
    if image.needed:
        yield "needs", ", ".join(image.needed)
    search = getattr(image, "runpath", None) or getattr(image, "rpath", None)
    if search:
        yield "looks in", search
    facts = security(image)
    if image.kind == "shared object":
        facts.pop("pie", None)
    if facts and image.kind in ("executable", "shared object"):
        yield "safety", ", ".join(_safety(facts))
    if image.format == "elf" and image.kind in ("executable", "shared object"):
        yield "at loading", _eager(image)
    for number, member in enumerate(image.members):
        yield f"member {number}", f"{_what(member)}, {size(member.size)} at {address(member.offset)}"


def _what(image: Image) -> str:
    name = _FORMATS.get(image.format, image.format)
    if image.format == "script":
        return name
    if image.members:
        return f"{name} file with {len(image.members)} members"
    return f"{name} {image.kind} for {image.machine}, {image.bits} bits, {image.byte_order}-endian"


def _safety(facts: dict[str, bool | str | None]) -> Iterator[str]:
    if "relro" not in facts:
        yield from (name.replace("_", " ") for name, value in facts.items() if value)
        yield from (f"no {name}" for name in ("aslr", "nx", "pie") if facts.get(name) is False)
        return
    if "pie" in facts:
        yield "position independent" if facts["pie"] else "at a fixed address"
    yield f"RELRO {facts['relro']}"
    yield "functions bound at once" if facts["bind_now"] else "functions bound lazily"
    yield {True: "stack not executable", False: "EXECUTABLE STACK", None: "stack not said"}[facts["nx_stack"]]  # type: ignore[index]
    if facts["text_relocations"]:
        yield "TEXT RELOCATIONS"
    if facts["writable_code"]:
        yield "WRITABLE CODE"


def _eager(image: Image) -> str:
    try:
        found = image.eagerness  # type: ignore[attr-defined]
    except Malformed as error:
        return str(error)
    text = f"{found.eager} relocations at once, {found.lazy} functions at their first call"
    if found.ifuncs:
        text += f", {found.ifuncs} chosen by the processor (IFUNC)"
    return text


def _drawn(image: Image, bias: int) -> FileMap:
    """Gather what is drawn of an image."""
    is_loaded = image.kind in ("executable", "shared object") and image.format != "script"
    pieces = layout_of(image, bias) if is_loaded else []
    ranges = [
        MemoryRange(
            piece.start,
            piece.end,
            piece.kind,
            piece.protection.letters,
            _names(image, piece, bias),
            None if piece.offset is None else piece.offset - image.offset,
        )
        for piece in pieces
    ]
    rest = [
        FilePart(each.offset, each.offset + each.file_size, printable(each.name))
        for each in image.sections
        if each.file_size and each.name
    ]
    entry = None if image.entry is None else image.entry + bias
    return FileMap(printable(image.name), _what(image), image.size, ranges, rest, entry)


def _names(image: Image, piece: Piece, bias: int) -> str:
    """Name the sections that lie in a piece of memory."""
    start, end = piece.start - bias, piece.end - bias
    names = [
        each.name
        for each in image.sections
        if each.name and each.address and each.address < end and start < each.address + each.size
    ]
    return f"{few(names)}{' (relocated)' if piece.is_relocated else ''}"
