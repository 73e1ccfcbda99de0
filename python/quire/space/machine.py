"""What the address spaces of one machine share: charge and frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.space.rules import Rules


class Machine:
    """The memory that several spaces are charged to.

    Attributes:
        rules: Which say how much may be charged.
        leaked_pages: Charged, and by a bug of the kernel never given back.
        committed_pages: Charged now, by all spaces and by shared anonymous memory.
    """

    __slots__ = ("committed_pages", "leaked_pages", "rules")

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.committed_pages = 0
        self.leaked_pages = 0

    def charge(self, pages: int) -> bool:
        """Charge pages if the rules allow it; return whether they were."""
        rules = self.rules
        if rules.overcommit == "heuristic":
            if pages > rules.memory_pages:
                return False
        elif rules.overcommit == "never" and self.committed_pages + pages > rules.commit_limit_pages:
            return False
        self.committed_pages += pages
        return True

    def uncharge(self, pages: int) -> None:
        """Give charged pages back."""
        self.committed_pages -= pages
