"""``quire maps``: draw the address space of a process."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from typing import TYPE_CHECKING

from quire.commands.drawing import console, write
from quire.errors import Unsupported
from quire.pictures.page import page
from quire.pictures.still import still
from quire.pictures.text import printable
from quire.process import watch
from quire.process.picture import picture

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quire.process import Maps

__all__ = ["add_arguments", "run"]

_INTERVAL_AT_MOST_S = 86400.0
_COLUMNS = ("kind", "committed", "resident", "proportional", "unique", "dirty", "swapped")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire maps``."""
    parser.add_argument("pid", metavar="PID", help="the process's number, or self")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--tree", action="store_true", help="by kind, file and mapping, the largest first")
    form.add_argument("--top", action="store_true", help="what grows and what is largest, until Ctrl-C")
    form.add_argument("--json", action="store_true", help="print everything as JSON; a list with --samples")
    form.add_argument("--csv", action="store_true", help="print a line for each mapping and sample")
    parser.add_argument("--svg", metavar="FILE", help="write a picture")
    parser.add_argument("--html", metavar="FILE", help="write a page that stands alone")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument("--samples", type=_count, metavar="N", help="read N times, and draw the course")
    parser.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="S", help="seconds between samples (1)"
    )


def run(args: argparse.Namespace) -> int:
    """Read and draw; return 0, or 1 after saying on stderr why it could not be done."""
    try:
        if args.top:
            if args.svg or args.html:
                raise ValueError("--top writes no files; use --samples")
            _top(args)
            return 0
        samples = list(_samples(args, args.samples or 1))
        for path, draw in ((args.svg, still), (args.html, page)):
            if path is not None:
                write(path, draw(picture(samples, pages=draw is page)), force=args.force)
        _print(samples, args)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # whoever reads has seen enough: the command knows what to do then
    except (OSError, ValueError, Unsupported) as error:
        text = error.strerror if isinstance(error, (ProcessLookupError, PermissionError)) else str(error)
        sys.stderr.write(f"quire maps: {text or error}\n")
        return 1
    for problem in samples[-1].partial:
        sys.stderr.write(f"quire maps: not complete: {printable(problem)}\n")
    return 0


def _pid(text: str) -> int:
    if text == "self":
        return os.getpid()
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError(f"{printable(text)!r} is no process number: it takes a positive number, or self")
    return int(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is no number of samples: it is 1 at least")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _INTERVAL_AT_MOST_S:
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is no number of seconds up to a day")
    return seconds


def _samples(args: argparse.Namespace, count: int | None) -> Iterator[Maps]:
    """Read so many times, or until the process ends; say so if it ended too early."""
    taken = 0
    for each in watch(_pid(args.pid), args.interval, samples=count):
        taken += 1
        yield each
    if count is not None and taken < count:
        sys.stderr.write(f"quire maps: the process has ended after {taken} of {count} samples\n")


def _print(samples: Sequence[Maps], args: argparse.Namespace) -> None:
    if args.json:
        found = [each.as_dict() for each in samples]
        json.dump(found if args.samples else found[0], sys.stdout, indent=1)
        sys.stdout.write("\n")
    elif args.csv:
        _print_csv(samples)
    elif not (args.svg or args.html):
        _draw(samples, args)


def _print_csv(samples: Sequence[Maps]) -> None:
    lines = csv.writer(sys.stdout)
    lines.writerow(
        (
            "sample",
            "time_s",
            "start",
            "end",
            "size",
            "protection",
            "offset",
            "device",
            "inode",
            *_COLUMNS,
            "name",
        )
    )
    for number, sample in enumerate(samples):
        since = f"{sample.process.monotonic - samples[0].process.monotonic:.3f}"
        for vma in sample:
            device = f"{vma.major:x}:{vma.minor:x}"
            where = (hex(vma.start), hex(vma.end), vma.size, vma.protection, vma.offset, device, vma.inode)
            lines.writerow(
                (number, since, *where, *(getattr(vma, name) for name in _COLUMNS), printable(vma.name))
            )


def _draw(samples: Sequence[Maps], args: argparse.Namespace) -> None:
    screen = console()
    from quire.pictures import terminal  # noqa: PLC0415 - it needs rich

    drawn = picture(samples)
    last = drawn.samples[-1]
    if args.tree:
        screen.print(terminal.tree(last, drawn.title, screen))
        return
    if args.samples:
        screen.print(terminal.timeline(drawn, screen))
    else:
        screen.print(terminal.mappings(last.rows, screen), soft_wrap=not screen.is_terminal)
    screen.print()
    screen.print(f"{drawn.title}, {drawn.subtitle}", style="bold")
    screen.print(terminal.summary(last, screen))


def _top(args: argparse.Namespace) -> None:
    screen = console()
    from rich.live import Live  # noqa: PLC0415

    from quire.pictures import terminal  # noqa: PLC0415

    first: Maps | None = None
    before: Maps | None = None
    with Live(console=screen, screen=screen.is_terminal, auto_refresh=False) as live:
        for now in _samples(args, args.samples):
            first = first or now
            live.update(terminal.top(picture((first, before or now, now)), screen), refresh=True)
            before = now
