"""``quire fatelf``: make, take apart, check and run files that hold ELF files for several machines."""

from __future__ import annotations

import argparse
import sys
import zipfile
from typing import TYPE_CHECKING

from quire.errors import QuireError
from quire.image import fatelf
from quire.image.machines import native

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["add_arguments", "run"]

_FAILURES = (QuireError, OSError, ValueError, LookupError, zipfile.BadZipFile)
_TARGET = (
    "a machine such as x86_64 or aarch64, refined by :32 :64 :le :be :osabiN :versionN if needed, or recordN"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``quire fatelf``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str, work: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = actions.add_parser(name, help=summary, description=summary)
        command.set_defaults(act=work)
        return command

    glue = action("glue", "write a FatELF file OUT of ELF files, no two for the same machine", _glue)
    glue.add_argument("output", metavar="OUT")
    glue.add_argument("inputs", metavar="ELF", nargs="+")
    split = action("split", "write every ELF file in FILE, as STEM-MACHINE", _split)
    split.add_argument("file", metavar="FILE")
    split.add_argument("--stem", help="what the names begin with (FILE)")
    extract = action("extract", "write the ELF file for one machine", _extract)
    extract.add_argument("file", metavar="FILE")
    extract.add_argument("target", metavar="TARGET", help=_TARGET)
    extract.add_argument("output", metavar="OUT")
    for command in (glue, split, extract):
        command.add_argument("--force", action="store_true", help="replace what exists")
    info = action("info", "print what is in FILE", _info)
    info.add_argument("file", metavar="FILE")
    validate = action("validate", "check every rule of the format, and say what is broken", _validate)
    validate.add_argument("file", metavar="FILE")
    verify = action("verify", "check that FILE has an ELF file for a machine; return 1 if not", _verify)
    verify.add_argument("file", metavar="FILE")
    verify.add_argument("target", metavar="TARGET", nargs="?", help=f"{_TARGET}; this machine by default")
    start = action("run", "run the program for this machine, from memory, without unpacking it to disk", _run)
    start.add_argument("file", metavar="FILE", help="a FatELF file; archive.zip!/member too")
    start.add_argument("arguments", metavar="ARG", nargs=argparse.REMAINDER, help="for the program")


def run(args: argparse.Namespace) -> int:
    """Do it; return 0, or 1 after saying on stderr why it could not be done."""
    try:
        status: int = args.act(args)
    except _FAILURES as error:
        sys.stderr.write(f"quire fatelf: {error}\n")
        return 1
    return status


def _glue(args: argparse.Namespace) -> int:
    _print(fatelf.glue(args.inputs, args.output, force=args.force))
    return 0


def _split(args: argparse.Namespace) -> int:
    for name, record in fatelf.split(args.file, args.stem or args.file, force=args.force):
        print(f"{name}: {record.size} bytes")
    return 0


def _extract(args: argparse.Namespace) -> int:
    record = fatelf.extract(args.file, args.target, args.output, force=args.force)
    print(f"{args.output}: {record.full_target}, {record.size} bytes")
    return 0


def _info(args: argparse.Namespace) -> int:
    _print(fatelf.records(args.file))
    return 0


def _print(found: tuple[fatelf.Record, ...]) -> None:
    print("record  machine      bits  order  osabi version       offset        bytes")
    here = native()
    for number, record in enumerate(found):
        it = record.ident
        machine = record.target.partition(":")[0]
        mark = "  this machine" if it.runs_as(here) else ""
        print(
            f"{number:>6}  {machine:<12} {it.bits:>4}  {it.byte_order:<7}{it.osabi:>5} {it.osabi_version:>7} "
            f"{record.offset:>12} {record.size:>12}{mark}"
        )


def _validate(args: argparse.Namespace) -> int:
    found = fatelf.problems(args.file)
    for problem in found:
        sys.stderr.write(f"quire fatelf: {args.file}: {problem}\n")
    if found:
        return 1
    print(f"{args.file}: follows FatELF version 1, with {len(fatelf.records(args.file))} ELF files")
    return 0


def _verify(args: argparse.Namespace) -> int:
    if args.target is None:
        fatelf.record_for_this_machine(args.file)
        target = native().name
    else:
        target = fatelf.select(fatelf.records(args.file), args.target).full_target
    print(f"{args.file}: has an ELF file for {target}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from quire.image.running import exec  # noqa: A004, PLC0415 - only this action needs it

    exec(args.file, [args.file, *args.arguments])
