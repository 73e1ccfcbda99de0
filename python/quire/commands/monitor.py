"""The screen of ``quire top``. Needs textual, and msgspec for the client: the extra ``broker``."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual.app import App
from textual.binding import Binding
from textual.containers import Vertical
from textual.widgets import DataTable, Footer, Static, TabbedContent, TabPane

from quire.client import Client, connect
from quire.commands.administration import TABLES, name_of, tables
from quire.errors import QuireError
from quire.pictures.text import size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from textual.app import ComposeResult

    from quire.broker.operations import Survey

__all__ = ["Monitor"]

_ANSWER_SECONDS = 3.0
_AT_ONCE_ROWS = 500
"""Of one table; more than that nobody reads, and drawing them takes longer than looking again."""


class Monitor(App[None]):
    """Looks at a broker at intervals and shows what it says."""

    CSS = """
    #totals { height: auto; padding: 0 1; background: $panel; }
    #trouble { height: auto; padding: 0 1; color: $error; display: none; }
    DataTable { height: 1fr; }
    """
    BINDINGS: ClassVar = [
        Binding("q", "quit", "Quit"),
        Binding("r", "look", "Look now"),
        Binding("space", "pause", "Pause"),
        *(Binding(str(index), f"show('{what}')", what.title()) for index, what in enumerate(TABLES, 1)),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, path: str, interval_seconds: float) -> None:
        """Prepare.

        Args:
            path: Where the broker listens.
            interval_seconds: Between two looks.
        """
        super().__init__()
        self._path = path
        self._interval_seconds = interval_seconds
        self._client: Client | None = None
        self._looking = threading.Lock()
        self._paused = False
        self._before: tuple[float, dict[int, int]] | None = None

    def compose(self) -> ComposeResult:
        """Lay the screen out: totals, a line for what goes wrong, a table in each tab, the keys."""
        with Vertical():
            yield Static(f"connecting to {name_of(self._path)}", id="totals")
            yield Static(id="trouble")
            with TabbedContent(id="tabs"):
                for what in TABLES:
                    with TabPane(what.title(), id=what):
                        yield DataTable(id=f"{what}-rows", cursor_type="row", zebra_stripes=True)
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self.set_interval(self._interval_seconds, self._tick)
        self.action_look()

    def on_unmount(self) -> None:
        """Give the connection back."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _tick(self) -> None:
        if not self._paused:
            self.action_look()

    def action_pause(self) -> None:
        """Stop looking, or go on."""
        self._paused = not self._paused
        self.sub_title = "paused" if self._paused else ""
        self._trouble("paused: space goes on" if self._paused else "")

    def action_show(self, what: str) -> None:
        """Go to a table."""
        self.query_one("#tabs", TabbedContent).active = what
        self.query_one(f"#{what}-rows", DataTable).focus()

    def action_look(self) -> None:
        """Ask the broker, in a thread: it may take long to answer, and keys must work meanwhile."""
        self.run_worker(self._look, thread=True, exit_on_error=True)

    def _look(self) -> None:
        if not self._looking.acquire(blocking=False):
            # The look before is not done yet.
            return
        try:
            if self._client is None:
                self._client = connect(self._path, timeout=_ANSWER_SECONDS)
            survey = self._client.survey()
        except (QuireError, OSError) as error:
            lost, self._client = self._client, None
            if lost is not None:
                lost.close()
            # Tried again at the next look.
            self._tell(self._failed, str(error))
        else:
            self._tell(self._show, survey)
        finally:
            self._looking.release()

    def _tell(self, function: Callable[[Any], None], argument: object) -> None:
        """Have something shown, from the thread that asks."""
        # The application may have ended while the broker answered.
        with contextlib.suppress(RuntimeError):
            self.call_from_thread(self._tell_now, function, argument)

    def _tell_now(self, function: Callable[[Any], None], argument: object) -> None:
        # While it ends it has no widgets any more, and still takes calls.
        if self.query("#trouble"):
            function(argument)

    def _failed(self, why: str) -> None:
        self._before = None
        self._trouble(f"no answer from {name_of(self._path)}: {why}")

    def _trouble(self, text: str) -> None:
        line = self.query_one("#trouble", Static)
        line.update(Text(text))
        line.display = bool(text)

    def _rates(self, survey: Survey) -> dict[int, float]:
        """Requests a second of each client since the look before."""
        now = time.monotonic()
        counts = {row.number: row.requests for row in survey.clients}
        rates: dict[int, float] = {}
        if self._before is not None:
            since, before = self._before
            # A broker that was restarted counts from zero.
            rates = {
                number: max(0, count - before.get(number, count)) / (now - since)
                for number, count in counts.items()
            }
        self._before = now, counts
        return rates

    def _show(self, survey: Survey) -> None:
        if not self._paused:
            self._trouble("")
        rates = self._rates(survey)
        root = next((row for row in survey.banks if not row.parent), None)
        clients = next((row for row in survey.banks if root and row.parent == root.number), None)
        connected = sum(1 for row in survey.clients if row.connected)
        parts = [
            name_of(self._path),
            f"clients {connected}, away {len(survey.clients) - connected}",
            f"objects {len(survey.objects)}",
            f"leases {len(survey.leases)}",
            f"requests/s {sum(rates.values()):.0f}",
        ]
        if root is not None and clients is not None:
            parts.append(f"memory {size(root.used[0])} of {size(clients.limit[0])}")
        self.query_one("#totals", Static).update(Text("   ".join(parts)))
        for what in TABLES:
            heads, rows = tables(survey, what, rates)
            self._fill(self.query_one(f"#{what}-rows", DataTable), heads, rows)

    @staticmethod
    def _fill(table: DataTable[Text], heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Change what is different, so that the cursor and the place stay."""
        if not table.columns:
            for index, head in enumerate(heads):
                table.add_column(head, key=str(index))
        shown = rows[:_AT_ONCE_ROWS]
        while table.row_count > len(shown):
            table.remove_row(str(table.row_count - 1))
        for number, row in enumerate(shown):
            cells = [Text(cell, justify="right" if cell[:1].isdecimal() else "left") for cell in row]
            if number >= table.row_count:
                table.add_row(*cells, key=str(number))
                continue
            for index, cell in enumerate(cells):
                if table.get_cell(str(number), str(index)) != cell:
                    table.update_cell(str(number), str(index), cell, update_width=True)
