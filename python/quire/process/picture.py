"""Address spaces of real processes as data for `quire.pictures`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from quire.pictures.model import Pages, Picture, Row, Sample, Total
from quire.pictures.page import frame
from quire.pictures.still import still
from quire.process.kinds import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.process import pages
    from quire.process.reading import Maps
    from quire.process.vma import VMA

__all__ = ["bundle", "framed", "picture", "sample"]

_FIGURES = {
    "Unique": "unique",
    "Referenced": "referenced",
    "Anonymous": "anonymous",
    "May be dropped": "lazyfree",
    "Huge pages": "huge",
    "Locked": "locked",
}
"""Figures that are told of a selected mapping, beyond those that have columns."""


def picture(samples: Sequence[Maps], *, pages: bool = False) -> Picture:
    """Make a picture of what `quire.maps` read.

    Args:
        samples: Of one process, in the order in which they were read; at least one.
        pages: Look page by page, now, at what the last sample has. Blocks while the kernel reads page tables.
    """
    first, last = samples[0], samples[-1]
    command = last.process.command.decode("utf-8", "surrogateescape")
    when = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(first.process.time))
    threads = f"{last.process.threads} thread{'' if last.process.threads == 1 else 's'}"
    drawn = [sample(each, first) for each in samples]
    if pages:
        drawn[-1] = _with_pages(drawn[-1], last)
    return Picture(
        f"{command} ({last.pid})",
        tuple(drawn),
        f"process {last.pid}, {threads}, read {when}",
    )


def framed(maps: Maps) -> str:
    """Draw the page of one sample in a frame, as notebooks show HTML."""
    return frame(picture([maps], pages=True))


def bundle(maps: Maps) -> dict[str, str]:
    """Draw one sample in each form that a notebook may ask for."""
    return {"text/plain": repr(maps), "text/html": framed(maps), "image/svg+xml": still(picture([maps]))}


def sample(maps: Maps, first: Maps) -> Sample:
    """Make one sample; its time counts from when the first was read."""
    since = maps.process.monotonic - first.process.monotonic
    return Sample(
        f"{since:.2f} s",
        tuple(map(_row, maps)),
        tuple(
            Total(str(kind), 0, total.virtual, total.committed, total.resident or 0)
            for kind, total in maps.totals().items()
            if kind in (Kind.PAGE_TABLES, Kind.UNUSABLE)
        ),
        since,
        "; ".join(maps.partial),
    )


def _row(vma: VMA) -> Row:
    details = []
    if vma.inode:
        details += [
            ("Offset", f"{vma.offset:#x}"),
            ("File", f"device {vma.major:x}:{vma.minor:x}, inode {vma.inode}"),
        ]
    for label, figure in _FIGURES.items():
        if value := getattr(vma, figure):
            details.append((label, f"{value:,} bytes"))
    if vma.flags:
        details.append(("VmFlags", " ".join(vma.flags)))
    return Row(
        vma.start,
        vma.end,
        str(vma.kind),
        # As it is but for bytes that are no UTF-8, which drawers show as escapes.
        vma.name.decode("utf-8", "surrogateescape"),
        vma.protection,
        vma.committed,
        vma.resident,
        vma.proportional,
        vma.dirty,
        vma.swapped,
        tuple(details),
    )


def _with_pages(drawn: Sample, maps: Maps) -> Sample:
    """Look at the pages of each row; if the process is gone meanwhile, say so in the note."""
    try:
        rows = tuple(
            row._replace(pages=_cells(vma, found))
            for row, (vma, found) in zip(drawn.rows, maps.pages_of_all(), strict=True)
        )
    except (ProcessLookupError, PermissionError) as error:
        why = f"pages are not shown: {error.strerror}"
        return drawn._replace(note=f"{drawn.note}; {why}" if drawn.note else why)
    return drawn._replace(rows=rows)


def _cells(vma: VMA, found: pages.Pages) -> Pages:
    present = found.present
    # A page of a private file mapping that is no page of the file is a copy, made by a write. All pages of
    # anonymous memory were written once: marking them says nothing.
    copied = found.numbers[present & ~found.file] if vma.inode and vma.is_private else None
    return Pages.of(
        found.total,
        found.numbers[present],
        shared=found.numbers[present & ~found.exclusive],
        swapped=found.numbers[found.swapped],
        written=copied,
    )
