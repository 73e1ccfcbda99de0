"""``quire pack``: pack a file or an archive so that any part of it is decoded on its own."""

from __future__ import annotations

import argparse
import re
import sys

from quire.packing import FAILURES, FRAME_BYTES, LEVEL, check_frame_bytes, pack

__all__ = ["add_arguments", "frame_size", "run"]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire pack``."""
    parser.add_argument(
        "input", metavar="IN", help="a zip archive, or a file, .gz, .zst, archive.zip!/member"
    )
    parser.add_argument("output", metavar="OUT", help="an archive for an archive, else a zstandard file")
    parser.add_argument(
        "--frame-size",
        type=frame_size,
        default=FRAME_BYTES,
        metavar="BYTES",
        help=f"content of a frame, such as 64KiB or 1MiB ({FRAME_BYTES >> 10}KiB)",
    )
    parser.add_argument("--level", type=int, default=LEVEL, help=f"of zstandard, 1 to 22 ({LEVEL})")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists; it may be IN")


def frame_size(text: str) -> int:
    """Read a length of frames, with or without a unit of 1024 bytes (``256KiB``, ``256K``, ``1M``).

    Raises:
        argparse.ArgumentTypeError: It is none, or not possible for frames.
    """
    found = re.fullmatch(r"([0-9]{1,12}) ?(?:([km])(?:i?b)?|b)?", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 256KiB")
    try:
        return check_frame_bytes(int(found[1]) * _UNITS[found[2] or ""])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Pack; return 0, or 1 after saying on stderr why it could not be done."""
    try:
        done = pack(args.input, args.output, frame_bytes=args.frame_size, level=args.level, force=args.force)
    except FAILURES as error:
        sys.stderr.write(f"quire pack: {error}\n")
        return 1
    sys.stdout.write(done.summary(args.output))
    return 0
