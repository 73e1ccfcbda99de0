"""Known cases, in the model and in real processes: a lecture's, and those of the kernel's selftests."""

import dataclasses
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from spacecases import Case
from spaceprograms import PRIVATE, SHARED, Comparison, R, W, X

import quire.image
from quire.space import AddressSpace, CallError, FaultKind, File, Rules, running_rules
from quire.space.constants import (
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MADV_WIPEONFORK,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_GROWSDOWN,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
)

MOVE = MREMAP_MAYMOVE | MREMAP_FIXED
RW = R | W


@pytest.fixture(scope="module")
def comparison() -> Iterator[Comparison]:
    with Comparison(running_rules()) as comparison:
        yield comparison


@pytest.fixture
def case(comparison: Comparison) -> Case:
    return Case(comparison)


# The lecture: a mapping of one page comes to where something is mapped already.


def test_over_the_last_page(case: Case) -> None:
    with case:
        case.map(0, 4, R)
        case.map(3, 1, RW)
        assert case.vmas() == ["0-3 r--p", "3-4 rw-p"]


def test_over_the_first_page(case: Case) -> None:
    with case:
        case.map(0, 4, R)
        case.map(0, 1, RW)
        assert case.vmas() == ["0-1 rw-p", "1-4 r--p"]


def test_in_the_middle(case: Case) -> None:
    with case:
        case.map(0, 4, R)
        case.map(1, 1, RW)
        assert case.vmas() == ["0-1 r--p", "1-2 rw-p", "2-4 r--p"]


def test_with_the_same_protection_the_old_one_is_extended(case: Case) -> None:
    with case:
        case.map(0, 4)
        case.map(3, 3)
        assert case.vmas() == ["0-6 rw-p"]


# What the selftest of merging tries.


def test_mprotect_unfaulted_left(case: Case) -> None:
    with case:
        case.map(0, 10)
        case.protect(0, 5, R)
        case.touch(5)
        case.protect(0, 5, RW)
        # What became read-only before its first fault lost its charge, and gets it back.
        assert case.vmas() == ["0-10 rw-p"]


def test_mprotect_unfaulted_right(case: Case) -> None:
    with case:
        case.map(0, 10)
        case.protect(5, 5, R)
        case.touch(0)
        case.protect(5, 5, RW)
        assert case.vmas() == ["0-10 rw-p"]


def test_mprotect_unfaulted_both(case: Case) -> None:
    with case:
        case.map(0, 9)
        case.protect(0, 3, R)
        case.protect(6, 3, R)
        case.touch(3)
        case.protect(0, 3, RW)
        case.protect(6, 3, RW)
        assert case.vmas() == ["0-9 rw-p"]


def test_faulted_hole_faulted_stays_two(case: Case) -> None:
    with case:
        case.map(0, 3)
        case.map(6, 3)
        case.touch(0)
        case.touch(6)
        with case.space.explaining():
            outcome = case.space.mmap(case.space.vmas(0, 1 << 47)[1].end, 3 * 4096, RW, PRIVATE | MAP_FIXED)
        assert any("different anon_vma" in why for why in outcome.why_not)
        case.space.munmap(outcome.value, 3 * 4096)
        case.map(3, 3)
        assert case.vmas() == ["0-6 rw-p", "6-9 rw-p"]


def test_a_forked_child_does_not_merge_what_it_inherited(case: Case) -> None:
    with case:
        case.map(0, 3)
        case.touch(0)
        child = case.fork()
        case.map(3, 3)
        assert case.vmas() == ["0-6 rw-p"]
        case.turn(child)
        case.map(3, 3)
        assert case.vmas() == ["0-3 rw-p", "3-6 rw-p"]


def test_mremap_of_untouched_memory_merges_where_it_goes(case: Case) -> None:
    with case:
        case.map(0, 3)
        case.touch(0)
        case.map(20, 3)
        case.remap(20, 3, 3, MOVE, 3)
        assert case.vmas() == ["0-6 rw-p"]


def test_mremap_of_touched_memory_keeps_its_offset(case: Case) -> None:
    with case:
        case.map(0, 3)
        case.map(20, 3)
        case.touch(20)
        case.remap(20, 3, 3, MOVE, 3)
        assert case.vmas() == ["0-3 rw-p", "3-6 rw-p"]
        # Back where it was, it fits again.
        case.map(17, 3)
        case.remap(3, 3, 3, MOVE, 20)
        assert case.vmas() == ["0-3 rw-p", "17-23 rw-p"]


# What the selftests of mremap try.


def test_mremap_grows_in_place_into_free_room_only(case: Case) -> None:
    with case:
        case.map(0, 2)
        case.map(4, 1, R)
        case.remap(0, 2, 4)
        assert case.vmas() == ["0-4 rw-p", "4-5 r--p"]
        case.remap(0, 4, 5)
        assert case.last == -errno.ENOMEM
        case.remap(0, 4, 5, MREMAP_MAYMOVE)
        assert case.last > 0
        assert case.vmas() == ["4-5 r--p"]


def test_mremap_of_nothing_duplicates_shared_memory_only(case: Case) -> None:
    with case:
        case.map(0, 2, RW, SHARED | MAP_FIXED)
        case.touch(0)
        case.remap(0, 0, 2, MOVE, 8)
        assert case.vmas() == ["0-2 rw-s", "8-10 rw-s"]
        assert case.touch(8, write=False) is FaultKind.MINOR
        case.remap(0, 0, 2)
        assert case.last == -errno.ENOMEM
        case.map(20, 2)
        case.remap(20, 0, 2, MREMAP_MAYMOVE)
        assert case.last == -errno.EINVAL


def test_mremap_dontunmap_leaves_an_empty_vma(case: Case) -> None:
    with case:
        case.map(0, 2)
        case.touch(0)
        case.remap(0, 2, 2, MOVE | MREMAP_DONTUNMAP, 8)
        assert case.vmas() == ["0-2 rw-p", "8-10 rw-p"]
        case.remap(0, 2, 3, MOVE | MREMAP_DONTUNMAP, 8)
        assert case.last == -errno.EINVAL


def test_mremap_moves_several_vmas_and_the_holes_between(case: Case) -> None:
    if not running_rules().move_many:
        pytest.skip("this kernel moves one VMA at a time")
    with case:
        case.map(0, 1)
        case.map(2, 1, R)
        case.map(3, 1, X | R)
        case.remap(0, 4, 4, MOVE, 10)
        assert case.vmas() == ["10-11 rw-p", "12-13 r--p", "13-14 r-xp"]


# What the selftest of MAP_FIXED_NOREPLACE tries.


@pytest.mark.parametrize(
    ("page", "pages", "free"),
    [(0, 5, False), (1, 3, False), (0, 3, False), (2, 3, False), (5, 1, True), (4, 2, False)],
)
def test_map_fixed_noreplace(case: Case, page: int, pages: int, free: bool) -> None:
    with case:
        case.map(0, 5, 0)
        case.map(page, pages, 0, PRIVATE | MAP_FIXED_NOREPLACE)
        assert (case.last > 0) is free
        assert free or case.last == -errno.EEXIST


# What the selftest of guard regions tries.


def test_guards_split_nothing_and_outlive_dontneed(case: Case) -> None:
    with case:
        case.map(0, 8)
        case.touch(2)
        case.advise(1, 3, MADV_GUARD_INSTALL)
        assert case.vmas() == ["0-8 rw-p"]
        assert case.touch(2) is FaultKind.SIGSEGV
        case.advise(0, 8, MADV_DONTNEED)
        assert case.touch(3, write=False) is FaultKind.SIGSEGV
        child = case.fork()
        case.advise(0, 8, MADV_GUARD_REMOVE)
        assert case.touch(2) is FaultKind.MINOR
        case.turn(child)
        assert case.touch(2) is FaultKind.SIGSEGV


def test_guards_move_with_their_memory(case: Case) -> None:
    with case:
        case.map(0, 4)
        case.advise(1, 1, MADV_GUARD_INSTALL)
        case.remap(0, 4, 4, MOVE, 10)
        assert case.touch(11) is FaultKind.SIGSEGV
        assert case.touch(10) is FaultKind.MINOR


# Stacks, forks, partial effects.


def test_a_stack_grows_down_to_the_guard_gap(case: Case) -> None:
    gap = running_rules().stack_guard_gap_pages
    with case:
        case.map(0, 1)
        case.map(1000, 1, RW, PRIVATE | MAP_FIXED | MAP_GROWSDOWN)
        assert case.touch(900) is FaultKind.STACK_GROWTH
        assert case.touch(gap) is FaultKind.SIGSEGV
        assert case.touch(gap + 1) is FaultKind.STACK_GROWTH
        assert case.vmas() == ["0-1 rw-p", f"{gap + 1}-1001 rw-p"]


def test_mprotect_across_a_hole_changes_what_lies_before_it(case: Case) -> None:
    with case:
        case.map(0, 2)
        case.map(4, 2)
        case.protect(0, 6, R)
        assert case.last == -errno.ENOMEM
        assert case.vmas() == ["0-2 r--p", "4-6 rw-p"]
        case.unmap(0, 6)
        assert case.last == 0
        assert case.vmas() == []


def test_copy_on_write_is_shared_and_counted(case: Case) -> None:
    with case:
        case.map(0, 2)
        case.touch(0)
        child = case.fork()
        assert [count for _, _, count in case.space.pages()] == [2]
        assert case.space.sizes().proportional_bytes == 2048
        assert case.touch(0) is FaultKind.COW
        case.turn(child)
        assert case.space.sizes().unique_bytes == 4096
        assert case.touch(0) is FaultKind.MINOR


def test_what_a_child_does_not_get(case: Case) -> None:
    with case:
        case.map(0, 6)
        case.touch(1)
        case.touch(3)
        case.advise(0, 2, MADV_DONTFORK)
        case.advise(2, 2, MADV_WIPEONFORK)
        assert case.vmas() == ["0-2 rw-p", "2-4 rw-p", "4-6 rw-p"]
        child = case.fork()
        case.turn(child)
        assert case.vmas() == ["2-4 rw-p", "4-6 rw-p"]
        assert case.touch(1) is FaultKind.SIGSEGV
        assert case.touch(3, write=False) is FaultKind.MINOR


def test_brk_grows_and_shrinks_and_stops_at_a_neighbour(case: Case) -> None:
    start = case.tester.rules.brk_start
    page = 4096

    def brk(address: int) -> int:
        case._record("brk", "brk", (address,), lambda: case.space.brk(address).value)
        return case.last

    with case:
        assert brk(0) == start
        assert brk(start + 3 * page + 5) == start + 3 * page + 5
        assert brk(start + 2 * page) == start + 2 * page
        case._record(
            "mmap",
            "mmap",
            (start + 8 * page, page, RW, PRIVATE | MAP_FIXED, (1 << 64) - 1, 0),
            lambda: case.space.mmap(start + 8 * page, page, RW, PRIVATE | MAP_FIXED).value,
        )
        # One page stays free.
        assert brk(start + 8 * page) == start + 2 * page
        assert brk(start + 7 * page) == start + 7 * page
        assert brk(start - page) == start + 7 * page


def test_a_split_at_max_map_count_fails_and_leaves_what_was_done() -> None:
    space = AddressSpace(dataclasses.replace(Rules(), max_map_count=3))
    first = space.mmap(0x100000, 9 * 4096, RW, PRIVATE | MAP_FIXED).value
    space.mmap(0x200000, 4096, RW, PRIVATE | MAP_FIXED)
    with pytest.raises(CallError) as caught:
        space.mprotect(first + 4096, 4096, R)
    assert caught.value.errno == errno.ENOMEM
    assert [change.kind for change in caught.value.changes] == ["split"]
    assert len(space) == 3
    with pytest.raises(CallError, match="ENOMEM"):
        space.munmap(first + 4 * 4096, 4096)
    space.check()


def succeeds(request: Callable[[], object]) -> bool:
    """Whether it does, or fails for want of memory."""
    try:
        request()
    except CallError as error:
        if error.errno != errno.ENOMEM:
            raise
        return False
    return True


def test_the_three_modes_of_overcommit() -> None:
    big = 1 << 40
    tight = dataclasses.replace(Rules(), memory_pages=1000, commit_limit_pages=1000)
    outcomes = {}
    for mode in ("heuristic", "always", "never"):
        space = AddressSpace(dataclasses.replace(tight, overcommit=mode))
        requests = (
            lambda space=space: space.mmap(0, big, RW, PRIVATE),
            lambda space=space: space.mmap(0, big, RW, PRIVATE | MAP_NORESERVE),
            lambda space=space: space.mmap(0, 600 * 4096, RW, PRIVATE),
            lambda space=space: space.fork(),
        )
        done = [succeeds(request) for request in requests]
        outcomes[mode] = done
        space.clear()
    assert outcomes == {
        "heuristic": [False, True, True, True],
        "always": [True, True, True, True],
        "never": [False, False, True, False],
    }


def test_reading_a_file_faults_around_and_a_first_read_of_a_disk_is_major() -> None:
    space = AddressSpace(Rules())
    file = File("/data", 20 * 4096)
    base = space.mmap(0x100000, 32 * 4096, R, MAP_PRIVATE | MAP_FIXED, file).value
    assert space.touch(base + 5 * 4096).kind is FaultKind.MAJOR
    assert space.touch(base + 6 * 4096).kind is FaultKind.MAJOR
    other = AddressSpace(Rules(), machine=space.machine)
    other.mmap(0x100000, 32 * 4096, R, MAP_PRIVATE | MAP_FIXED, file)
    assert other.touch(base).kind is FaultKind.MAJOR
    assert other.touch(base + 5 * 4096).kind is FaultKind.NONE
    assert other.touch(base + 20 * 4096).kind is FaultKind.SIGBUS
    assert space.touch(base, write=True).kind is FaultKind.SIGSEGV


def test_what_no_register_holds_is_misuse() -> None:
    space = AddressSpace(Rules())
    for arguments in ((-1, 4096, R, PRIVATE), (0, 1 << 64, R, PRIVATE), (0, 4096, R, PRIVATE | 0x40000)):
        with pytest.raises(ValueError, match="mmap"):
            space.mmap(*arguments)
    for address in (-1, 1 << 64):
        with pytest.raises(ValueError, match="touch"):
            space.touch(address)
    with pytest.raises(ValueError, match="advice"):
        space.madvise(0, 4096, 9999)


def test_a_load_plan_becomes_the_space_that_the_program_has() -> None:
    path = os.path.realpath("/bin/cat")
    with subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            # Once it answers, the linker is done.
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"x")
            process.stdin.flush()
            assert process.stdout.read(1) == b"x"
            lines = Path(f"/proc/{process.pid}/maps").read_text("utf-8").splitlines()
        finally:
            process.kill()
    real = [line.split()[:3] for line in lines if line.endswith(path)]
    bias = int(real[0][0].partition("-")[0], 16)
    space = AddressSpace(Rules())
    file = File(path, os.path.getsize(path))
    linker = File("linker", 1 << 20)
    plan = quire.image.read(path).load_plan(bias=bias)
    space.exec(plan, {"image": file, "interpreter": linker})
    modelled = [
        [f"{vma.start:08x}-{vma.end:08x}", vma.protection, f"{vma.offset_bytes:08x}"]
        for vma in space
        if vma.file is file
    ]
    assert modelled == real
    space.check()
