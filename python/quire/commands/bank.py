"""``quire bank``: the accounts of a broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.commands.administration import add_socket, amount, handle_of, lines, operate, tables
from quire.commands.broker import size as bytes_of
from quire.pictures.text import size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from quire.client import Client

__all__ = ["ACTIONS", "add_arguments", "run"]

ACTIONS = ("list", "create", "limit", "destroy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``quire bank``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(
        name: str, summary: str, work: Callable[[Client, argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        command = actions.add_parser(name, help=summary, description=summary)
        add_socket(command)
        command.set_defaults(act=work)
        return command

    action("list", "print every bank, what it pays for and its limits", _list)
    create = action("create", "open a bank below another and publish it under a name", _create)
    create.add_argument("name", metavar="NAME", help="who may open it has things charged to it")
    create.add_argument("--in", dest="parent", metavar="BANK", required=True, help="number or name")
    create.add_argument(
        "--user", type=int, action="append", metavar="UID", help="who may open it, several times (everybody)"
    )
    limit = action("limit", "change what a bank may pay for", _limit)
    destroy = action("destroy", "end a bank; all that it pays for is taken back", _destroy)
    for command in (limit, destroy):
        command.add_argument("bank", metavar="BANK", help="number or name")
    for command in (create, limit):
        missing = "as the bank above" if command is create else "as it is"
        command.add_argument(
            "--bytes", type=bytes_of, metavar="BYTES", help=f"memory; K, M, G, T ({missing})"
        )
        command.add_argument("--objects", type=int, metavar="N", help=f"({missing})")
        command.add_argument("--descriptors", type=int, metavar="N", help=f"({missing})")


def run(args: argparse.Namespace) -> int:
    """Do it; return 0, or 1 after saying on stderr why it could not be done."""
    return operate(args, lambda client: args.act(client, args))


def _list(client: Client, _args: argparse.Namespace) -> int:
    for line in lines(*tables(client.survey(), "banks")):
        print(line)
    return 0


def _create(client: Client, args: argparse.Namespace) -> int:
    parent = handle_of(client, client.survey(), args.parent)
    above = client.describe(parent).limit
    bank = client.make_bank(
        above[0] if args.bytes is None else args.bytes,
        parent=parent,
        limit_objects=above[1] if args.objects is None else args.objects,
        limit_descriptors=above[2] if args.descriptors is None else args.descriptors,
    )
    from quire.broker.protocol import Rights  # noqa: PLC0415 - needs msgspec, and the help does not

    # Without a name it would end with this connection.
    client.publish(bank, args.name, Rights.READ | Rights.WRITE, args.user)
    print(f"{args.name}: {amount(client.describe(bank).limit[0])}")
    return 0


def _limit(client: Client, args: argparse.Namespace) -> int:
    bank = handle_of(client, client.survey(), args.bank)
    old = client.describe(bank).limit
    given = (args.bytes, args.objects, args.descriptors)
    limits = [was if new is None else new for was, new in zip(old, given, strict=True)]
    client.limit_bank(bank, limits[0], limit_objects=limits[1], limit_descriptors=limits[2])
    print(f"{amount(limits[0])}, {limits[1]} objects, {limits[2]} descriptors")
    return 0


def _destroy(client: Client, args: argparse.Namespace) -> int:
    bank = handle_of(client, client.survey(), args.bank)
    if client.describe(bank).kind != "bank":
        raise TypeError(f"{args.bank} is no bank")
    taken = client.destroy(bank)
    print(f"{size(taken.freed_bytes)} freed")
    return 0
