"""What one address space holds, and what all calls on it share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from quire.space.constants import PAGE_SHIFT, VM_ACCOUNT
from quire.space.machine import Machine
from quire.space.outcome import CallError, Change, Outcome
from quire.space.pages import PageTable
from quire.space.tree import VMATree
from quire.space.vma import VMA, unlink_chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quire.space.rules import Rules


class State:
    """The VMAs, the page table and the heap of one space.

    Attributes:
        rules: Of the kernel.
        machine: Which the space shares with its forks.
        tree: The VMAs.
        table: The page table.
        brk_start: Where the heap begins.
        brk_now: Its end, not aligned.
        explains: Whether ``why_not`` is filled.
        changes: What the call under way has done.
        why_not: Why neighbours did not merge in it.
    """

    def __init__(self, rules: Rules, machine: Machine | None = None) -> None:
        self.rules = rules
        self.machine = machine or Machine(rules)
        self.tree = VMATree()
        self.table = PageTable()
        self.brk_start = self.brk_now = rules.brk_start
        self.explains = False
        self.changes: list[Change] = []
        self.why_not: list[str] = []

    def call(self, work: Callable[[], int]) -> Outcome:
        """Run a call, collecting what it does; a failure takes what was done with it."""
        changes = self.changes = []
        why_not = self.why_not = []
        try:
            value = work()
        except CallError as error:
            error.changes = changes
            error.why_not = why_not
            raise
        return Outcome(value, changes, why_not)

    def may_split(self) -> bool:
        """Whether one VMA more is allowed."""
        return self.tree.count < self.rules.max_map_count

    def drop_file(self, vma: VMA) -> None:
        """Note that a VMA of a file is gone; the last of shared anonymous memory gives its charge back."""
        file = vma.file
        if file is not None:
            file.mappings -= 1
            if not file.mappings and file.charged_pages:
                self.machine.uncharge(file.charged_pages)
                file.charged_pages = 0

    def discard(self, vma: VMA) -> None:
        """Take a whole VMA away with its pages and its charge."""
        self.changes.append(Change("removed", vma.start, vma.end, vma.protection))
        self.tree.remove(vma)
        self.table.zap(vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT)
        if vma.flags & VM_ACCOUNT:
            self.machine.uncharge((vma.end - vma.start) >> PAGE_SHIFT)
        if vma.chain:
            unlink_chain(vma)
        self.drop_file(vma)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """While it lasts, outcomes say why neighbours did not merge."""
        before, self.explains = self.explains, True
        try:
            yield
        finally:
            self.explains = before
