"""What a bare touch of lent memory says when it fails, and that it ends as it would otherwise."""

import pathlib
import signal
import subprocess
import sys

import pytest
from brokers import Child, Inside, children, inside
from support import PAGE

import quire
from quire.broker.area import Area

SIZE = 16 * PAGE
LIAR = """
from quire.broker import borrowed
borrowed.Lease._take_away = lambda self, start, stop: None
"""


@pytest.fixture
def broker(tmp_path: pathlib.Path):
    with inside(tmp_path / "broker", move_ms=5000) as running:
        yield running


@pytest.fixture
def lent(broker: Inside, tmp_path: pathlib.Path):
    """An owner, memory that is published, and a child whose standard error is a file."""
    with quire.connect(broker.path) as owner, children(broker.path, 1) as (child,):
        handle, _ = owner.memory(SIZE)
        owner.publish(handle, "memory")
        child(f"os.dup2(os.open({str(tmp_path / 'said')!r}, os.O_CREAT | os.O_WRONLY), 2)")
        yield owner, handle, child


def borrow(child: Child) -> int:
    child("lease = c.lease(c.open('memory'), 100, 5 * 4096); a = lease.array('u1')")
    return child("lease._number")


def said(tmp_path: pathlib.Path) -> str:
    return (tmp_path / "said").read_text()


@pytest.mark.parametrize("how", ["asked", "forced", "destroyed", "given back"])
def test_a_touch_says_which_lease_and_where(lent, tmp_path, how) -> None:
    owner, handle, child = lent
    child(LIAR if how == "forced" else "")
    number = borrow(child)
    if how == "given back":
        child("lease.close()")
    elif how == "destroyed":
        owner.destroy(handle, deadline_ms=5000)
    else:
        owner.revoke(handle, deadline_ms=5000)
    child.begin("a[4096]")
    assert child.process.wait(10) == -signal.SIGBUS
    why = "given back by this process" if how == "given back" else "taken back by the broker"
    assert said(tmp_path) == f"quire: lease {number} of 20480 bytes was {why}; touched at offset 4096\n"


def test_what_was_not_taken_back_is_silent_and_the_rest_speaks(lent, tmp_path) -> None:
    owner, handle, child = lent
    number = borrow(child)
    owner.revoke(handle, 0, 2 * PAGE, deadline_ms=5000)
    assert child("int(a[3 * 4096])") == 0
    assert said(tmp_path) == ""
    child.begin("a[0]")
    assert child.process.wait(10) == -signal.SIGBUS
    assert said(tmp_path) == (
        f"quire: lease {number} of 20480 bytes was taken back by the broker; touched at offset 0\n"
    )


@pytest.mark.parametrize("before", [True, False], ids=["revoked before the fork", "lent"])
def test_a_forked_child_says_so_too(lent, tmp_path, before) -> None:
    owner, handle, child = lent
    number = borrow(child)
    if before:
        owner.revoke(handle, deadline_ms=5000)
    child("pid = os.fork()\nif pid == 0:\n    a[7]; os._exit(0)")
    ended = signal.SIGBUS if before else signal.SIGSEGV
    assert child("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == -ended
    assert said(tmp_path) == (
        f"quire: lease {number} of 20480 bytes belongs to the process that this one was forked from, "
        "and is not mapped here; touched at offset 7\n"
    )


def test_a_store_to_what_is_lent_for_reading_is_nothing_about_lending(lent, tmp_path) -> None:
    _, _, child = lent
    borrow(child)
    child.begin("ctypes.memset(lease.address, 1, 1)")
    assert child.process.wait(10) == -signal.SIGSEGV
    assert said(tmp_path) == ""


def test_a_system_call_fails_and_nothing_is_said(lent, tmp_path) -> None:
    owner, handle, child = lent
    borrow(child)
    owner.revoke(handle, deadline_ms=5000)
    child("r, w = os.pipe()")
    with pytest.raises(AssertionError, match="Bad address"):
        child("os.write(w, a)")
    assert said(tmp_path) == ""


def test_the_handler_before_is_called_after_the_line(lent, tmp_path) -> None:
    owner, handle, child = lent
    child("import faulthandler; faulthandler.enable()")
    number = borrow(child)
    owner.revoke(handle, deadline_ms=5000)
    child.begin("a[4096]")
    assert child.process.wait(10) == -signal.SIGBUS
    first, rest = said(tmp_path).split("\n", 1)
    assert (
        first == f"quire: lease {number} of 20480 bytes was taken back by the broker; touched at offset 4096"
    )
    assert "Fatal Python error: Bus error" in rest


def test_more_leases_than_the_handler_knows_have_no_line_and_places_are_used_again() -> None:
    """In a process of its own: the table is one for the whole process."""
    program = """
import os, sys
from quire.broker.area import Area
areas = []
for number in range(int(sys.argv[1])):
    area = Area(4096)
    area.announce(number, 0, 4096)
    area.cut(0, 4096)
    areas.append(area)
area = areas[int(sys.argv[2])]
if len(sys.argv) > 3:
    del areas[0]
    area = Area(4096)
    area.announce(9999, 0, 4096)
    area.cut(0, 4096)
area.view(0, 4096, False)[0]
"""

    def run(*arguments: int) -> str:
        argv = [sys.executable, "-c", program, *map(str, arguments)]
        ended = subprocess.run(argv, stderr=subprocess.PIPE, text=True, check=False)
        assert ended.returncode == -signal.SIGBUS
        return ended.stderr

    assert run(2050, 2047).startswith("quire: lease 2047 of 4096 bytes was taken back")
    assert run(2050, 2049) == ""
    assert run(2050, 2049, 1).startswith("quire: lease 9999 of 4096 bytes was taken back")


def test_addresses_are_forgotten_with_the_last_view() -> None:
    program = """
import ctypes, os
from quire.broker.area import Area
area = Area(4096)
area.announce(5, 0, 4096)
area.cut(0, 4096)
address = area.address
del area
ctypes.string_at(address, 1)
"""
    ended = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
    assert ended.stderr == ""


def test_ranges_that_wrap_around_are_refused() -> None:
    area = Area(PAGE)
    area.length = 2**64 - 1
    with pytest.raises(ValueError, match="wraps"):
        area.announce(1, 0, 1)
    area.length = PAGE
