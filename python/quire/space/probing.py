"""The rules of the running kernel, found out by doing."""

from __future__ import annotations

import errno
import functools
import os
import resource
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from quire._native import PAGE_SIZE
from quire.space.constants import (
    MADV_GUARD_INSTALL,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_GROWSDOWN,
    MAP_PRIVATE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
)
from quire.space.native import FD_MAPS, FD_SMAPS, FD_ZERO, CallList
from quire.space.rules import Overcommit, Rules

if TYPE_CHECKING:
    from collections.abc import Callable

# Where things are tried: far from what the kernel places by itself.
_AT = 0x1000_0000_0000 if PAGE_SIZE == 4096 else 0x40_0000_0000
_PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS
_NO_FILE = (1 << 64) - 1
_RW = PROT_READ | PROT_WRITE
_CHUNKS = 24
_MODES: tuple[Overcommit, ...] = ("heuristic", "always", "never")
_lock = threading.Lock()


@functools.cache
def running_rules() -> Rules:
    """Return the rules of the running kernel.

    Blocks for a few milliseconds when it is first called: an emptied child process tries what kernels differ
    in. Sizes and limits are read from /proc. Where a process of this machine cannot be emptied (an
    architecture that is not known, a filter of system calls), `quire.Unsupported` or OSError is raised; give
    the model `Rules` then.
    """
    with _lock, CallList() as calls:
        return _Probe(calls).rules()


def _setting(name: str) -> int:
    return int(Path("/proc/sys/vm", name).read_text("ascii"))


def _memory_pages(*names: str) -> int:
    sizes = {}
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0])
    return sum(sizes[name] for name in names) * 1024 // PAGE_SIZE


class _Probe:
    """Programs of a few calls, each in a fresh process."""

    def __init__(self, calls: CallList) -> None:
        self.calls = calls
        self.file = os.memfd_create("quire-probe")
        os.ftruncate(self.file, 16 * PAGE_SIZE)

    def rules(self) -> Rules:
        try:
            base = self.run(lambda: self.map(0, PAGE_SIZE)) + PAGE_SIZE
            huge = self.huge_page()
            limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
            return Rules(
                task_size=self.task_size(),
                mmap_base=base,
                legacy_base=Rules.legacy_base,
                brk_start=self.calls.brk_start,
                min_address=max(_setting("mmap_min_addr"), PAGE_SIZE),
                stack_guard_gap_pages=self.guard_gap(),
                stack_limit_bytes=None if limit == resource.RLIM_INFINITY else limit,
                max_map_count=_setting("max_map_count"),
                huge_page_bytes=huge,
                align_any_huge=bool(huge) and self.aligned(huge, huge + PAGE_SIZE),
                merge_into_unfaulted=self.merges_into_unfaulted(),
                move_many=self.moves_many(),
                check_before_unmap=self.checks_before_unmap(),
                dontunmap_drops_account=self.dontunmap_drops_account(),
                shrinking_move_charges=self.shrinking_move_charges(),
                uncharge_unfaulted=self.uncharges_unfaulted(),
                guard_any=self.run(lambda: self.guard(PROT_READ)) == 0,
                guard_flag=self.guard_flag(),
                execute_only=self.execute_only(),
                fault_around_pages=self.fault_around(),
                overcommit=_MODES[_setting("overcommit_memory")],
                memory_pages=_memory_pages("MemTotal", "SwapTotal"),
                commit_limit_pages=_memory_pages("CommitLimit"),
            )
        finally:
            os.close(self.file)

    def run(self, build: Callable[[], int]) -> int:
        """Build a program whose last record is the one asked about; return what that call returned."""
        self.calls.begin(1, [self.file])
        record = build()
        self.calls.run()
        return self.calls.result(record)

    def text(self, fd: int, build: Callable[[], object]) -> bytes:
        """Build a program; return what a file of /proc says after it."""
        self.calls.begin(1, [self.file])
        build()
        read = self.calls.read_all(fd, _CHUNKS)
        self.calls.run()
        return self.calls.text(*read)

    def map(self, address: int, length: int, prot: int = _RW, flags: int = _PRIVATE) -> int:
        return self.calls.call("mmap", address, length, prot, flags, _NO_FILE, 0)

    def fixed(self, page: int, pages: int, prot: int = _RW) -> int:
        return self.map(_AT + page * PAGE_SIZE, pages * PAGE_SIZE, prot, _PRIVATE | MAP_FIXED)

    def write(self, page: int) -> int:
        return self.calls.call("read", FD_ZERO, _AT + page * PAGE_SIZE, 1)

    def guard(self, prot: int) -> int:
        self.fixed(0, 1, prot)
        return self.calls.call("madvise", _AT, PAGE_SIZE, MADV_GUARD_INSTALL)

    def move(self, page: int, pages: int, to: int, flags: int = MREMAP_MAYMOVE | MREMAP_FIXED) -> int:
        size = pages * PAGE_SIZE
        return self.calls.call("mremap", _AT + page * PAGE_SIZE, size, size, flags, _AT + to * PAGE_SIZE)

    def lines(self, text: bytes) -> list[bytes]:
        """Lines of a map that are about where things are tried."""
        return [line for line in text.splitlines() if self.is_ours(line)]

    @staticmethod
    def is_ours(line: bytes) -> bool:
        start, dash, _ = line.partition(b" ")[0].partition(b"-")
        return bool(dash) and _AT <= int(start, 16) < _AT + (1 << 30)

    def flags(self, text: bytes) -> list[bytes]:
        """Return the VmFlags of the first of them."""
        lines = text.splitlines()
        first = next(index for index, line in enumerate(lines) if self.is_ours(line))
        return next(line for line in lines[first:] if line.startswith(b"VmFlags:")).split()[1:]

    def task_size(self) -> int:
        """Return the address after the last that can be used: a power of two, or a page less than one."""
        ends = [end for bits in range(36, 57) for end in ((1 << bits) - PAGE_SIZE, 1 << bits)]
        self.calls.begin(1, [])
        # Unmapping what is free succeeds inside the space, and is EINVAL beyond it.
        tried = [self.calls.call("munmap", end - PAGE_SIZE, PAGE_SIZE) for end in ends]
        self.calls.run()
        return max(end for end, record in zip(ends, tried, strict=True) if self.calls.result(record) == 0)

    def guard_gap(self) -> int:
        """Return how many pages must be free below a stack: the smallest number with which one grows."""
        gaps = (0, 1, 16, 64, 128, 255, 256, 257, 512, 1024)
        self.calls.begin(1, [])
        grown = []
        for number, gap in enumerate(gaps):
            stack = (number + 1) << 12
            self.fixed(stack - gap - 2, 1)
            self.map(_AT + stack * PAGE_SIZE, PAGE_SIZE, _RW, _PRIVATE | MAP_FIXED | MAP_GROWSDOWN)
            grown.append(self.write(stack - 1))
        self.calls.run()
        able = [gap for gap, record in zip(gaps, grown, strict=True) if self.calls.result(record) == 1]
        return min(able, default=Rules.stack_guard_gap_pages)

    def huge_page(self) -> int:
        path = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
        size = int(path.read_text("ascii")) if path.exists() else 0
        return size if size and self.aligned(size, size) else 0

    def aligned(self, huge: int, length: int) -> bool:
        """Whether a second mapping of a length is aligned, below one of a single page."""

        def build() -> int:
            self.map(0, PAGE_SIZE)
            return self.map(0, length)

        return self.run(build) % huge == 0

    def merges_into_unfaulted(self) -> bool:
        def build() -> None:
            self.fixed(0, 1, PROT_READ)
            self.fixed(1, 1)
            self.write(1)
            self.calls.call("mprotect", _AT, PAGE_SIZE, _RW)
            self.calls.call("mprotect", _AT, PAGE_SIZE, PROT_READ | PROT_EXEC)
            self.calls.call("mprotect", _AT + PAGE_SIZE, PAGE_SIZE, PROT_READ | PROT_EXEC)

        # The faulted page is the one that changes and the untouched one the neighbour it could join.
        return len(self.lines(self.text(FD_MAPS, build))) == 1

    def moves_many(self) -> bool:
        def build() -> int:
            self.fixed(0, 1)
            self.fixed(1, 1, PROT_READ)
            return self.move(0, 2, 8)

        return self.run(build) > 0

    def checks_before_unmap(self) -> bool:
        """Whether a move that cannot be, of more than one VMA has, leaves the target as it was."""

        def build() -> None:
            self.fixed(0, 1)
            self.fixed(8, 2, PROT_READ)
            size = 2 * PAGE_SIZE
            self.calls.call("mremap", _AT, 2 * size, size * 4, 3, _AT + 8 * PAGE_SIZE)

        return len(self.lines(self.text(FD_MAPS, build))) == 2

    def dontunmap_drops_account(self) -> bool:
        def build() -> None:
            self.fixed(0, 1)
            self.write(0)
            self.move(0, 1, 8, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP)

        return b"ac" not in self.flags(self.text(FD_SMAPS, build))

    def shrinking_move_charges(self) -> bool:
        """Whether a move to fewer pages fails for the many there were; not seen if every charge succeeds."""

        def build() -> int:
            self.fixed(0, 1)
            return self.calls.call("mremap", _AT, 1 << 45, PAGE_SIZE, 3, _AT + (1 << 46))

        return self.run(build) == -errno.ENOMEM

    def uncharges_unfaulted(self) -> bool:
        def build() -> None:
            self.fixed(0, 1)
            self.calls.call("mprotect", _AT, PAGE_SIZE, PROT_READ)

        return b"ac" not in self.flags(self.text(FD_SMAPS, build))

    def guard_flag(self) -> bool:
        return b"gu" in self.flags(self.text(FD_SMAPS, lambda: self.guard(_RW)))

    def execute_only(self) -> bool:
        def build() -> int:
            self.fixed(0, 1, PROT_EXEC)
            return self.calls.call("pwrite64", self.calls.scratch, _AT, 1, 0)

        return self.run(build) == -errno.EFAULT

    def fault_around(self) -> int:
        """Return how many pages of a file in the page cache one read maps; 1 if the kernel does not tell."""
        os.pwrite(self.file, bytes(16 * PAGE_SIZE), 0)
        kept = self.calls.begin(1, [self.file])[0]
        self.calls.call("mmap", _AT, 16 * PAGE_SIZE, PROT_READ, MAP_PRIVATE | MAP_FIXED, kept, 0)
        self.calls.call("pwrite64", self.calls.scratch, _AT, 1, 0)
        read = self.calls.read_all(FD_SMAPS, _CHUNKS)
        self.calls.run()
        lines = self.calls.text(*read).splitlines()
        first = next(index for index, line in enumerate(lines) if self.is_ours(line))
        resident = next(line for line in lines[first:] if line.startswith(b"Rss:"))
        return max(1, int(resident.split()[1]) * 1024 // PAGE_SIZE)
