"""What the commands that operate a broker have in common; no command itself."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from quire.errors import QuireError
from quire.pictures.text import clipped, printable, size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from quire.broker.operations import Handle, Survey
    from quire.client import Client

__all__ = ["TABLES", "add_socket", "amount", "handle_of", "lines", "name_of", "operate", "tables"]

DEFAULT_SOCKET = "/run/quire/broker.sock"
TABLES = ("clients", "banks", "objects", "leases")
_NAME_CHARACTERS = 32
UNLIMITED = 2**63 - 1


def add_socket(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which broker is meant."""
    parser.add_argument(
        "--socket",
        metavar="PATH",
        default=os.environ.get("QUIRE_SOCKET", DEFAULT_SOCKET),
        help=f"where the broker listens ($QUIRE_SOCKET, else {DEFAULT_SOCKET})",
    )


def operate(args: argparse.Namespace, work: Callable[[Client], int]) -> int:
    """Connect, do the work and return its status; 1 after saying on stderr why it could not be done."""
    try:
        # Only here: it needs msgspec, and the help does not.
        from quire.client import connect  # noqa: PLC0415

        with connect(args.socket) as client:
            return work(client)
    except LookupError as error:
        # Its text would be quoted.
        sys.stderr.write(f"quire {args.command}: {error.args[0] if error.args else error}\n")
    except (QuireError, OSError, ValueError, TypeError, ImportError) as error:
        where = (
            f"{args.socket}: " if isinstance(error, OSError) and error.errno and not error.filename else ""
        )
        sys.stderr.write(f"quire {args.command}: {where}{error}\n")
    return 1


def handle_of(client: Client, survey: Survey, word: str) -> Handle:
    """Get a handle of what a number or a published name of a bank or an object says.

    Raises:
        LookupError: There is none.
        PermissionError: Only an administrator may.
    """
    if word.isascii() and word.isdecimal():
        return client.administer(int(word))
    named = {row.name: row.number for row in survey.objects} | {row.name: row.number for row in survey.banks}
    if word and word in named:
        return client.administer(named[word])
    raise LookupError(f"no bank or object {word!r}: quire ls shows their numbers, and one name of each")


def name_of(text: str) -> str:
    """A name that a client gave, safe to be shown."""
    return clipped(printable(text), _NAME_CHARACTERS)


def amount(value: int) -> str:
    """A limit in bytes for people."""
    return "-" if value >= UNLIMITED else size(value)


def _number(value: int) -> str:
    return "-" if value >= UNLIMITED else str(value)


def tables(
    survey: Survey, what: str, rates: dict[int, float] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Write one of the lists as rows of text.

    Args:
        survey: What there is.
        what: One of `TABLES`.
        rates: Requests a second by client, shown in place of their sum.

    Returns:
        The headings, and the rows.
    """
    if what == "clients":
        heads = ["client", "pid", "uid", "bank", "state", "handles", "leases", "leased"]
        return [*heads, "requests" if rates is None else "requests/s"], [
            [
                str(row.number),
                str(row.pid),
                str(row.uid),
                str(row.bank),
                "connected" if row.connected else "away",
                str(row.handles),
                str(row.leases),
                size(row.leased_bytes),
                str(row.requests) if rates is None else f"{rates.get(row.number, 0.0):.0f}",
            ]
            for row in survey.clients
        ]
    if what == "banks":
        return ["bank", "name", "in", "used", "limit", "objects", "limit", "descriptors", "limit"], [
            [
                str(row.number),
                name_of(row.name) or "-",
                str(row.parent or "-"),
                size(row.used[0]),
                amount(row.limit[0]),
                str(row.used[1]),
                _number(row.limit[1]),
                str(row.used[2]),
                _number(row.limit[2]),
            ]
            for row in survey.banks
        ]
    if what == "objects":
        return ["object", "kind", "name", "bank", "size", "held by", "leases", "clients"], [
            [
                str(row.number),
                row.kind,
                name_of(row.name) or "-",
                str(row.bank),
                size(row.size_bytes),
                str(row.references),
                str(row.leases),
                str(row.clients),
            ]
            for row in survey.objects
        ]
    return ["lease", "object", "client", "offset", "length", "access"], [
        [
            str(row.number),
            str(row.object),
            str(row.client),
            f"{row.offset:#x}",
            size(row.length),
            "write" if row.write else "read",
        ]
        for row in survey.leases
    ]


def lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align columns: numbers and sizes to the right, words to the left."""
    words = [not any(row[index][:1].isdecimal() for row in rows) for index in range(len(heads))]
    widths = [max(len(row[index]) for row in [heads, *rows]) for index in range(len(heads))]
    for row in [heads, *rows]:
        cells = zip(row, widths, words, strict=True)
        yield "  ".join(
            cell.ljust(width) if word else cell.rjust(width) for cell, width, word in cells
        ).rstrip()
