"""Real processes: what is in their address spaces, read from ``/proc``.

``quire.maps`` reads one; the other functions work on what it returns, or read by themselves.
"""

from quire.process.kinds import Kind, Total
from quire.process.reading import Detail, Maps, Process, maps
from quire.process.vma import VMA

__all__ = ["VMA", "Detail", "Kind", "Maps", "Process", "Total", "maps"]
