"""``quire stat``: print how inputs would be paged, and at what cost. Plain text."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from quire.costs import Costs, costs
from quire.packing import FAILURES

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

__all__ = ["add_arguments", "report", "run"]

PAGED = {
    "plain": "as it is; a touch reads a window",
    "checkpoints": "a touch decodes from a checkpoint, of which there is about one for each MiB",
    "frames": "a touch decodes a frame, on its own",
    "long frames": "a touch decodes its frame from the start; going on forwards costs what is new",
    "members": "each member in its way",
}
VERIFIED = {
    "file": "size and mtime, after every read",
    "stored": "size and mtime of the archive, after every read; not the CRC-32",
    "gzip": "CRC-32 and length, before it is open",
    "deflated": "CRC-32 and length, when a first pass reaches the end",
    "zstandard": "checksums that frames have: of short frames before use, of long ones at their end",
}
"""Which content is verified when; docs/sources.md tells it in full."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire stat``."""
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="a file, a zip archive, or archive.zip!/member"
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON, one list")
    parser.add_argument(
        "--limit", type=float, default=1.0, metavar="S", help="seconds for each measurement, about (1)"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found; return 0, or 1 after saying on stderr which files could not be examined."""
    status = 0
    found = []
    for target in args.files:
        try:
            found.append(costs(target, limit_s=args.limit))
        except FAILURES as error:
            sys.stderr.write(f"quire stat: {error}\n")
            status = 1
            continue
        if not args.json:
            sys.stdout.write(report(found[-1]))
    if args.json:
        json.dump([each.as_dict() for each in found], sys.stdout, indent=2)
        sys.stdout.write("\n")
    return status


def report(found: Costs) -> str:
    """Write the findings as lines of text."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Costs) -> Iterator[str]:
    size = "content of unknown length" if found.content_bytes is None else _bytes(found.content_bytes)
    share = f" ({found.packed_bytes / found.content_bytes:.1%})" if found.content_bytes else ""
    yield f"{found.target}: {found.kind}, {size} in {_bytes(found.packed_bytes)}{share}"
    unit = "" if found.unit_bytes is None else f" ({_bytes(found.unit_bytes)})"
    yield _row("paged", PAGED[found.paged] + unit)
    if found.members is not None:
        methods = ", ".join(f"{count} {method}" for method, count in sorted(found.members.methods.items()))
        yield _row("members", f"{found.members.count}; {methods or 'all empty'}")
        yield _row("mappable", f"{found.members.mappable} are stored at a multiple of 4096")
        if found.largest is not None:
            yield ""
            yield "The largest member:"
            yield from _lines(found.largest)
        return
    if found.cached is not None:
        takes = f"takes {_time(found, 'pass_ms')}, once; then it is remembered"
        yield _row("first pass", "remembered from before" if found.cached else takes)
    yield _row("opening", _time(found, "open_ms"))
    if found.content_bytes != 0:
        if found.first_byte_ms is not None:
            yield _row("first byte", _time(found, "first_byte_ms"))
        if found.random_ms is not None:
            yield _row("random read", f"{_time(found, 'random_ms')} for 64 KiB")
        if found.forward_bytes_per_s is not None:
            yield _row("forwards", f"{found.forward_bytes_per_s / 1e6:,.0f} MB/s")
    if found.memory_bytes is not None:
        memory = f"at most {_bytes(found.memory_bytes)}, besides the pages" if found.memory_bytes else "none"
        yield _row("memory", memory)
    yield _row("verified", VERIFIED[found.kind])
    yield _row("quire pack", _gain(found))


def _gain(found: Costs) -> str:
    if found.gain is None:
        return "would gain nothing"
    needless = ", without a first pass" if found.cached is not None else ""
    size = _bytes(found.gain.output_bytes)
    return f"would take about {size}; a random read {found.gain.random_ms:.3g} ms{needless}"


def _row(label: str, text: str) -> str:
    return f"  {label:<13}{text}"


def _time(found: Costs, name: str) -> str:
    value = getattr(found, name)
    about = "about " if name in found.estimated else ""
    return f"{about}{value / 1e3:.3g} s" if value >= 1000 else f"{about}{value:.3g} ms"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
