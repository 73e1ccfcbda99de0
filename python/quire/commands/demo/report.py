"""The result for people: two tables and what they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from quire import PAGE_SIZE
from quire.commands.demo.figures import Spread

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from quire.commands.demo.figures import Figures

__all__ = ["bytes_text", "duration_text", "report"]

WHO_READS = {
    "quire": "all, verified",
    "fork": "the child",
    "np.copyto": "the writer",
    "shared_memory": "all, unverified",
}


def duration_text(nanoseconds: float) -> str:
    """Write a duration with three digits."""
    for unit, size in (("s", 1e9), ("ms", 1e6)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds / 1e3:.3g} µs"


def bytes_text(count: int) -> str:
    """Write a size."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1024:.0f} KiB"


def _spread(durations: list[int]) -> str:
    found = Spread.of(durations)
    if found is None:
        return "-"
    return f"{duration_text(found.median)} (worst {duration_text(found.worst)})"


def report(figures: Figures, picture: Path, console: Console) -> None:
    """Print the tables and where the picture is."""
    console.print(_main_table(figures))
    console.print(_comparison(figures))
    for note in _notes(figures):
        console.print(note, markup=False)
    console.print()
    console.print(f"Which pages changed when: {picture}", markup=False, soft_wrap=True)


def _main_table(figures: Figures) -> Table:
    size = figures.size_bytes
    pages = figures.pages()
    total_pages = -(-size // PAGE_SIZE)
    worst = figures.worst_memory
    table = Table(
        title=figures.data["title"],
        box=box.SIMPLE_HEAD,
        show_header=False,
        title_justify="left",
        title_style="bold",
    )
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("data", f"{bytes_text(size)}, {figures.data['rows']:,} rows, {total_pages:,} pages")
    table.add_row("versions", f"{len(figures.versions)}; {figures.agreed} verified reads, all exact")
    if pages:
        table.add_row(
            "pages changed per version",
            f"{min(pages):,} to {max(pages):,}"
            f" ({min(pages) / total_pages:.2%} to {max(pages) / total_pages:.2%})",
        )
    table.add_row("time of the first version", duration_text(figures.versions[0]["snapshot_ns"]))
    table.add_row(
        "time per version after it", _spread([version["snapshot_ns"] for version in figures.versions[1:]])
    )
    table.add_row("first hand-over, until mapped", _spread(figures.first_handover_ns))
    table.add_row("hand-over, until mapped [1]", _spread(figures.handover_ns))
    table.add_row("reading all of it, per reader", _spread(figures.aggregate_ns))
    table.add_row(
        "memory of all processes [2]", f"{bytes_text(worst.total)}, {worst.total / size:.2f} times the data"
    )
    return table


def _comparison(figures: Figures) -> Table:
    count = max((len(event["version_ns"]) for event in figures.compared.values()), default=0)
    table = Table(
        title=f"The pages of the last {count} versions changed again, with other means [3]",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    for heading in ("version", "worst", "stores", "memory [4]"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("readers", no_wrap=True)
    for name, event in figures.compared.items():
        version, store = Spread.of(event["version_ns"]), Spread.of(event["store_ns"])
        extra = figures.extra_bytes(name)
        table.add_row(
            name,
            "-" if version is None else duration_text(version.median),
            "-" if version is None else duration_text(version.worst),
            "-" if store is None else duration_text(store.median),
            "-" if extra is None else f"+{bytes_text(extra)}",
            WHO_READS[name],
        )
    return table


def _notes(figures: Figures) -> list[str]:
    worst = figures.worst_memory
    return [
        "[1] From before the writer sends until the reader has verified and mapped it, over all readers.",
        (
            f"[2] The largest of {len(figures.memory)} looks: the sum of Pss of command, writer and readers"
            f" ({bytes_text(worst.pss)}; it divides a shared page among those that map it), plus what memfds"
            f" hold that no process has mapped ({bytes_text(worst.unmapped)}). Each memfd counts once."
            f" Readers had copied in at most {bytes_text(figures.copied_bytes)}, where mapping every run of"
            " pages by itself would have taken too many VMAs."
        ),
        (
            "[3] version: median time to take one (snapshot, fork, or copying everything); the worst of a"
            " copy is the first, into memory not touched before. stores: median time to store a byte into"
            " each changed page; after a snapshot or fork these copy pages. All with 4 KiB pages."
        ),
        (
            "[4] Beyond one copy of the data, while a version is held. For quire that of all processes in the"
            " first table, interpreters included; for the others only what holding the version adds."
        ),
        (
            f"Everything was measured in this run: {figures.elapsed_s:.0f} s, at most"
            f" {bytes_text(figures.peak_bytes)} in use at any look, the comparison included."
        ),
    ]
