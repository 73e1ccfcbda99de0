"""``quire broker``: run the daemon that lends memory, accounts for it and takes it back."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from quire.broker import config as configuration
from quire.broker import events, guardian, server
from quire.errors import Unsupported

if TYPE_CHECKING:
    import argparse

__all__ = ["add_arguments", "run"]

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str) -> int:
    """Read a size: a number of bytes, or one followed by K, M, G or T.

    Raises:
        ValueError: It is none.
    """
    unit = text[-1:].upper() if text[-1:].upper() in UNITS else ""
    value = int(text[: len(text) - len(unit)]) * UNITS[unit]
    if value <= 0:
        raise ValueError(f"{text} is not a positive size")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire broker``."""
    parser.add_argument("--socket", metavar="PATH", help="listen here; not needed under socket activation")
    parser.add_argument(
        "--limit",
        type=size,
        metavar="BYTES",
        help="for all clients together; K, M, G, T (half of the memory)",
    )
    parser.add_argument("--config", metavar="FILE", help="limits, policy, logs; TOML, see docs/broker.md")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="let Prometheus read there")


def run(args: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT; a broker that is killed is started again."""
    given: dict[str, Any] = {}
    if args.limit is not None:
        given["limit_bytes"] = args.limit
    if args.metrics is not None:
        given["metrics"] = args.metrics
    try:
        config = configuration.load(args.config, **given)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"quire broker: {error}\n")
        return 1
    try:
        if "LISTEN_FDS" in os.environ or "NOTIFY_SOCKET" in os.environ:
            return server.serve(args.socket, config)
        if args.socket is None:
            sys.stderr.write("quire broker: --socket PATH is needed, or socket activation\n")
            return 2
        argv = [sys.executable, "-m", "quire", "broker", "--socket", args.socket]
        if args.limit is not None:
            argv += ["--limit", str(args.limit)]
        if args.config is not None:
            argv += ["--config", args.config]
        if args.metrics is not None:
            argv += ["--metrics", args.metrics]
        listener = server.listen(args.socket)
        try:

            def report(event: str) -> None:
                events.tell(sys.stderr.fileno(), config.log_format, event)

            return guardian.Guardian(listener, argv, report).run()
        finally:
            # Until it is closed nobody else can have bound the path.
            os.unlink(args.socket)
            listener.close()
    except (OSError, Unsupported) as error:
        sys.stderr.write(f"quire broker: {error}\n")
        return 1
