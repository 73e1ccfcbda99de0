"""The ``quire`` command. Each subcommand's module is imported when it is asked for."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = {
    "doctor": "what this machine can do, what quire uses, what would enable more",
    "pack": "pack a file or an archive so that any part of it is decoded on its own",
    "unpack": "make a plain file, or an archive that any tool reads, of a packed one",
    "run": "run a Python program with wheels on its path, nothing unpacked",
    "stat": "how an input would be paged, at what cost, and whether packing it helps",
    "image": "what is in a program file, how it becomes an address space, what would run it",
    "fatelf": "make, take apart, check and run files that hold ELF files for several machines",
    "maps": "draw the address space of a process",
    "space": "models of address spaces: play a script of operations and draw each step",
    "broker": "lend memory to programs, account for it and take it back; a daemon",
    "ls": "list the clients, banks, objects and leases of a broker",
    "top": "watch the clients, banks and leases of a broker live",
    "revoke": "take memory that a broker lends back from a client, or from all",
    "bank": "list, create, limit and destroy the banks of a broker",
    "demo": "writer and reader processes share versions of real data; about a minute",
}
"""Subcommands and their summaries. Each is a module of `quire.commands` with ``add_arguments(parser)`` and
``run(args) -> int``. One that has ``ACTIONS`` has subcommands of its own, and the first is meant if none is
named."""


class _Version(argparse.Action):
    """Looks the version up only when asked: that is slower than everything else the command does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        sys.stdout.write(f"quire {version('quire')}\n")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the command's name; those of the process by default.

    Returns:
        The exit status: 0 if all went well, 1 if not. Wrong arguments exit with 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="quire", description="Virtual memory as a Python library.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == wanted:
            module = import_module(f"quire.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
            actions = getattr(module, "ACTIONS", ())
            after = arguments.index(name) + 1
            if actions and arguments[after : after + 1] not in [
                [each] for each in (*actions, "-h", "--help")
            ]:
                arguments.insert(after, actions[0])
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
        # Here, and not at the end of the process, where nobody can say that nobody reads.
        sys.stdout.flush()
    except BrokenPipeError:
        if getattr(args, "is_program", False):
            raise
        # Whoever read has seen enough, like head. What is still buffered must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if getattr(args, "is_program", False):
            # What was interrupted is the user's program: it ends as under Python itself.
            raise
        return 130
    return status
