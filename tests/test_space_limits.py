"""What the kernel and the model do at ``vm.max_map_count``, and where memory cannot be charged."""

import errno
from collections.abc import Callable, Iterator

import pytest
from spacecases import Case
from spaceprograms import ARENA, PAGE, PRIVATE, WORD, Comparison, R, W

from quire.space import VMA, AddressSpace, CallError, running_rules
from quire.space.constants import (
    MADV_DONTFORK,
    MAP_FIXED,
    MAP_NORESERVE,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
)
from quire.space.native import FD_MAPS

RW = R | W
MOST = 100_000
LINE_BYTES = 60
OTHER = ARENA - (1 << 30)
SPARE = OTHER - (1 << 29)


@pytest.fixture
def comparison() -> Iterator[Comparison]:
    with Comparison(running_rules()) as comparison:
        yield comparison


class Long:
    """A program with so many VMAs that the whole map is compared at its end only, results at every call."""

    def __init__(self, comparison: Comparison) -> None:
        self.calls = comparison.calls
        self.tail = comparison.furniture.tail
        self.space = AddressSpace(comparison.rules)
        self.calls.begin(1, [])
        for start, end, flags, pgoff, file in comparison.furniture.vmas:
            self.space.insert(VMA(start, end, flags, pgoff, file))
        self.results: list[tuple[int, str, int]] = []

    def call(self, name: str, *arguments: int) -> int:
        """Make a call both ways; return what the model says of it."""
        try:
            # Without the descriptor and offset of mmap.
            expected = getattr(self.space, name)(*arguments[:4] if name == "mmap" else arguments).value
        except CallError as error:
            expected = -error.errno
        self.results.append((self.calls.call(name, *arguments), f"{name}{arguments}", expected))
        return expected

    def map(self, address: int, pages: int, prot: int) -> int:
        return self.call("mmap", address, pages * PAGE, prot, PRIVATE | MAP_FIXED, WORD - 1, 0)

    def compare(self) -> None:
        text = self.calls.read_all(FD_MAPS, len(self.space) * LINE_BYTES // PAGE + 2)
        self.calls.run()
        for record, what, expected in self.results:
            assert self.calls.result(record) == expected, what
        assert self.calls.text(*text) == self.space.maps_text().encode() + self.tail


def test_what_is_left_at_max_map_count(comparison: Comparison) -> None:
    most = comparison.rules.max_map_count
    if most > MOST:
        pytest.skip(f"vm.max_map_count is {most} here: too many to make in a test")
    program = Long(comparison)
    program.map(OTHER, 8, RW)
    program.call("madvise", OTHER, PAGE, MADV_DONTFORK)
    program.map(SPARE, 2, RW)
    program.map(ARENA, most + 16, 0)
    page = ARENA + PAGE
    while len(program.space) < most - 1:
        assert program.call("mprotect", page, PAGE, R) == 0
        page += 2 * PAGE
    if len(program.space) < most:
        program.call("mprotect", SPARE, PAGE, R)
    assert len(program.space) == most
    # A hole, a change in the middle, a move, a mark for forks: each takes a VMA more.
    assert program.call("munmap", OTHER + 4 * PAGE, PAGE) == -errno.ENOMEM
    assert program.call("mprotect", OTHER + 4 * PAGE, PAGE, R) == -errno.ENOMEM
    assert program.call("madvise", OTHER + 4 * PAGE, PAGE, MADV_DONTFORK) == -errno.EAGAIN
    to = OTHER - (1 << 30)
    move = MREMAP_MAYMOVE | MREMAP_FIXED
    assert program.call("mremap", OTHER + PAGE, 7 * PAGE, 7 * PAGE, move, to) == -errno.ENOMEM
    # The first page is a VMA of its own, and changes; of the next VMA it would be a piece.
    assert program.call("mprotect", OTHER, 2 * PAGE, R) == -errno.ENOMEM
    found = program.space.at(OTHER)
    assert found is not None
    assert (found.end, found.protection) == (OTHER + PAGE, "r--p")
    # What takes none goes on, and one mapping more.
    assert program.call("munmap", OTHER + 7 * PAGE, PAGE) == 0
    assert program.call("mprotect", OTHER, PAGE, RW) == 0
    assert program.map(OTHER + 100 * PAGE, 1, R) > 0
    assert len(program.space) == most + 1
    assert program.map(OTHER + 200 * PAGE, 1, R) == -errno.ENOMEM
    assert program.call("munmap", OTHER + 4 * PAGE, PAGE) == -errno.ENOMEM
    # And with room again everything does.
    assert program.call("munmap", ARENA, 20 * PAGE) == 0
    assert program.call("munmap", OTHER + 4 * PAGE, PAGE) == 0
    assert program.call("mprotect", OTHER, 2 * PAGE, R) == 0
    program.space.check()
    program.compare()


def test_the_running_mode_of_overcommit(comparison: Comparison) -> None:
    """Requests whose answer does not depend on what other processes use at the moment."""
    rules = comparison.rules
    far = max(rules.memory_pages, rules.commit_limit_pages)
    noreserve = PRIVATE | MAP_FIXED | MAP_NORESERVE
    expected: dict[str, list[bool]] = {
        "heuristic": [False, True, True, True, False, True],
        "always": [True, True, True, True, True, True],
        "never": [False, False, True, True, False, True],
    }
    with Case(comparison) as case:
        steps: list[Callable[[], None]] = [
            lambda: case.map(0, far + 1),
            lambda: case.map(0, far + 1, RW, noreserve),
            lambda: case.unmap(0, far + 1),
            # What cannot be written costs nothing, until it can.
            lambda: case.map(0, far + 1, R),
            lambda: case.protect(0, far + 1, RW),
            lambda: case.unmap(0, far + 1),
        ]
        done = []
        for step in steps:
            step()
            done.append(case.last >= 0)
        assert done == expected[rules.overcommit]
        if rules.overcommit == "heuristic":
            # To the page: all memory and swap there is. What is replaced pays for its part of the new.
            for pages, result in ((1, -errno.ENOMEM), (0, ARENA), (1, ARENA)):
                case.map(0, rules.memory_pages + pages)
                assert case.last == result
