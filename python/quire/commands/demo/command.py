"""The command: starts the programs, shows what they say, ends them, and prints what was found."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from quire.commands.demo.figures import Figures
from quire.commands.demo.memory import measure
from quire.commands.demo.picture import draw
from quire.commands.demo.programs import Gone, Programs
from quire.commands.demo.progress import Progress
from quire.commands.demo.report import report

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from quire.commands.demo.programs import Program

__all__ = ["run_demo"]

MEASURED_AT = {"measure", "published", "received", "base", "compared"}
"""Events whose program waits while the memory of all is looked at."""


class Stopped(Exception):  # noqa: N818 -- a request, not a mistake
    """A signal asked the command to end."""


def run_demo(args: argparse.Namespace) -> int:
    """Run everything; see `quire.commands.demo.run`."""
    started = time.monotonic()
    complaints = Console(stderr=True, soft_wrap=True, highlight=False)
    figures = Figures(args.readers)
    try:
        if args.file is not None:
            # Said here, before anything is started.
            with args.file.open("rb"):
                pass
        with ending_by_signals(), temporary_folder() as folder, Programs() as programs:
            try:
                play(args, str(folder / "socket"), programs, figures)
            except Gone as gone:
                cause = programs.first_cause()
                text = str(gone)
                complaints.print(f"quire demo failed: {text}", style="bold red", markup=False)
                if cause and cause not in text:
                    complaints.print(f"the cause: {cause}", markup=False)
                return 1
        figures.elapsed_s = time.monotonic() - started
        args.picture.write_text(draw(figures), "utf-8")
    except (KeyboardInterrupt, Stopped) as stop:
        complaints.print("quire demo was stopped; its processes have ended", markup=False)
        return stop.args[0] if stop.args else 130
    except OSError as error:
        complaints.print(f"quire demo failed: {error}", style="bold red", markup=False)
        return 1
    if args.json:
        print(json.dumps(figures.as_dict() | {"picture": str(args.picture)}, indent=2))
    else:
        report(figures, args.picture, Console(highlight=False))
    return 0


def play(args: argparse.Namespace, path: str, programs: Programs, figures: Figures) -> None:
    """Run the writer and the readers, then the comparison."""
    config = {
        "socket": path,
        "file": None if args.file is None else str(args.file.absolute()),
        "scale": args.scale,
        "versions": args.versions,
        "readers": args.readers,
        "falsify": args.falsify,
    }
    with Progress(args.versions, args.readers) as progress:
        writer = programs.start("the writer", "writer", json.dumps(config))
        progress.say(f"the writer is process {writer.process.pid}")
        for event in programs.events(writer):
            handle(event, writer, figures, progress)
            if event["event"] == "listening":
                for number in range(1, args.readers + 1):
                    reader = programs.start(f"reader {number}", "reader", path)
                    progress.say(f"reader {number} is process {reader.process.pid}")
            elif event["event"] == "published":
                comparer = programs.start("the comparison", "compare", path)
                break
        for event in programs.events(comparer):
            if event["event"] == "received":
                # Only one copy of the data is left, that of the comparison.
                writer.process.wait()
                programs.check(writer)
            handle(event, comparer, figures, progress)


def handle(event: dict[str, Any], program: Program, figures: Figures, progress: Progress) -> None:
    """Act on one event.

    Raises:
        Gone: The program says that it failed.
    """
    if event["event"] == "failed":
        raise Gone(event["text"])
    memory = measure() if event["event"] in MEASURED_AT else None
    figures.take(event, memory)
    progress.show(event, memory)
    if memory is not None:
        program.answer()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for the socket, for this user only, and remove it."""
    folder = tempfile.mkdtemp(prefix="quire-demo-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
