"""The VMA, the file behind it, and the anon_vma that says which pages were faulted in which lineage."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from quire.space.constants import (
    PAGE_SHIFT,
    VM_EXEC,
    VM_MAYSHARE,
    VM_READ,
    VM_WRITE,
    flag_names,
)

if TYPE_CHECKING:
    from quire.space.pages import Frame

_numbers = itertools.count(1)

_SHOWN = VM_READ | VM_WRITE | VM_EXEC | VM_MAYSHARE
PROTECTIONS = {
    flags: ("r" if flags & VM_READ else "-")
    + ("w" if flags & VM_WRITE else "-")
    + ("x" if flags & VM_EXEC else "-")
    + ("s" if flags & VM_MAYSHARE else "p")
    for flags in range(_SHOWN + 1)
    if not flags & ~_SHOWN
}


class File:
    """A file that can be mapped, with its page cache.

    Args:
        name: Path, as a map shows it.
        size_bytes: Its size; a touch beyond the last page of it is SIGBUS.
        writable: Whether it was opened for reading and writing, or for reading only.
        in_memory: Whether it lives in memory (a memfd, tmpfs). Pages of other files are read from a device: a
            major fault.
        device: Major and minor number, as a map shows it.
        inode: As a map shows it; a new number by default.
    """

    __slots__ = (
        "cache",
        "charged_pages",
        "device",
        "in_memory",
        "inode",
        "mappings",
        "name",
        "size_bytes",
        "writable",
    )

    def __init__(
        self,
        name: str = "",
        size_bytes: int = 0,
        *,
        writable: bool = True,
        in_memory: bool = False,
        device: tuple[int, int] = (0, 1),
        inode: int | None = None,
    ) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.writable = writable
        self.in_memory = in_memory
        self.device = device
        self.inode = next(_numbers) if inode is None else inode
        self.cache: dict[int, Frame] = {}
        # Shared anonymous memory is charged as a whole until its last mapping is gone.
        self.charged_pages = 0
        self.mappings = 0

    def reopen(self, *, writable: bool) -> File:
        """Return another opening of the same file: the same pages, but mappings do not merge with these."""
        other = File(
            self.name,
            self.size_bytes,
            writable=writable,
            in_memory=self.in_memory,
            device=self.device,
            inode=self.inode,
        )
        other.cache = self.cache
        return other

    def __repr__(self) -> str:
        return f"<File {self.name} of {self.size_bytes} bytes>"


class AnonVma:
    """What ties the anonymous pages of related VMAs together, as the kernel's structure of that name.

    Attributes:
        parent: That of the process forked from, or itself.
        children: Direct children, itself included if it is a root.
        active: VMAs whose own anon_vma this is.
        links: VMAs in whose chain it is.
    """

    __slots__ = ("active", "children", "links", "number", "parent")

    def __init__(self, parent: AnonVma | None = None) -> None:
        self.number = next(_numbers)
        self.parent = parent or self
        self.active = 0
        self.children = 0
        self.links = 0
        self.parent.children += 1

    def __repr__(self) -> str:
        return f"<AnonVma {self.number}>"


class VMA:
    """One mapped range with one protection.

    Attributes:
        start: First address.
        end: Address after the last.
        flags: ``VM_…`` flags: access, what access may become, sharing, accounting.
        pgoff: Page offset of ``start`` in the file. Of private anonymous memory the page number of ``start``
            when it was mapped, which a move keeps once a page was faulted.
        file: What is mapped, or None; shared anonymous memory has a file of its own.
        anon_vma: Set by the first anonymous page.
        chain: The anon_vmas in which pages of this VMA may be: its own and those of its ancestors.
    """

    __slots__ = ("anon_vma", "chain", "end", "file", "flags", "pgoff", "start")

    def __init__(self, start: int, end: int, flags: int, pgoff: int, file: File | None = None) -> None:
        self.start = start
        self.end = end
        self.flags = flags
        self.pgoff = pgoff
        self.file = file
        self.anon_vma: AnonVma | None = None
        self.chain: tuple[AnonVma, ...] = ()

    @property
    def protection(self) -> str:
        """As in a map: ``rw-p``."""
        return PROTECTIONS[self.flags & _SHOWN]

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def offset_bytes(self) -> int:
        """Offset of ``start`` in the file, in bytes; 0 without a file, as in a map."""
        return self.pgoff << PAGE_SHIFT if self.file is not None else 0

    @property
    def flag_names(self) -> list[str]:
        """Names of the flags."""
        return flag_names(self.flags)

    def __repr__(self) -> str:
        name = f" {self.file.name}" if self.file is not None else ""
        return f"<VMA {self.start:#x}-{self.end:#x} {self.protection}{name}>"


def prepare_new(vma: VMA) -> None:
    """Give a VMA an anon_vma of its own, because it gets its first anonymous page."""
    anon_vma = AnonVma()
    anon_vma.active = anon_vma.links = 1
    vma.anon_vma = anon_vma
    vma.chain = (anon_vma,)


def prepare_shared(vma: VMA, anon_vma: AnonVma) -> None:
    """Let a VMA without anonymous pages use its neighbour's anon_vma."""
    anon_vma.active += 1
    anon_vma.links += 1
    vma.anon_vma = anon_vma
    vma.chain = (anon_vma,)


def clone_chain(target: VMA, source: VMA, *, fork: bool = False) -> None:
    """Link a VMA to all anon_vmas of another.

    Args:
        target: Has no chain yet.
        source: Whose chain it gets.
        fork: Whether the target is a child's: it gets no anon_vma of its own here, unless one of the chain is
            left without a user and can be taken over.
    """
    target.chain = source.chain
    own = None if fork else source.anon_vma
    for anon_vma in source.chain:
        anon_vma.links += 1
        if own is None and source.anon_vma is not None and anon_vma.children < 2 and anon_vma.active == 0:
            own = anon_vma
    target.anon_vma = own
    if own is not None:
        own.active += 1


def fork_chain(child: VMA, parent: VMA) -> None:
    """Give a child's VMA its parent's chain and an anon_vma of its own for what it will copy."""
    if parent.anon_vma is None:
        return
    clone_chain(child, parent, fork=True)
    if child.anon_vma is not None:
        return
    anon_vma = AnonVma(parent.anon_vma)
    anon_vma.active = anon_vma.links = 1
    child.anon_vma = anon_vma
    child.chain = (anon_vma, *child.chain)


def unlink_chain(vma: VMA) -> None:
    """Take a VMA, which goes away or has lost all its pages, out of its anon_vmas."""
    for anon_vma in vma.chain:
        anon_vma.links -= 1
        if not anon_vma.links:
            anon_vma.parent.children -= 1
    if vma.anon_vma is not None:
        vma.anon_vma.active -= 1
    vma.anon_vma = None
    vma.chain = ()
