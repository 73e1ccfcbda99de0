"""``quire space``: models of address spaces. ``play`` runs a script and draws each step."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from quire.commands.drawing import console, write
from quire.errors import QuireError
from quire.pictures.model import Picture
from quire.pictures.page import page
from quire.pictures.strip import strip
from quire.pictures.text import printable
from quire.space import running_rules
from quire.space.script import Lesson, play

if TYPE_CHECKING:
    import argparse
    from importlib.resources.abc import Traversable

__all__ = ["add_arguments", "lessons", "run"]

_BYTES_AT_MOST = 1 << 20
_INCLUDED = "lesson:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``quire space``."""
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    player = commands.add_parser("play", help="run a script of operations and draw each step")
    player.add_argument(
        "file",
        metavar="FILE",
        help="a script (docs/address-spaces.md), - for stdin, or lesson:NAME for an included one",
    )
    player.add_argument("--svg", metavar="FILE", help="write a strip of pictures")
    player.add_argument(
        "--html", metavar="FILE", help="write a page that stands alone, with a sample for each step"
    )
    player.add_argument("--force", action="store_true", help="replace files that exist")
    player.add_argument(
        "--running-kernel",
        action="store_true",
        help="go by the rules of the kernel that runs, not of Linux 6.18",
    )
    commands.add_parser("lessons", help="list the scripts that are included")


def run(args: argparse.Namespace) -> int:
    """Do what was asked; return 0, or 1 after saying on stderr why it could not be done."""
    if args.action == "lessons":
        for name, file in lessons().items():
            sys.stdout.write(f"lesson:{name:<20} {play(file.read_text('utf-8')).title}\n")
        return 0
    try:
        lesson = play(_read(args.file), running_rules() if args.running_kernel else None)
        if not lesson.steps:
            raise ValueError("the script has no operation that is drawn")
        for path, draw in ((args.svg, _strip), (args.html, _page)):
            if path is not None:
                write(path, draw(lesson), force=args.force)
        if not (args.svg or args.html):
            _draw(lesson)
    except (OSError, ValueError, QuireError) as error:
        sys.stderr.write(f"quire space play: {printable(args.file)}: {error}\n")
        return 1
    return 0


def lessons() -> dict[str, Traversable]:
    """Return the included scripts by name."""
    folder = files("quire.space").joinpath("lessons")
    found = {each.name.removesuffix(".txt"): each for each in folder.iterdir() if each.name.endswith(".txt")}
    return dict(sorted(found.items()))


def _read(name: str) -> str:
    if name.startswith(_INCLUDED):
        included = lessons()
        wanted = name.removeprefix(_INCLUDED)
        if wanted not in included:
            raise ValueError(f"there is no such lesson; there are {', '.join(included)}")
        return included[wanted].read_text("utf-8")
    if name == "-":
        content = sys.stdin.buffer.read(_BYTES_AT_MOST + 1)
    else:
        with Path(name).open("rb") as file:
            content = file.read(_BYTES_AT_MOST + 1)
    if len(content) > _BYTES_AT_MOST:
        raise ValueError("a script is 1 MiB at most")
    return content.decode("utf-8")


def _strip(lesson: Lesson) -> str:
    return strip(lesson.title, lesson.steps, lesson.about)


def _page(lesson: Lesson) -> str:
    samples = []
    for number, step in enumerate(lesson.steps):
        for panel in step.panels:
            where = f"{panel.title}, after " if len(step.panels) > 1 else ""
            title = f"{where}{number}: {step.title}"
            samples.append(
                panel._replace(
                    title=title, note=" ".join((*step.said, "; ".join(step.notes))), failed=step.failed
                )
            )
    return page(Picture(lesson.title, tuple(samples), lesson.about))


def _draw(lesson: Lesson) -> None:
    screen = console()
    from quire.pictures import terminal  # noqa: PLC0415 - it needs rich

    screen.print(printable(lesson.title), style="bold")
    if lesson.about:
        screen.print(printable(lesson.about))
    screen.print()
    screen.print(terminal.steps(lesson.steps, screen))
