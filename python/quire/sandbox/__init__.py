"""Running code that nobody trusts on snapshots: no files, no network, no other processes, bounded memory.

``run`` starts a process, hands it snapshots as read-only arrays, shuts its doors, lets it compute, and takes
back one snapshot, verified. ``docs/sandbox.md`` says how, and what is not defended.
"""

from quire.sandbox.results import Result, Usage
from quire.sandbox.running import run

__all__ = ["Result", "Usage", "run"]
