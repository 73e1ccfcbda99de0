"""``quire doctor``: print what `capabilities` found. Plain text, needs nothing but the library."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from quire.capabilities import REQUIRED, Capabilities, Cgroup, capabilities

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

__all__ = ["add_arguments", "report", "run"]

SECTIONS: dict[str, dict[str, str]] = {
    "Sealed memory": {
        "memfd.create": "make a memory file",
        "memfd.seal_seal": "no seal can be added after F_SEAL_SEAL",
        "memfd.seal_shrink": "F_SEAL_SHRINK stops ftruncate",
        "memfd.seal_grow": "F_SEAL_GROW stops ftruncate",
        "memfd.seal_write": "F_SEAL_WRITE stops write and writable mappings",
        "memfd.seal_write_is_exclusive": "F_SEAL_WRITE waits for writable mappings to go (EBUSY)",
        "memfd.seal_future_write": "F_SEAL_FUTURE_WRITE leaves the owner's mapping alone (LiveSegment)",
        "memfd.private_mapping": "private mappings copy on write",
        "memfd.shared_read_mapping": "sealed memory can be mapped shared, read-only",
    },
    "userfaultfd": {
        "userfaultfd.device": "by /dev/userfaultfd",
        "userfaultfd.call": "by the system call",
        "userfaultfd.user_mode_call": "by the system call, for faults in user mode",
        "userfaultfd.feature.PAGEFAULT_FLAG_WP": "write protection (tracking)",
        "userfaultfd.feature.WP_HUGETLBFS_SHMEM": "on mapped memfds (tracking)",
        "userfaultfd.feature.WP_UNPOPULATED": "on pages not touched yet (tracking)",
        "userfaultfd.feature.WP_ASYNC": "the kernel marks written pages by itself (tracking)",
        "userfaultfd.feature.MISSING_SHMEM": "missing pages of memfds (holding writers)",
        "userfaultfd.feature.EVENT_FORK": "tell of forks (privileged; not needed)",
        "userfaultfd.feature.EVENT_REMAP": "tell of mremap (not needed)",
        "userfaultfd.feature.SIGBUS": "a signal in place of a wait (regions)",
        "userfaultfd.feature.MINOR_SHMEM": "minor faults of memfds (regions)",
        "userfaultfd.feature.EXACT_ADDRESS": "faults report the exact address (regions)",
        "userfaultfd.feature.POISON": "make a page fail instead of hang (regions)",
        "userfaultfd.feature.MOVE": "move pages instead of copying (not needed)",
        "userfaultfd.hold": "hold writers of a private mapping",
    },
    "Other": {
        "pagemap.read": "see private copies in /proc/self/pagemap",
        "pagemap.scan": "PAGEMAP_SCAN finds exactly the page that was written",
        "sysv": "System V shared memory, attached twice",
        "madv_free": "MADV_FREE (regions)",
    },
    "Regions": {
        "region.missing": "fill missing pages of private memory and memfds",
        "region.kernel_faults": "those that a system call touches, too",
        "region.sigbus": "the same with a signal in place of a wait",
        "region.poison": "make touches of a page fail",
    },
}

TRACKING = {
    "userfaultfd": "userfaultfd: the kernel marks them, PAGEMAP_SCAN reads the marks",
    "compare": "compare: private copies are compared with the last version (slower)",
}
FAULTS = {
    "thread": "thread: userfaultfd, filled by threads of the pager",
    "sigsegv": "sigsegv: memory is protected, and filled in a signal handler",
}
HOLDING = {
    "userfaultfd": "userfaultfd: they sleep in the kernel",
    "sigsegv": "sigsegv: they wait in a signal handler",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``quire doctor``."""
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 0 if quire works here, 1 if it cannot."""
    found = capabilities()
    if args.json:
        json.dump(found.as_dict(), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(report(found))
    return 0 if found.usable() else 1


def report(found: Capabilities) -> str:
    """Write the findings as text of at most about 110 columns."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Capabilities) -> Iterator[str]:
    yield f"Linux {found.kernel}, user id {os.geteuid()}"
    yield ""
    if found.usable():
        yield "quire works here. It uses, for"
    else:
        yield "quire cannot work here; see the lines marked NO. It would use, for"
    yield f"  finding written pages   {TRACKING[found.uses.tracking]}"
    yield f"  holding writers         {HOLDING[found.uses.holding]}"
    yield f"  filling regions         {FAULTS.get(found.uses.faults, found.uses.faults)}"
    if found.uses.forced is not None:
        yield f"  QUIRE_TRACKING={found.uses.forced} is set in the environment"
    for title, names in SECTIONS.items():
        yield ""
        yield title
        for name, purpose in names.items():
            check = found.checks[name]
            mark = "yes" if check else "NO" if name in REQUIRED else "no"
            yield f"  {mark:<4}{name.removeprefix('userfaultfd.feature.'):<30}  {purpose}"
            if not check:
                yield f"      {check.message}"
    yield ""
    yield "Limits"
    yield from _limits(found)
    yield ""
    if found.advice:
        yield "Missing, and what would enable it"
        for advice in found.advice:
            yield f"  - {advice.lacks}"
            yield f"    -> {advice.setting}"
    else:
        yield "Nothing that quire uses is missing."


def _limits(found: Capabilities) -> Iterator[str]:
    limits = found.limits
    for name, value in {
        "vm.max_map_count": limits.max_map_count,
        "vm.overcommit_memory": limits.overcommit_memory,
        "vm.unprivileged_userfaultfd": limits.unprivileged_userfaultfd,
        "shmem huge pages": limits.shmem_huge_pages,
    }.items():
        yield f"  {name:<28}{'unknown' if value is None else value}"
    yield f"  {'cgroup memory':<28}{_cgroup(limits.cgroup)}"
    soft, hard = (("unlimited" if limit is None else str(limit)) for limit in limits.open_files)
    yield f"  {'open files':<28}{soft} (hard limit {hard})"
    for name, bounds in {
        "address space": limits.address_space_bytes,
        "locked memory": limits.locked_memory_bytes,
    }.items():
        yield f"  {name:<28}{_bytes(bounds[0])} (hard limit {_bytes(bounds[1])})"


def _cgroup(cgroup: Cgroup | None) -> str:
    if cgroup is None:
        return "no memory controller to be seen"
    used = "use unknown" if cgroup.current_bytes is None else f"{_bytes(cgroup.current_bytes)} in use"
    return f"{_bytes(cgroup.limit_bytes)}, {used} (v{cgroup.version}, {cgroup.path})"


def _bytes(count: int | None) -> str:
    if count is None:
        return "unlimited"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
