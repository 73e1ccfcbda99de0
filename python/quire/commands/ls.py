"""``quire ls``: the clients, banks, objects and leases of a broker."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from quire.commands.administration import TABLES, add_socket, lines, operate, tables

if TYPE_CHECKING:
    from quire.client import Client

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire ls``."""
    add_socket(parser)
    parser.add_argument(
        "what", metavar="WHAT", nargs="*", help=f"some of {', '.join(TABLES)} (all that have something)"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object, amounts in bytes")


def run(args: argparse.Namespace) -> int:
    """Print; return 0, or 1 after saying on stderr why it could not be done."""
    unknown = [word for word in args.what if word not in TABLES]
    if unknown:
        sys.stderr.write(f"quire ls: {unknown[0]!r} is none of {', '.join(TABLES)}\n")
        return 2
    return operate(args, lambda client: _print(client, args))


def _print(client: Client, args: argparse.Namespace) -> int:
    survey = client.survey()
    chosen = args.what or TABLES
    if args.json:
        import msgspec  # noqa: PLC0415 - the client has it

        data = msgspec.json.encode({what: getattr(survey, what) for what in chosen})
        print(msgspec.json.format(data, indent=2).decode())
        return 0
    shown = [what for what in chosen if args.what or getattr(survey, what)]
    for index, what in enumerate(shown):
        if index:
            print()
        for line in lines(*tables(survey, what)):
            print(line)
    return 0
