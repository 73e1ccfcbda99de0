"""A memory limit for a child process: a cgroup of version 1 or 2, whichever the machine has."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path("/sys/fs/cgroup")


def _parents() -> Iterator[tuple[pathlib.Path, str]]:
    """Groups in which one with a limit might be made, and the name of the file that sets it."""
    for line in pathlib.Path("/proc/self/cgroup").read_text("ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            for parent in (ROOT / "memory" / path.lstrip("/"), ROOT / "memory"):
                yield parent, "memory.limit_in_bytes"
        elif not controllers:
            own = ROOT / path.lstrip("/")
            # A group of version 2 that has processes cannot have limited children, but its parents can.
            for parent in (own, *own.parents):
                if parent.is_relative_to(ROOT):
                    yield parent, "memory.max"


class Refused(Exception):  # noqa: N818
    """No cgroup with a memory limit can be made here."""


@contextlib.contextmanager
def memory_limit(limit_bytes: int) -> Iterator[str]:
    """As ``limited_group``, but skips the test where none can be made."""
    import pytest

    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(limited_group(limit_bytes))
        except Refused as refused:
            pytest.skip(str(refused))
        yield group


@contextlib.contextmanager
def limited_group(limit_bytes: int) -> Iterator[str]:
    """A new cgroup with this limit and no swap: the path of the file that a process writes its pid to.

    All its processes must have ended when the block does.

    Raises:
        Refused: None can be made here.
    """
    refusals = []
    for parent, limit in _parents():
        group = parent / f"quire-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            refusals.append(str(error))
            continue
        try:
            try:
                (group / limit).write_text(str(limit_bytes))
            except OSError as error:
                refusals.append(str(error))
                continue
            swap = group / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")
            yield str(group / "cgroup.procs")
            return
        finally:
            group.rmdir()
    raise Refused(
        "no cgroup with a memory limit can be made: " + ("; ".join(refusals) or "no memory controller")
    )
