"""`AddressSpace`: the calls of Linux on a model of a process's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from quire.space import executing, faults, forking, mapping, protecting, remapping, text
from quire.space.accounting import Sizes, sizes
from quire.space.constants import PAGE_SHIFT
from quire.space.outcome import CallError
from quire.space.pages import GUARD, ZERO
from quire.space.probing import running_rules
from quire.space.state import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from quire.image.operations import Operation
    from quire.space.faults import Fault
    from quire.space.machine import Machine
    from quire.space.outcome import Outcome
    from quire.space.rules import Rules
    from quire.space.vma import VMA, File


class AddressSpace:
    """A model of one process's memory under the kernel's rules.

    It is empty at first, and begins with what is mapped into it. No memory is allocated for what it models:
    it costs some 200 bytes for each VMA and some 100 for each page that was touched. Not safe for use by
    several threads at once.

    Args:
        rules: Of the kernel; by default those of the running one, found out by trying.
        machine: What it shares with other spaces; by default a machine of its own.

    Addresses are plain integers, ranges are ``[start, end)``. Each call that changes VMAs returns an
    `Outcome`, or raises `CallError`, an OSError with the kernel's errno that tells what had been done before
    it failed. Arguments that no register holds, and flags that the model does not have, are a ValueError.
    """

    def __init__(self, rules: Rules | None = None, *, machine: Machine | None = None) -> None:
        self._state = State(rules if rules is not None else running_rules(), machine)
        self.explaining = self._state.explaining

    @property
    def rules(self) -> Rules:
        """The rules it goes by."""
        return self._state.rules

    @property
    def machine(self) -> Machine:
        """What it shares with its forks."""
        return self._state.machine

    def __len__(self) -> int:
        """Count the VMAs."""
        return len(self._state.tree)

    def __iter__(self) -> Iterator[VMA]:
        """Yield the VMAs in the order of their addresses; the space must not change meanwhile."""
        return iter(self._state.tree)

    def at(self, address: int) -> VMA | None:
        """Return the VMA that has the address, or None."""
        return self._state.tree.at(address)

    def vmas(self, start: int, end: int) -> list[VMA]:
        """Return the VMAs with an address in ``[start, end)``."""
        return self._state.tree.overlapping(start, end)

    def mmap(
        self, address: int, length: int, prot: int, flags: int, file: File | None = None, offset: int = 0
    ) -> Outcome:
        """Map memory.

        Args:
            address: Where, in bytes: a hint unless MAP_FIXED or MAP_FIXED_NOREPLACE; 0 for none.
            length: In bytes; rounded up to pages.
            prot: PROT_READ, PROT_WRITE, PROT_EXEC, or 0.
            flags: MAP_PRIVATE or MAP_SHARED, and of MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE,
                MAP_NORESERVE, MAP_GROWSDOWN.
            file: What is mapped; not looked at with MAP_ANONYMOUS.
            offset: In the file, in bytes, a multiple of the page size.

        Returns:
            The outcome, whose value is the first address.

        Raises:
            CallError: EINVAL, ENOMEM, EEXIST, EACCES, EBADF, EOVERFLOW, EOPNOTSUPP or EPERM, as the kernel.
            ValueError: The model has no such flags.
        """
        state = self._state
        return state.call(lambda: mapping.mmap(state, address, length, prot, flags, file, offset))

    def munmap(self, address: int, length: int) -> Outcome:
        """Unmap a range, holes included.

        Args:
            address: First address, a multiple of the page size.
            length: In bytes; rounded up to pages.

        Returns:
            The outcome, of value 0.

        Raises:
            CallError: EINVAL for a range that is empty, not aligned or beyond the space, ENOMEM at
                ``max_map_count``.
        """
        state = self._state
        return state.call(lambda: mapping.munmap(state, address, length))

    def mprotect(self, address: int, length: int, prot: int) -> Outcome:
        """Change the protection of a range.

        Args:
            address: First address, a multiple of the page size.
            length: In bytes; rounded up to pages; 0 does nothing.
            prot: The new protection.

        Returns:
            The outcome, of value 0.

        Raises:
            CallError: ENOMEM at a hole, at ``max_map_count`` or if the charge is refused, EACCES, EINVAL.
                What lies below the place of the failure keeps its new protection.
        """
        state = self._state
        return state.call(lambda: protecting.mprotect(state, address, length, prot))

    def mremap(
        self, address: int, old_length: int, new_length: int, flags: int = 0, new_address: int = 0
    ) -> Outcome:
        """Grow, shrink, move or duplicate a mapping.

        Args:
            address: First address of the old range, a multiple of the page size.
            old_length: In bytes; rounded up to pages; 0 duplicates shared memory.
            new_length: In bytes; rounded up to pages.
            flags: Of MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP.
            new_address: Where to, with MREMAP_FIXED; a hint with MREMAP_DONTUNMAP.

        Returns:
            The outcome, whose value is the first address of the new range.

        Raises:
            CallError: EINVAL, EFAULT or ENOMEM, as the kernel; with MREMAP_FIXED the new range may be
                unmapped already.
        """
        state = self._state
        return state.call(
            lambda: remapping.mremap(state, address, old_length, new_length, flags, new_address)
        )

    def brk(self, address: int) -> Outcome:
        """Move the end of the heap.

        Args:
            address: Where it should be; 0 asks where it is.

        Returns:
            The outcome, whose value is where it is now: as the system call, which reports no error, and
            unlike the function of libc.
        """
        state = self._state
        return state.call(lambda: mapping.brk(state, address))

    def madvise(self, address: int, length: int, advice: int) -> Outcome:
        """Drop the pages of a range, or say what a fork does with it.

        Args:
            address: First address, a multiple of the page size.
            length: In bytes; rounded up to pages.
            advice: MADV_DONTNEED, MADV_FREE, MADV_DONTFORK, MADV_DOFORK, MADV_WIPEONFORK, MADV_KEEPONFORK,
                MADV_GUARD_INSTALL, which costs time and memory for each page, or MADV_GUARD_REMOVE.

        Returns:
            The outcome, of value 0.

        Raises:
            CallError: ENOMEM if the range has holes (what is mapped was advised), EINVAL, EAGAIN at
                ``max_map_count``.
            ValueError: The model does not know the advice.
        """
        state = self._state
        return state.call(lambda: protecting.madvise(state, address, length, advice))

    def touch(self, address: int, write: bool = False) -> Fault:
        """Read or write one byte.

        Args:
            address: Of the byte.
            write: Whether it is written.

        Returns:
            The kind of fault with its reason. SIGSEGV and SIGBUS are kinds, too: they are not raised.

        Raises:
            ValueError: No register holds the address.
        """
        mapping.check_word("touch", address=address)
        return faults.touch(self._state, address, write=write)

    def fork(self) -> Self:
        """Copy the space as ``fork`` does; private pages are shared until one of the two writes.

        Returns:
            The child's space, on the same machine.

        Raises:
            CallError: ENOMEM if the copy cannot be charged.
        """
        child = type(self)(self.rules, machine=self.machine)
        forking.fork(self._state, child._state)
        return child

    def exec(self, plan: Iterable[Operation], files: Mapping[str, File]) -> Outcome:
        """Replace everything by what a load plan maps, as ``execve`` and the dynamic linker do.

        Args:
            plan: Operations in order, such as `quire.image` makes for an image.
            files: What the plan's files are: ``image``, and ``interpreter`` if it names one.

        Returns:
            The outcome, of value 0. Pages that a plan zeroes, copies or relocates are touched, others are
            not. The stack lies at the top of the space.

        Raises:
            CallError: An operation failed; what was done before it remains, as in a process that the kernel
                then kills.
            KeyError: The plan maps a file that ``files`` lacks.
            ValueError: An operation that is none of a plan's.
        """
        state = self._state
        return state.call(lambda: executing.execute(state, plan, files))

    def clear(self) -> None:
        """Unmap everything, as the end of a process does."""
        state = self._state
        state.call(lambda: mapping.munmap(state, 0, self.rules.task_size))

    def sizes(self, start: int = 0, end: int | None = None) -> Sizes:
        """Return virtual, resident, proportional and unique sizes of ``[start, end)``, by default of all."""
        return sizes(self._state, start, self.rules.task_size if end is None else end)

    def pages(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, str, int]]:
        """Yield the pages of ``[start, end)`` that are present, in order.

        Yields:
            The address, what it is (``anonymous``, ``file``, ``zero`` or ``guard``) and how many entries map
            it.
        """
        last = (self.rules.task_size if end is None else end) >> PAGE_SHIFT
        for page, frame in self._state.table.range(start >> PAGE_SHIFT, last):
            kind = (
                "zero"
                if frame is ZERO
                else "guard"
                if frame is GUARD
                else "file"
                if frame.file
                else "anonymous"
            )
            yield page << PAGE_SHIFT, kind, frame.mapped

    def name_of(self, vma: VMA) -> str:
        """Return what a map shows as the name of a VMA: a path, ``[heap]``, or nothing."""
        return text.name_of(self._state, vma)

    def maps_text(self) -> str:
        """Return the space as /proc/PID/maps would show it."""
        return text.maps_text(self._state)

    def insert(self, vma: VMA) -> None:
        """Add a VMA as it is, uncharged: what was there before the first call. Its range must be free."""
        self._state.tree.insert(vma)
        if vma.file is not None:
            vma.file.mappings += 1

    def check(self) -> None:
        """Check the invariants of the model; AssertionError if one does not hold."""
        self._state.tree.check()

    def _repr_html_(self) -> str:
        """Show the page of docs/pictures.md in a notebook."""
        from quire.space.picture import framed  # noqa: PLC0415 - drawing is for those who look

        return framed(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """Offer a notebook the page, a still picture for where scripts do not run, and a line of text."""
        from quire.space.picture import bundle  # noqa: PLC0415

        return bundle(self)

    def __repr__(self) -> str:
        """Show how much is mapped."""
        sizes = self.sizes()
        return (
            f"<quire.AddressSpace: {len(self)} VMAs, {sizes.virtual_bytes} bytes,"
            f" {sizes.resident_bytes} resident>"
        )


__all__ = ["AddressSpace", "CallError"]
