"""What the demo shows while it runs: moving bars on a terminal, a line for each event elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from quire.commands.demo.report import bytes_text, duration_text

if TYPE_CHECKING:
    from types import TracebackType

    from quire.commands.demo.memory import Memory

__all__ = ["Progress"]


class Progress:
    """Shows events on standard error, so that standard output holds the result only."""

    def __init__(self, versions: int, readers: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._readers = readers
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bars.add_task("starting", total=versions)

    def __enter__(self) -> Self:
        """Show the bars."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bars away; the lines stay."""
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)

    def show(self, event: dict[str, Any], memory: Memory | None) -> None:
        """Show one event."""
        match event["event"]:
            case "step":
                self._bars.update(self._task, description=event["text"])
                self.say(event["text"])
            case "progress":
                self._bars.update(self._task, description=f"filling the segment, {event['fraction']:.0%}")
            case "filled":
                self.say(f"{event['title']}, {event['scale']} times: {bytes_text(event['size_bytes'])}")
            case "version":
                self._bars.update(self._task, description="publishing", completed=event["version"])
                text = (
                    "all of it"
                    if event["version"] == 1
                    else f"{event['pages']:,} pages in {duration_text(event['snapshot_ns'])}"
                )
                self.say(f"version {event['version']:>3}  {text:<24} {event['what']}")
            case "agreed":
                who = "the reader agrees" if self._readers == 1 else f"all {self._readers} readers agree"
                self._bars.update(self._task, description=f"{who} with version {event['version']}")
            case "measure":
                assert memory is not None
                self.say(f"             {bytes_text(memory.total)} in all processes together")
