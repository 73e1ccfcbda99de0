"""Programs of calls that are written out, run in the model and by real processes."""

import os

from spaceprograms import ARENA, PAGE, PRIVATE, WORD, Comparison, Process, R, Run, W

from quire.space import VMA, AddressSpace, FaultKind, Machine
from quire.space import constants as c
from quire.space.native import FD_ZERO


class Case(Run):
    """A program written out: each call is made both ways and compared when the ``with`` block ends."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__(comparison, b"")

    def __enter__(self) -> "Case":
        self._open_files()
        space = AddressSpace(self.tester.rules, machine=Machine(self.tester.rules))
        for start, end, flags, pgoff, file in self.tester.furniture.vmas:
            space.insert(VMA(start, end, flags, pgoff, file))
        self.processes[0] = Process(space, -1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
                self.calls.run()
                self.compare()
        finally:
            for fd in self.fds:
                os.close(fd)

    def vmas(self) -> list[str]:
        """What the space of the process whose turn it is has in the arena, in pages: ``0-3 rw-p``."""
        return [
            f"{(vma.start - ARENA) // PAGE}-{(vma.end - ARENA) // PAGE} {vma.protection}"
            for vma in self.space.vmas(ARENA, ARENA + (1 << 34))
        ]

    def map(self, page: int, pages: int, prot: int = R | W, flags: int = PRIVATE | c.MAP_FIXED) -> None:
        address, length = ARENA + page * PAGE, pages * PAGE
        self._record(
            f"mmap of {page}, {pages} pages, {prot}, {flags:#x}",
            "mmap",
            (address, length, prot, flags, WORD - 1, 0),
            lambda: self.space.mmap(address, length, prot, flags).value,
        )

    def unmap(self, page: int, pages: int) -> None:
        arguments = (ARENA + page * PAGE, pages * PAGE)
        self._record("munmap", "munmap", arguments, lambda: self.space.munmap(*arguments).value)

    def protect(self, page: int, pages: int, prot: int) -> None:
        arguments = (ARENA + page * PAGE, pages * PAGE, prot)
        self._record("mprotect", "mprotect", arguments, lambda: self.space.mprotect(*arguments).value)

    def remap(self, page: int, old: int, new: int, flags: int = 0, to: int = 0) -> None:
        arguments = (ARENA + page * PAGE, old * PAGE, new * PAGE, flags, ARENA + to * PAGE)
        self._record("mremap", "mremap", arguments, lambda: self.space.mremap(*arguments).value)

    def advise(self, page: int, pages: int, advice: int) -> None:
        arguments = (ARENA + page * PAGE, pages * PAGE, advice)
        self._record("madvise", "madvise", arguments, lambda: self.space.madvise(*arguments).value)

    def touch(self, page: int, *, write: bool = True) -> FaultKind:
        address = ARENA + page * PAGE
        fault = self.space.touch(address, write)
        expected = -fault.errno or 1
        if write:
            record = self.calls.call("read", FD_ZERO, address, 1)
        else:
            record = self.calls.call("pwrite64", self.calls.scratch, address, 1, 0)
        self._observe(f"touch {page}", record, expected)
        return fault.kind

    def fork(self) -> int:
        """Fork; return the child, for `turn`."""
        child = self.made
        self._fork(b"")
        return child

    def turn(self, process: int) -> None:
        self.calls.switch(process)
        self.running = process

    @property
    def last(self) -> int:
        """What the last call returned in the model."""
        return self.steps[-1].expected
