"""Which setting would enable what is missing: the rules behind ``quire doctor``'s last section."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Advice", "advise"]

DEFAULT_MAX_MAP_COUNT = 65530
"""The kernel's own default; a mapping may use a quarter."""
FEW_DESCRIPTORS = 4096
"""A snapshot holds up to 64 descriptors, so a soft limit below this allows few dozen at worst."""

TRACKING_FEATURES = ("PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM", "WP_UNPOPULATED", "WP_ASYNC")


class Advice(NamedTuple):
    """One thing that is missing.

    Attributes:
        lacks: What quire cannot do, or does more slowly, as it is.
        setting: What to change, exactly.
    """

    lacks: str
    setting: str


def advise(
    errnos: Mapping[str, int | None],
    *,
    forced: str | None,
    max_map_count: int | None,
    overcommit_memory: int | None,
    open_files: tuple[int | None, int | None],
) -> Iterator[Advice]:
    """Yield what is missing, the most important first.

    Args:
        errnos: By name of the check: None if it works, else the errno, 0 if no system call failed.
        forced: ``QUIRE_TRACKING``.
        max_map_count: ``vm.max_map_count``, if known.
        overcommit_memory: ``vm.overcommit_memory``, if known.
        open_files: Soft and hard limit; None is unlimited.
    """
    if any(failed is not None for name, failed in errnos.items() if name.startswith("memfd.seal")):
        yield _memfd(errnos["memfd.create"])
    if forced == "compare":
        yield Advice(
            "the kernel's marks of written pages: QUIRE_TRACKING=compare is set",
            "unset QUIRE_TRACKING",
        )
    if errnos["pagemap.scan"] is not None:
        yield from _userfaultfd(errnos)
    elif errnos["userfaultfd.device"] is not None and errnos["userfaultfd.call"] is not None:
        yield Advice(
            "faults inside system calls: one that stores into a segment, as readinto does, fails with EFAULT"
            " while the segment is rearranged",
            f"{_PERMIT}, or sysctl vm.unprivileged_userfaultfd=1",
        )
    if errnos["pagemap.read"] is not None:
        yield Advice(
            "a view of its own page map: every page is compared, not only private copies",
            "mount /proc in this container, readable for this process",
        )
    if errnos["sysv"] is not None:
        yield Advice(
            'LiveSegment(backend="sysv")',
            "sysctl kernel.shmmax, kernel.shmall and kernel.shmmni, or a kernel with CONFIG_SYSVIPC",
        )
    if max_map_count is not None and max_map_count < DEFAULT_MAX_MAP_COUNT:
        yield Advice(
            f"VMAs: scattered pages are copied in once a mapping has {max_map_count // 4}",
            f"sysctl vm.max_map_count={DEFAULT_MAX_MAP_COUNT}",
        )
    if overcommit_memory == 2:
        yield Advice(
            "overcommit: a segment is charged in full when it is made, so large sparse ones are refused",
            "sysctl vm.overcommit_memory=0",
        )
    soft, hard = open_files
    if soft is not None and soft < FEW_DESCRIPTORS and (hard is None or hard > soft):
        yield Advice(
            f"descriptors: {soft} may be open, and a snapshot may hold 64",
            f"ulimit -n {FEW_DESCRIPTORS if hard is None else min(hard, FEW_DESCRIPTORS)}",
        )


_PERMIT = "read and write permission on /dev/userfaultfd (setfacl -m u:NAME:rw /dev/userfaultfd)"


def _memfd(failed: int | None) -> Advice:
    lacks = "sealed memory: no snapshot can be made here"
    if failed == errno.EPERM:
        return Advice(lacks, "allow memfd_create in the container's seccomp profile")
    return Advice(lacks, "a kernel with CONFIG_MEMFD_CREATE and CONFIG_TMPFS whose seals work")


def _userfaultfd(errnos: Mapping[str, int | None]) -> Iterator[Advice]:
    lacks = "the kernel's marks of written pages: snapshots compare pages instead, and are slower"
    device, call = errnos["userfaultfd.device"], errnos["userfaultfd.call"]
    user_mode = errnos["userfaultfd.user_mode_call"]
    if None not in {device, call, user_mode}:
        if user_mode == errno.ENOSYS and device in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
            yield Advice(
                lacks, "a kernel with CONFIG_USERFAULTFD (or a seccomp profile that allows userfaultfd)"
            )
        elif user_mode == errno.EINVAL:
            yield Advice(lacks, f"sysctl vm.unprivileged_userfaultfd=1, or {_PERMIT}")
        else:
            yield Advice(
                lacks,
                f"allow userfaultfd in the container's seccomp profile, or hand in the device (--device"
                f" /dev/userfaultfd) with {_PERMIT}",
            )
        return
    missing = [name for name in TRACKING_FEATURES if errnos[f"userfaultfd.feature.{name}"] is not None]
    if missing:
        yield Advice(lacks, f"a kernel whose userfaultfd has {', '.join(missing)} (Linux 6.7 or later)")
    else:
        yield Advice(lacks, "a kernel whose /proc/self/pagemap has PAGEMAP_SCAN (Linux 6.7 or later)")
