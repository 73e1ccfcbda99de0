"""Reserve and commit: what Windows documents of each call and of each misuse."""

import pytest

from quire.space import windows as w
from quire.space.windows import Win32Error, WindowsSpace

RESERVE, COMMIT = w.MEM_RESERVE, w.MEM_COMMIT
RW, RO = w.PAGE_READWRITE, w.PAGE_READONLY
BASE = 0x100_0000
KIB64 = 0x10000


def fails(code: str):
    return pytest.raises(Win32Error, match=code)


def test_reserved_memory_is_no_memory_until_committed() -> None:
    space = WindowsSpace()
    base = space.virtual_alloc(0, 1 << 30, RESERVE, RW)
    assert base % KIB64 == 0
    assert space.committed_bytes == 0
    assert space.touch(base) == w.STATUS_ACCESS_VIOLATION
    assert space.virtual_alloc(base + 5000, 5000, COMMIT, RW) == base + 4096
    assert space.committed_bytes == 2 * 4096
    assert space.touch(base + 4096, write=True) == 0
    assert space.touch(base + 3 * 4096) == w.STATUS_ACCESS_VIOLATION
    query = space.virtual_query(base + 4096)
    assert (query.allocation_base, query.size_bytes, query.state, query.protect) == (base, 8192, COMMIT, RW)
    assert space.virtual_query(base).state == RESERVE


def test_addresses_are_rounded_to_64_kib_to_reserve_and_to_pages_to_commit() -> None:
    space = WindowsSpace()
    assert space.virtual_alloc(BASE + 0x1234, 100, RESERVE, RW) == BASE
    assert space.virtual_query(BASE).size_bytes == 0x2000
    # The rest of the 64 KiB belongs to nobody, and nobody can reserve it.
    assert space.virtual_query(BASE + 0x2000).state == w.MEM_FREE
    with fails("ERROR_INVALID_ADDRESS"):
        space.virtual_alloc(BASE + 0x2000, 4096, RESERVE, RW)
    assert space.virtual_alloc(0, 4096, RESERVE, RW) != BASE
    assert space.virtual_alloc(0, 4096, RESERVE | w.MEM_TOP_DOWN, RW) > BASE


def test_commit_without_address_reserves_too() -> None:
    space = WindowsSpace()
    base = space.virtual_alloc(0, 1, COMMIT, RW)
    assert space.touch(base, write=True) == 0
    assert space.virtual_query(base).allocation_base == base


def test_committing_twice_is_no_error_and_is_charged_once() -> None:
    space = WindowsSpace(commit_limit_bytes=4 * 4096)
    base = space.virtual_alloc(0, 8 * 4096, RESERVE, RW)
    space.virtual_alloc(base, 3 * 4096, COMMIT, RW)
    space.virtual_alloc(base + 4096, 3 * 4096, COMMIT, RO)
    assert space.committed_bytes == 4 * 4096
    with fails("ERROR_COMMITMENT_LIMIT"):
        space.virtual_alloc(base, 5 * 4096, COMMIT, RW)
    assert space.committed_bytes == 4 * 4096


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((0, 0, RESERVE, RW), "ERROR_INVALID_PARAMETER"),
        ((0, 4096, 0, RW), "ERROR_INVALID_PARAMETER"),
        ((0, 4096, w.MEM_RELEASE, RW), "ERROR_INVALID_PARAMETER"),
        ((0, 4096, RESERVE, 0), "ERROR_INVALID_PARAMETER"),
        ((0, 4096, RESERVE, RW | RO), "ERROR_INVALID_PARAMETER"),
        ((0, 4096, COMMIT, w.PAGE_NOACCESS | w.PAGE_GUARD), "ERROR_INVALID_PARAMETER"),
        ((0x1000, 4096, RESERVE, RW), "ERROR_INVALID_ADDRESS"),
        ((w.HIGHEST, 4096, RESERVE, RW), "ERROR_INVALID_ADDRESS"),
        ((BASE + KIB64, 4096, COMMIT, RW), "ERROR_INVALID_ADDRESS"),
        ((BASE, 2 * KIB64, COMMIT, RW), "ERROR_INVALID_ADDRESS"),
        ((BASE, KIB64, RESERVE | COMMIT, RW), "ERROR_INVALID_ADDRESS"),
        ((0, 1 << 60, RESERVE, RW), "ERROR_NOT_ENOUGH_MEMORY"),
    ],
)
def test_what_cannot_be_allocated(arguments: tuple[int, int, int, int], code: str) -> None:
    space = WindowsSpace()
    space.virtual_alloc(BASE, KIB64, RESERVE, RW)
    with fails(code):
        space.virtual_alloc(*arguments)
    assert space.committed_bytes == 0
    assert space.virtual_query(BASE).state == RESERVE


def test_one_commit_cannot_span_two_reservations() -> None:
    space = WindowsSpace()
    space.virtual_alloc(BASE, KIB64, RESERVE, RW)
    space.virtual_alloc(BASE + KIB64, KIB64, RESERVE, RW)
    with fails("ERROR_INVALID_ADDRESS"):
        space.virtual_alloc(BASE, 2 * KIB64, COMMIT, RW)


def test_decommit_keeps_the_reservation_and_release_does_not() -> None:
    space = WindowsSpace()
    space.virtual_alloc(BASE, KIB64, RESERVE | COMMIT, RW)
    space.virtual_free(BASE + 4096, 8192, w.MEM_DECOMMIT)
    assert space.committed_bytes == KIB64 - 8192
    assert space.virtual_query(BASE + 4096).state == RESERVE
    space.virtual_free(BASE + 4096, 8192, w.MEM_DECOMMIT)
    space.virtual_free(BASE, 0, w.MEM_DECOMMIT)
    assert space.committed_bytes == 0
    assert space.virtual_query(BASE).size_bytes == KIB64
    space.virtual_free(BASE, 0, w.MEM_RELEASE)
    assert space.virtual_query(BASE).state == w.MEM_FREE
    assert space.virtual_alloc(BASE, KIB64, RESERVE, RW) == BASE


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((BASE, 4096, w.MEM_RELEASE), "ERROR_INVALID_PARAMETER"),
        ((BASE + 4096, 0, w.MEM_RELEASE), "ERROR_INVALID_ADDRESS"),
        ((BASE + KIB64, 0, w.MEM_RELEASE), "ERROR_INVALID_ADDRESS"),
        ((BASE, 0, w.MEM_RELEASE | w.MEM_DECOMMIT), "ERROR_INVALID_PARAMETER"),
        ((BASE, 0, 0), "ERROR_INVALID_PARAMETER"),
        ((BASE + 4096, 0, w.MEM_DECOMMIT), "ERROR_INVALID_ADDRESS"),
        ((BASE, KIB64 + 1, w.MEM_DECOMMIT), "ERROR_INVALID_PARAMETER"),
    ],
)
def test_what_cannot_be_freed(arguments: tuple[int, int, int], code: str) -> None:
    space = WindowsSpace()
    space.virtual_alloc(BASE, KIB64, RESERVE | COMMIT, RW)
    with fails(code):
        space.virtual_free(*arguments)
    assert space.committed_bytes == KIB64


def test_protect_returns_what_was_and_needs_committed_pages() -> None:
    space = WindowsSpace()
    space.virtual_alloc(BASE, KIB64, RESERVE, RW)
    space.virtual_alloc(BASE, 8192, COMMIT, RW)
    assert space.virtual_protect(BASE + 4095, 2, RO) == RW
    assert space.touch(BASE + 4096, write=True) == w.STATUS_ACCESS_VIOLATION
    assert space.touch(BASE + 4096) == 0
    for start, size in ((BASE, 8193), (BASE + 8192, 1), (BASE + KIB64, 1), (BASE, 0)):
        with fails("ERROR_INVALID_ADDRESS"):
            space.virtual_protect(start, size, RW)
    with fails("ERROR_INVALID_PARAMETER"):
        space.virtual_protect(BASE, 1, 3)
    assert space.virtual_protect(BASE, 1, RW) == RO


def test_a_guard_page_warns_once() -> None:
    space = WindowsSpace()
    space.virtual_alloc(BASE, 3 * 4096, RESERVE | COMMIT, RW)
    space.virtual_protect(BASE + 4096, 1, RW | w.PAGE_GUARD)
    assert space.touch(BASE, write=True) == 0
    assert space.touch(BASE + 5000, write=True) == w.STATUS_GUARD_PAGE_VIOLATION
    assert space.touch(BASE + 5000, write=True) == 0
    assert space.virtual_query(BASE).size_bytes == 3 * 4096


def test_another_process_needs_the_right() -> None:
    space = WindowsSpace()
    handle = space.open(w.PROCESS_VM_OPERATION)
    assert handle.virtual_alloc_ex(BASE, 4096, RESERVE | COMMIT, RW) == BASE
    assert handle.virtual_protect_ex(BASE, 1, RO) == RW
    reader = space.open(w.PROCESS_VM_READ)
    for refused in (
        lambda: reader.virtual_alloc_ex(0, 4096, RESERVE, RW),
        lambda: reader.virtual_free_ex(BASE, 0, w.MEM_RELEASE),
        lambda: reader.virtual_protect_ex(BASE, 1, RW),
    ):
        with fails("ERROR_ACCESS_DENIED"):
            refused()
    handle.virtual_free_ex(BASE, 0, w.MEM_RELEASE)
    assert space.virtual_query(BASE).state == w.MEM_FREE
