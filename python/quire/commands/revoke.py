"""``quire revoke``: take lent memory back from a client, or from all."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quire.commands.administration import add_socket, handle_of, operate
from quire.commands.broker import size as bytes_of
from quire.pictures.text import size

if TYPE_CHECKING:
    import argparse

    from quire.client import Client

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire revoke``."""
    add_socket(parser)
    parser.add_argument("memory", metavar="MEMORY", help="its number, or a name that it was published under")
    whom = parser.add_mutually_exclusive_group(required=True)
    whom.add_argument("--client", type=int, metavar="N", help="from this client")
    whom.add_argument("--all", action="store_true", help="from everybody, its maker too")
    parser.add_argument("--offset", type=bytes_of, default=0, metavar="BYTES", help="from here (0)")
    parser.add_argument("--length", type=bytes_of, metavar="BYTES", help="so much (to the end)")
    parser.add_argument(
        "--deadline", type=int, default=100, metavar="MS", help="how long they may take to comply (100)"
    )
    parser.add_argument(
        "--certain", action="store_true", help="cut off those who comply too; reaches forked children"
    )


def run(args: argparse.Namespace) -> int:
    """Do it; return 0 if nobody was left with the memory, 1 if somebody was or it could not be done."""
    return operate(args, lambda client: _revoke(client, args))


def _revoke(client: Client, args: argparse.Namespace) -> int:
    if args.client is not None and args.client < 1:
        raise ValueError(f"client {args.client} is not the number of one")
    survey = client.survey()
    if args.client is not None and args.client not in [row.number for row in survey.clients]:
        raise LookupError(f"no client {args.client}")
    handle = handle_of(client, survey, args.memory)
    taken = client.revoke(
        handle,
        args.offset,
        args.length,
        client=args.client,
        deadline_ms=args.deadline,
        certain=args.certain,
    )
    for each in taken.outcomes:
        why = f": {each.why}" if each.why else ""
        ended = f", {each.ended}" if each.ended else ""
        print(f"client {each.client}: {each.result}, {each.offset:#x} and {size(each.length)}{why}{ended}")
    if not taken.outcomes:
        print("nobody had it")
    if taken.moved_bytes:
        print(f"{size(taken.moved_bytes)} were copied for the others")
    kept = sum(1 for each in taken.outcomes if each.result == "kept")
    if kept:
        sys.stderr.write(f"quire revoke: {kept} still have it; quire bank destroy, or more memory, helps\n")
    return 1 if kept else 0
