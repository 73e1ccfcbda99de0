"""``quire unpack``: make a plain file, or an archive that any tool reads, of a packed one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quire.packing import FAILURES, unpack

if TYPE_CHECKING:
    import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire unpack``."""
    parser.add_argument("input", metavar="IN", help="a zip archive, or a .zst, .gz, archive.zip!/member")
    parser.add_argument("output", metavar="OUT", help="an archive for an archive, else a plain file")
    parser.add_argument("--stored", action="store_true", help="do not compress the members of an archive")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists; it may be IN")


def run(args: argparse.Namespace) -> int:
    """Unpack; return 0, or 1 after saying on stderr why it could not be done."""
    try:
        done = unpack(args.input, args.output, stored=args.stored, force=args.force)
    except FAILURES as error:
        sys.stderr.write(f"quire unpack: {error}\n")
        return 1
    sys.stdout.write(done.summary(args.output))
    return 0
