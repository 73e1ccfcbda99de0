"""Banks: nested accounts of bytes, objects and descriptors. No charge passes a limit, not for a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quire.errors import QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["NOTHING", "UNLIMITED", "Amount", "Bank"]


class Amount(NamedTuple):
    """What is charged, or may be."""

    bytes: int
    objects: int = 0
    descriptors: int = 0

    def plus(self, other: Amount) -> Amount:
        """Add."""
        return Amount(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Amount) -> Amount:
        """Subtract."""
        return Amount(*(a - b for a, b in zip(self, other, strict=True)))


NOTHING = Amount(0)
UNLIMITED = Amount(2**63 - 1, 2**63 - 1, 2**63 - 1)
MAX_DEPTH = 16


class Bank:
    """An account. What is charged to it is charged to every bank above it as well.

    Only the broker's event loop touches banks, so a check and the charge that follows it are one step.
    """

    kind = "bank"

    def __init__(self, number: int, limit: Amount, parent: Bank | None = None, name: str = "") -> None:
        """Open an account.

        Args:
            number: Names it in the journal.
            limit: The most that may be charged to it and all banks below it.
            parent: The bank above; None for the root.
            name: For people; home banks are found by it again.

        Raises:
            QuotaExceeded: Too many banks stand above it.
        """
        self.number = number
        self.limit = limit
        self.parent = parent
        self.name = name
        self.used = NOTHING
        self.children: set[Bank] = set()
        self.references = 0
        self.dead = False
        if parent is not None:
            if sum(1 for _ in parent.line()) >= MAX_DEPTH:
                raise QuotaExceeded(f"banks nest {MAX_DEPTH} deep at most")
            parent.children.add(self)

    def line(self) -> Iterator[Bank]:
        """This bank, its parent, and so on up to the root."""
        bank: Bank | None = self
        while bank is not None:
            yield bank
            bank = bank.parent

    def below(self) -> Iterator[Bank]:
        """This bank and every one below it, parents first."""
        yield self
        for child in self.children:
            yield from child.below()

    def charge(self, amount: Amount) -> None:
        """Charge this bank and all above it, or none.

        Raises:
            QuotaExceeded: One of them has too little left; the message names it by its number.
        """
        self._charge(amount, set())

    def discharge(self, amount: Amount) -> None:
        """Take a charge back."""
        for bank in self.line():
            bank.used = bank.used.minus(amount)
            assert min(bank.used) >= 0, f"bank {bank.number} was given back more than it paid"

    def transfer(self, amount: Amount, to: Bank) -> None:
        """Move a charge to another bank; banks above both see no change.

        Raises:
            QuotaExceeded: One of the banks that would pay has too little left; nothing was moved.
        """
        common = set(self.line()) & set(to.line())
        to._charge(amount, common)
        for bank in self.line():
            if bank not in common:
                bank.used = bank.used.minus(amount)

    def _charge(self, amount: Amount, but: set[Bank]) -> None:
        payers = [bank for bank in self.line() if bank not in but]
        for bank in payers:
            if bank.dead:
                raise QuotaExceeded(f"bank {bank.number} was destroyed")
            for what, used, more, limit in zip(Amount._fields, bank.used, amount, bank.limit, strict=True):
                if used + more > limit:
                    raise QuotaExceeded(
                        f"bank {bank.number} has {limit - used} {what} left of {limit}, {more} are needed"
                    )
        for bank in payers:
            bank.used = bank.used.plus(amount)

    def detach(self) -> None:
        """Take it out of the tree; it must be empty."""
        assert self.used == NOTHING, f"bank {self.number} still pays for {self.used}"
        assert not self.children
        self.dead = True
        if self.parent is not None:
            self.parent.children.discard(self)
