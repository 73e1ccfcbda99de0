"""``docs/benchmarks.md``: what was measured, on what, against what; goals that were missed among it."""

import dataclasses
from pathlib import Path

from benches.common import MIB, Peer, Row, Spread
from benches.growth import COSTS, FRACTIONS, Growth
from benches.plot import picture

TIMES = "\N{MULTIPLICATION SIGN}"
DASH = "\N{EN DASH}"
SECONDS_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


BUSY = (
    "The machine was busy with other work when the run began: every time below contains waiting for a"
    " processor, and differs from run to run by more than the spreads show."
)


@dataclasses.dataclass
class Results:
    """All that one run measured; what it did not measure is None."""

    quick: bool
    machine: list[tuple[str, str]]
    load_before: str
    load_after: str
    busy: bool
    minutes: float
    rows: list[Row]
    starting: Row | None
    starting_goal: float
    growth: Growth | None


def duration(seconds: float) -> str:
    """Show seconds with three digits, in the unit that fits."""
    for unit, name in SECONDS_UNITS:
        if abs(seconds) >= unit * 0.9995:
            return (
                f"{seconds / unit:.3g} {name}"
                if abs(seconds) < unit * 999.5
                else f"{seconds / unit:.0f} {name}"
            )
    return f"{seconds * 1e6:.2g} µs"


def ratio(value: float) -> str:
    """Show a ratio with three digits."""
    return f"{value:.3g}{TIMES}" if value < 999.5 else f"{value:.0f}{TIMES}"


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    result = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    result += ["| " + " | ".join(line) + " |" for line in lines]
    return [*result, ""]


def _spread_cells(spread: Spread) -> list[str]:
    return [
        duration(spread.median),
        f"{duration(spread.low_quartile)} {DASH} {duration(spread.high_quartile)}",
        duration(spread.mean),
        duration(spread.worst),
        str(spread.size),
    ]


SPREAD_HEAD = ["median", "quartiles", "mean", "worst", "figures"]


def _verdict(row: Row, peer: Peer) -> list[str]:
    medians, means, by_round = row.ratios(peer)
    goal = DASH if peer.goal is None else ratio(peer.goal)
    reached = "" if peer.goal is None else "reached" if medians >= peer.goal else "**missed**"
    return [
        peer.name,
        f"**{ratio(medians)}**",
        f"{ratio(by_round.low_quartile)} {DASH} {ratio(by_round.high_quartile)}",
        ratio(means),
        goal,
        reached,
    ]


VERDICT_HEAD = ["against", "ratio of medians", "quartiles, by round", "ratio of means", "goal", ""]


def _summary(results: Results) -> list[str]:
    lines = [
        [row.title, *_verdict(row, peer)]
        for row in results.rows
        for peer in row.peers
        if peer.goal is not None
    ]
    if results.starting:
        spent = Spread.of(results.starting.parts["the import: the difference"])
        reached = "reached" if spent.median < results.starting_goal else "**missed**"
        goal = f"< {duration(results.starting_goal)}"
        quartiles = f"{duration(spent.low_quartile)} {DASH} {duration(spent.high_quartile)}"
        lines.append(
            [
                "`import quire`",
                "bare start",
                f"**{duration(spent.median)}** more",
                quartiles,
                DASH,
                goal,
                reached,
            ]
        )
    return _table(["work", *VERDICT_HEAD], lines)


def _missed(results: Results) -> list[str]:
    missed = [row for row in results.rows if row.missed()]
    if not missed:
        return ["Every goal that was measured was reached.", ""]
    return [
        *(
            f"- Missed: {row.title}, against {', '.join(peer.name for peer in row.missed())}. What bounds it:"
            f" {row.bounds}."
            for row in missed
        ),
        "",
        "What was tried is told in [design.md](design.md#speed-and-what-was-tried).",
        "",
    ]


def _row(row: Row) -> list[str]:
    lines = [f"### {row.title}", "", row.what, ""]
    if row.ours:
        lines += _table(
            ["", *SPREAD_HEAD],
            [
                ["quire", *_spread_cells(row.spread)],
                *([peer.name, *_spread_cells(Spread.of(peer.seconds))] for peer in row.peers),
            ],
        )
    if row.peers:
        lines += _table(VERDICT_HEAD, [_verdict(row, peer) for peer in row.peers])
    if row.parts:
        parts = [[name, *_spread_cells(Spread.of(values))] for name, values in row.parts.items()]
        lines += _table(["of it, and beside it", *SPREAD_HEAD], parts)
    return [*lines, *(f"{note}\n" for note in row.notes)]


def _growth(growth: Growth, picture_name: str) -> list[str]:
    lines = [
        "## How each cost grows",
        "",
        (
            "Medians, and least to worst in brackets. Pages are changed at random, one word each; for each"
            " size one segment, from the least changed to the most, so the last columns include the rewriting"
            " of stripes."
        ),
        "",
        f"![How each cost grows]({picture_name})",
        "",
    ]
    sizes = sorted({size for _, size, _ in growth.cells})
    for cost in COSTS:
        body = []
        for size in sizes:
            cells = [f"{size // MIB} MiB"]
            for fraction in FRACTIONS:
                spread = growth.cells.get((cost, size, fraction))
                if spread is None:
                    cells.append("not measured")
                    continue
                reach = f"{duration(spread.least)} {DASH} {duration(spread.worst)}"
                cells.append(f"{duration(spread.median)} ({reach})")
            body.append(cells)
        lines += [f"### {cost}", ""]
        lines += _table(["size", *(f"{100 * fraction:g} % changed" for fraction in FRACTIONS)], body)
    return [*lines, *(f"Left out: {reason}.\n" for reason in growth.left_out)]


def write(results: Results, path: Path) -> None:
    """Write the report, and its picture beside it."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; everything here was measured in one run, and nothing else is claimed.",
        "",
        *(
            ["**A smoke run: it shows that the measurements run. Its figures mean nothing.**", ""]
            if results.quick
            else []
        ),
        (
            "A ratio is the peer's time through quire's, so more is better. quire and its peers take turns,"
            " round by round, so that noise hits both; the first round is not counted. The headline is the"
            " ratio of medians; beside it stand the quartiles of the ratio taken round by round, and the"
            " ratio of means, which shows the rare expensive calls that a median hides."
        ),
        "",
        (
            "Memory is warmed before every round: on virtual machines the first touch of memory that was idle"
            " takes seconds for each GiB, whoever touches it, and would drown what is measured."
        ),
        "",
        "## The machine",
        "",
        *_table(
            ["", ""],
            [
                *map(list, results.machine),
                ["load averages before and after", f"{results.load_before}; {results.load_after}"],
                ["this run took", f"{results.minutes:.1f} minutes"],
            ],
        ),
        *([BUSY, ""] if results.busy else []),
        "## Goals",
        "",
        *_summary(results),
        *_missed(results),
        "## Row by row",
        "",
    ]
    for row in [*results.rows, *([results.starting] if results.starting else [])]:
        lines += _row(row)
    if results.growth and results.growth.cells:
        picture_path = path.with_suffix(".svg")
        picture_path.write_text(picture(results.growth), encoding="utf-8")
        lines += _growth(results.growth, picture_path.name)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
