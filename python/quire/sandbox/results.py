"""What comes out of a sandbox, as its caller sees it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from quire.closing import Closing

if TYPE_CHECKING:
    import numpy.typing as npt

    from quire.snapshot import Snapshot

__all__ = ["Result", "Usage", "allocated_bytes"]


class Usage(NamedTuple):
    """What code in a sandbox used from the moment its doors were shut."""

    peak_bytes: int
    """The most memory at one time. Without ``exact`` the resident set of the whole process."""
    cpu_seconds: float
    """Of all its threads."""
    seconds: float
    """From shut doors to the end."""
    exact: bool
    """Whether a cgroup counted and limited the memory."""


class Result(Closing):
    """What came out of a sandbox.

    Attributes:
        snapshot: What was returned, verified; None if that was None. It is this object's: ``close`` closes
            it.
        dtype: Of the array in it, as numpy writes it, such as "<f8"; "" without a snapshot.
        shape: Of the array.
        charged_bytes: Memory that the snapshot takes, for which its receiver pays from now on.
        usage: What the code used.
        stdout: What it printed: the first 64 KiB, with what is no UTF-8 replaced.
        stderr: The same of its standard error.
    """

    def __init__(
        self,
        snapshot: Snapshot | None,
        dtype: str,
        shape: tuple[int, ...],
        usage: Usage,
        stdout: str,
        stderr: str,
    ) -> None:
        self.snapshot = snapshot
        self.dtype = dtype
        self.shape = shape
        self.charged_bytes = 0 if snapshot is None else allocated_bytes(snapshot)
        self.usage = usage
        self.stdout = stdout
        self.stderr = stderr

    def array(self) -> npt.NDArray[Any]:
        """Map what was returned.

        Returns:
            A read-only array, which holds the memory by itself.

        Raises:
            ValueError: Nothing was returned, or the result is closed.
        """
        if self.snapshot is None:
            raise ValueError("the code in the sandbox returned None")
        return self.snapshot.map().array(self.dtype, self.shape)

    def close(self) -> None:
        """Close the snapshot. Idempotent; arrays stay good."""
        if self.snapshot is not None:
            self.snapshot.close()

    def __repr__(self) -> str:
        """Show what it holds."""
        held = "nothing" if self.snapshot is None else f"{self.shape} of {self.dtype}"
        return f"<quire.sandbox.Result: {held}, {self.usage}>"


def allocated_bytes(snapshot: Snapshot) -> int:
    """Memory that the layers of a snapshot take."""
    return sum(os.fstat(fd).st_blocks * 512 for fd in snapshot._core.layer_fds())
