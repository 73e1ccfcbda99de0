"""Real processes: what is in their address spaces, read from ``/proc``.

``quire.maps`` reads one. ``diff`` compares two readings, ``watch`` reads again and again, ``sharing`` tells
which pages processes have in common. ``docs/maps.md`` has examples and limits.
"""

from quire.process.changes import Change, Difference, diff, watch
from quire.process.kinds import Kind, Total
from quire.process.pages import Pages
from quire.process.reading import Detail, Maps, Process, maps
from quire.process.shared import Shared, Sharing, sharing
from quire.process.vma import VMA

__all__ = [
    "VMA",
    "Change",
    "Detail",
    "Difference",
    "Kind",
    "Maps",
    "Pages",
    "Process",
    "Shared",
    "Sharing",
    "Total",
    "diff",
    "maps",
    "sharing",
    "watch",
]
