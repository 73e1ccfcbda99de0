"""``quire top``: watch a broker live."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quire.commands.administration import add_socket

if TYPE_CHECKING:
    import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire top``."""
    add_socket(parser)
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (1)"
    )


def run(args: argparse.Namespace) -> int:
    """Show it until q is pressed; return 0, or 1 if it cannot be shown."""
    if not 0.1 <= args.interval <= 3600:
        sys.stderr.write(f"quire top: --interval {args.interval} is not 0.1 to 3600\n")
        return 2
    try:
        from quire.commands.monitor import Monitor  # noqa: PLC0415 - an extra
    except ImportError as error:
        sys.stderr.write(f"quire top: {error.name} is missing: pip install 'quire[broker]'\n")
        return 1
    app = Monitor(args.socket, args.interval)
    app.run()
    return app.return_code or 0
