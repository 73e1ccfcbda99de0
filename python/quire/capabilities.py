"""What this machine and user can do, what quire therefore uses, and which settings would enable more.

Kernel facilities are tried, never guessed from a version. The names of the checks are explained in
``docs/kernel.md``; ``quire doctor`` prints all of this.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quire import _native
from quire.advice import Advice, advise

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Capabilities", "Cgroup", "Check", "Limits", "Uses", "capabilities"]


class Check(NamedTuple):
    """Whether one thing works; true if it does.

    Attributes:
        works: It did what quire relies on.
        errno: Of the system call that failed; 0 if it works, or if no call failed but the effect was missing.
        message: What failed; empty if it works.
    """

    works: bool
    errno: int
    message: str

    def __bool__(self) -> bool:
        return self.works


class Uses(NamedTuple):
    """What quire uses in this process.

    Attributes:
        tracking: How written pages are found. ``userfaultfd``: the kernel marks them. ``compare``: private
            copies are compared with the last version; the same results, slower.
        holding: How other threads' stores wait while memory is rearranged: they sleep in the kernel
            (``userfaultfd``) or in a signal handler (``sigsegv``).
        forced: The value of the environment variable ``QUIRE_TRACKING``, or None. ``compare`` forces the
            fallback; it is read when the process first makes a segment or asks for capabilities.
        faults: How ``faults="auto"`` notices touches of a region: ``thread`` (userfaultfd), ``sigsegv``, or
            what the environment variable ``QUIRE_FAULTS`` names.
    """

    tracking: Literal["userfaultfd", "compare"]
    holding: Literal["userfaultfd", "sigsegv"]
    forced: str | None
    faults: str


class Cgroup(NamedTuple):
    """The memory limit that binds first, of this process's cgroup and those above it.

    Attributes:
        version: 1 or 2.
        path: Folder of the cgroup that sets the limit; the process's own one where none does.
        limit_bytes: None if there is no limit.
        current_bytes: What is charged to it now, page cache included; None if unreadable.
    """

    version: Literal[1, 2]
    path: str
    limit_bytes: int | None
    current_bytes: int | None


class Limits(NamedTuple):
    """Settings that bound what quire can do. None: unlimited for a resource, unknown for a setting.

    Attributes:
        max_map_count: ``vm.max_map_count``, VMAs a process.
        overcommit_memory: ``vm.overcommit_memory``, 0 to 2.
        unprivileged_userfaultfd: ``vm.unprivileged_userfaultfd``, 0 or 1.
        shmem_huge_pages: The choice in ``transparent_hugepage/shmem_enabled``, which memfds follow.
        cgroup: The memory cgroup, or None if there is none to be seen.
        open_files: Soft and hard ``RLIMIT_NOFILE``, descriptors.
        address_space_bytes: Soft and hard ``RLIMIT_AS``.
        locked_memory_bytes: Soft and hard ``RLIMIT_MEMLOCK``.
    """

    max_map_count: int | None
    overcommit_memory: int | None
    unprivileged_userfaultfd: int | None
    shmem_huge_pages: str | None
    cgroup: Cgroup | None
    open_files: tuple[int | None, int | None]
    address_space_bytes: tuple[int | None, int | None]
    locked_memory_bytes: tuple[int | None, int | None]


class Capabilities(NamedTuple):
    """The answer of `capabilities`.

    Attributes:
        kernel: The release, for bug reports; nothing is concluded from it.
        checks: Each thing that was tried, by its dotted name.
        uses: What quire uses in this process.
        limits: Settings and resource limits.
        advice: What is missing, and the setting that would enable it.
    """

    kernel: str
    checks: Mapping[str, Check]
    uses: Uses
    limits: Limits
    advice: tuple[Advice, ...]

    def usable(self) -> bool:
        """Tell whether everything that quire cannot do without works."""
        return all(self.checks[name] for name in REQUIRED)

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain dicts, lists, strings and numbers, for JSON."""
        plain: dict[str, Any] = _plain(self)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value


FAULTS_OVERRIDE = "QUIRE_FAULTS"
"""The environment variable that chooses for ``faults="auto"`` of a region."""

REQUIRED = (
    "memfd.create",
    "memfd.seal_seal",
    "memfd.seal_shrink",
    "memfd.seal_grow",
    "memfd.seal_write",
    "memfd.seal_write_is_exclusive",
    "memfd.private_mapping",
)
"""The checks without which no snapshot can be made or verified."""


def capabilities() -> Capabilities:
    """Try what this kernel and user can do. Takes a few milliseconds; nothing is cached.

    Returns:
        Everything found, with advice.

    Raises:
        OSError: ``/proc`` cannot be read.
    """
    found = _native.probe()
    checks = {name: _check(failure) for name, failure in found["checks"].items()}
    marked: bool = found["marked"]
    uses = Uses(
        tracking="userfaultfd" if marked else "compare",
        holding="userfaultfd" if marked else "sigsegv",
        forced=found["tracking_override"],
        faults=os.environ.get(FAULTS_OVERRIDE, "thread" if checks["region.missing"] else "sigsegv"),
    )
    limits = read_limits()
    errnos = {name: None if check else check.errno for name, check in checks.items()}
    return Capabilities(
        kernel=os.uname().release,
        checks=checks,
        uses=uses,
        limits=limits,
        advice=tuple(
            advise(
                errnos,
                forced=uses.forced,
                max_map_count=limits.max_map_count,
                overcommit_memory=limits.overcommit_memory,
                open_files=limits.open_files,
            )
        ),
    )


def _check(failure: tuple[int, str] | None) -> Check:
    if failure is None:
        return Check(works=True, errno=0, message="")
    errno, message = failure
    return Check(works=False, errno=errno, message=message)


def read_limits() -> Limits:
    """Read the settings and resource limits of this machine and process."""
    return Limits(
        max_map_count=_setting("/proc/sys/vm/max_map_count"),
        overcommit_memory=_setting("/proc/sys/vm/overcommit_memory"),
        unprivileged_userfaultfd=_setting("/proc/sys/vm/unprivileged_userfaultfd"),
        shmem_huge_pages=_chosen(_text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        cgroup=find_cgroup(),
        open_files=_bounds(resource.RLIMIT_NOFILE),
        address_space_bytes=_bounds(resource.RLIMIT_AS),
        locked_memory_bytes=_bounds(resource.RLIMIT_MEMLOCK),
    )


def _text(path: str) -> str | None:
    """Read a kernel file; None where this kernel or container does not show it."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return None


def _setting(path: str) -> int | None:
    text = _text(path)
    return None if text is None else int(text)


def _chosen(text: str | None) -> str | None:
    """Find the choice in a line like ``always [never] force``."""
    return None if text is None else text.partition("[")[2].partition("]")[0]


def _bounds(which: int) -> tuple[int | None, int | None]:
    soft, hard = (None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(which))
    return soft, hard


_FILES: dict[Literal[1, 2], tuple[str, str]] = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
}
_UNLIMITED_BYTES = 1 << 62
"""Version 1 says "no limit" with a number about as large as there is."""


def find_cgroup(proc: str = "/proc/self") -> Cgroup | None:
    """Find the memory limit that binds first.

    Args:
        proc: The folder of the process, of which ``cgroup`` and ``mountinfo`` are read.

    Returns:
        None if no memory controller can be seen.
    """
    mounts = _cgroup_mounts(_text(f"{proc}/mountinfo") or "")
    found: list[Cgroup] = []
    for line in (_text(f"{proc}/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        version: Literal[1, 2] = 1 if controllers else 2
        if version in mounts and (version == 2 or "memory" in controllers.split(",")):
            root, folder = mounts[version]
            found += _cgroups_above(version, root, folder, path)
    limited = [cgroup for cgroup in found if cgroup.limit_bytes is not None]
    return min(limited, key=lambda cgroup: cgroup.limit_bytes or 0) if limited else next(iter(found), None)


def _cgroup_mounts(mountinfo: str) -> dict[int, tuple[str, str]]:
    """Map the version to the cgroup at the mount's root and where it is mounted."""
    mounts: dict[int, tuple[str, str]] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, folder = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2":
            mounts[2] = (root, folder)
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts[1] = (root, folder)
    return mounts


def _cgroups_above(version: Literal[1, 2], root: str, folder: str, path: str) -> list[Cgroup]:
    """List the process's cgroup and its ancestors, as far as they are mounted here."""
    inside = path.removeprefix(root.rstrip("/")).strip("/").split("/")
    limit_file, current_file = _FILES[version]
    found = []
    for depth in range(len(inside), -1, -1):
        place = "/".join([folder, *inside[:depth]]).rstrip("/")
        limit, current = _text(f"{place}/{limit_file}"), _text(f"{place}/{current_file}")
        if limit is None and current is None:
            continue
        limit_bytes = None if limit is None or limit == "max" else int(limit)
        if limit_bytes is not None and limit_bytes >= _UNLIMITED_BYTES:
            limit_bytes = None
        found.append(Cgroup(version, place, limit_bytes, None if current is None else int(current)))
    return found
