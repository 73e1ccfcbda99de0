"""What a call did, and how it failed."""

import errno
import os
from typing import NamedTuple


class Change(NamedTuple):
    """One thing that happened to a VMA.

    Attributes:
        kind: ``created``, ``removed``, ``split``, ``merged``, ``extended``, ``truncated``, ``moved``,
            ``changed`` (its flags), ``grown`` (a stack).
        start: First address concerned.
        end: Address after the last.
        detail: More of it, for people.
    """

    kind: str
    start: int
    end: int
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.kind} {self.start:#x}-{self.end:#x}"
        return f"{text}: {self.detail}" if self.detail else text


class Outcome:
    """What a call returned and did.

    Attributes:
        value: What the kernel's call returns: an address for ``mmap``, ``mremap`` and ``brk``, else 0.
        changes: What happened to VMAs, in order.
        why_not: Sentences that say why neighbours did not merge; empty unless the space explains.
    """

    __slots__ = ("changes", "value", "why_not")

    def __init__(self, value: int, changes: list[Change], why_not: list[str]) -> None:
        self.value = value
        self.changes = changes
        self.why_not = why_not

    def kinds(self) -> list[str]:
        """Name the changes in short."""
        return [change.kind for change in self.changes]

    def __repr__(self) -> str:
        parts = [f"{self.value:#x}", *map(str, self.changes), *self.why_not]
        return f"<Outcome {'; '.join(parts)}>"


class CallError(OSError):
    """A call failed with the kernel's errno.

    Attributes:
        changes: What it had done before it failed, and left so.
        why_not: As in `Outcome`.
    """

    def __init__(self, number: int, call: str, why: str) -> None:
        super().__init__(number, f"{call}: {why} ({errno.errorcode[number]}, {os.strerror(number)})")
        self.call = call
        self.changes: list[Change] = []
        self.why_not: list[str] = []
