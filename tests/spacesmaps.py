"""Flags and sizes of VMAs as smaps shows them: the kernel's, and those of a model's space."""

from typing import NamedTuple

from quire._native import PAGE_SIZE
from quire.space import VMA, AddressSpace
from quire.space import constants as c


class Shown(NamedTuple):
    """What smaps shows of a VMA."""

    start: int
    flags: int
    resident_kb: int
    proportional_kb: int


_FLAGS = {
    b"rd": c.VM_READ,
    b"wr": c.VM_WRITE,
    b"ex": c.VM_EXEC,
    b"sh": c.VM_SHARED,
    b"mr": c.VM_MAYREAD,
    b"mw": c.VM_MAYWRITE,
    b"me": c.VM_MAYEXEC,
    b"ms": c.VM_MAYSHARE,
    b"gd": c.VM_GROWSDOWN,
    b"gu": c.VM_MAYBE_GUARD,
    b"dc": c.VM_DONTCOPY,
    b"ac": c.VM_ACCOUNT,
    b"nr": c.VM_NORESERVE,
    b"wf": c.VM_WIPEONFORK,
}
_KNOWN = sum(_FLAGS.values())


def of(space: AddressSpace, vma: VMA) -> Shown:
    """What smaps would show of a VMA of the model."""
    mapped = [count for _, kind, count in space.pages(vma.start, vma.end) if kind in ("anonymous", "file")]
    resident = len(mapped) * PAGE_SIZE
    assert space.sizes(vma.start, vma.end).resident_bytes == resident
    # The kernel adds up 4096ths of bytes, and rounds down.
    proportional = sum((PAGE_SIZE << 12) // count for count in mapped) >> 12
    return Shown(vma.start, vma.flags & _KNOWN, resident >> 10, proportional >> 10)


def read(smaps: bytes, without: tuple[int, ...]) -> list[Shown]:
    """What the kernel shows of all VMAs but those that begin at some addresses."""
    found = []
    start = resident = proportional = 0
    for line in smaps.splitlines():
        head, *words = line.split()
        if head == b"Rss:":
            resident = int(words[0])
        elif head == b"Pss:":
            proportional = int(words[0])
        elif head == b"VmFlags:":
            flags = sum(_FLAGS.get(name, 0) for name in words)
            if start not in without:
                found.append(Shown(start, flags, resident, proportional))
        elif not head.endswith(b":"):
            start = int(head.partition(b"-")[0], 16)
            if b"[vsyscall]" in line:
                break
    return found


def described(vmas: list[Shown]) -> str:
    """For people."""
    return "; ".join(
        f"{start:#x} {' '.join(c.flag_names(flags))}, Rss {resident}, Pss {proportional}"
        for start, flags, resident, proportional in vmas
    )
