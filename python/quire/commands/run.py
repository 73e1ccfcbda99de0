"""``quire run``: run a Python program with wheels on its path, nothing unpacked."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from typing import TYPE_CHECKING

from quire.errors import Unsupported
from quire.wheels import program

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire run``."""
    parser.usage = (
        "quire run [--wheel FILE]... [--requirements FILE --wheel-dir DIR]\n"
        "                 (SCRIPT | -m MODULE | -c CODE | --script NAME) [ARGUMENT]..."
    )
    parser.add_argument(
        "--wheel", action="append", default=[], metavar="FILE", help="use this wheel; repeatable"
    )
    parser.add_argument("--requirements", metavar="FILE", help="use wheels of DIR that meet this file")
    parser.add_argument("--wheel-dir", metavar="DIR", help="where the wheels for --requirements are")
    what = parser.add_mutually_exclusive_group()
    rest = argparse.REMAINDER
    what.add_argument("-m", dest="module", nargs=rest, metavar="MODULE", help="run a module, as python -m")
    what.add_argument("-c", dest="command", nargs=rest, metavar="CODE", help="run code, as python -c")
    what.add_argument(
        "--script",
        dest="name",
        nargs=rest,
        metavar="NAME",
        help="run a command that the wheels would install",
    )
    parser.add_argument(
        "program", nargs=rest, metavar="SCRIPT", help="a script, folder or archive; its arguments"
    )
    parser.set_defaults(is_program=True, fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Run the program in this process.

    Returns:
        0, or 2 after saying on stderr that there is nothing to run. What the program raises, it raises.
    """
    words = next(
        (list(each) for each in (args.module, args.command, args.name) if each is not None), args.program
    )
    if not words:
        args.fail("nothing to run: name a script, or use -m, -c or --script")
    if (args.requirements is None) != (args.wheel_dir is None):
        args.fail("--requirements and --wheel-dir need each other")
    try:
        archives = _archives(args)
        start, first = _chosen(args, archives, words[0], words[1:])
    except (OSError, ValueError, LookupError, ImportError, Unsupported) as error:
        sys.stderr.write(f"quire run: {error}\n")
        return 2
    program.use(archives, first)
    program.run(start)
    return 0


def _chosen(
    args: argparse.Namespace, archives: list[str], word: str, rest: list[str]
) -> tuple[Callable[[], None], str | None]:
    """Give what runs the program, and what comes first on its path."""
    if args.module is not None:
        return functools.partial(program.run_module, word, rest), os.getcwd()
    if args.command is not None:
        return functools.partial(program.run_command, word, rest), ""
    if args.name is not None:
        return program.console_script(word, archives, rest), None
    start = functools.partial(program.run_script, word, rest)
    if program.is_container(word):
        return start, word
    # What cannot be read is said before anything else is done.
    with open(word, "rb"):
        return start, os.path.dirname(os.path.realpath(word))


def _archives(args: argparse.Namespace) -> list[str]:
    """List the wheels, each tried. Raises ImportError if one is none."""
    from quire.wheels.archive import open_wheel  # noqa: PLC0415 - not before the arguments are right

    archives = [os.path.abspath(path) for path in args.wheel]
    if args.requirements is not None:
        archives += [os.path.abspath(path) for path in _resolved(args.requirements, args.wheel_dir)]
    for archive in archives:
        open_wheel(archive)
    return archives


def _resolved(requirements: str, folder: str) -> list[str]:
    before = set(sys.modules)
    try:
        from quire.wheels.requirements import read_requirements, resolve  # noqa: PLC0415

        return resolve(read_requirements(requirements), folder)
    except ModuleNotFoundError as error:
        raise Unsupported(f"requirements need what `pip install quire[run]` installs: {error}") from error
    finally:
        # The program may have these libraries too, of other versions.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in {"packaging", "resolvelib"}:
                del sys.modules[name]
