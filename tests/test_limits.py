"""At the limits of the process: calls fail with clear errors, nothing is lost, and they can be repeated."""

import os
import resource
import textwrap

import numpy as np
import pytest
from support import MIB, PAGE, content, descriptor_count, run_forked, run_script, view

import quire

SIZE = 4 * MIB


def limit(kind: int, amount: int) -> None:
    """Set the soft limit, as far as the hard one lets us."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


def lift(kind: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (hard, hard))


@pytest.mark.parametrize("call", ["snapshot", "sever"])
def test_a_first_version_that_cannot_be_sealed_can_be_repeated(call: str) -> None:
    def child() -> None:
        segment = quire.Segment(SIZE)
        array = segment.array("u1")
        array[:] = 7
        # There is room for the content and none for the trailer behind it.
        limit(resource.RLIMIT_FSIZE, SIZE)
        for stored in (1, 2, 3):
            with pytest.raises(OSError, match=r"pwritev: File too large.*RLIMIT_FSIZE"):
                getattr(segment, call)()
            array[stored * PAGE] = stored
            segment[stored * PAGE + 1 : stored * PAGE + 3] = b"ab"
            assert segment[stored * PAGE : stored * PAGE + 3] == bytes([stored]) + b"ab"
        with pytest.raises(OSError, match=r"RLIMIT_FSIZE"):
            segment.grow(2 * SIZE)
        segment.check_invariants()
        lift(resource.RLIMIT_FSIZE)
        expected = np.full(SIZE, 7, np.uint8)
        for stored in (1, 2, 3):
            expected[stored * PAGE : stored * PAGE + 3] = stored, *b"ab"
        with getattr(segment, call)() as version:
            version.verify()
            assert content(version) == expected.tobytes()
        assert segment[:] == (bytes(SIZE) if call == "sever" else expected.tobytes())
        array[5] = 99
        segment.check_invariants()
        with segment.snapshot() as version:
            assert content(version)[5] == 99

    run_forked(child)


def test_growing_goes_on_after_a_first_version_that_failed() -> None:
    def child() -> None:
        segment = quire.Segment(SIZE)
        view(segment)[:] = 7
        limit(resource.RLIMIT_FSIZE, SIZE)
        with pytest.raises(OSError, match="RLIMIT_FSIZE"):
            segment.snapshot()
        lift(resource.RLIMIT_FSIZE)
        segment.grow(2 * SIZE)
        assert segment[:] == b"\7" * SIZE + bytes(SIZE)
        assert content(segment.snapshot()) == b"\7" * SIZE + bytes(SIZE)
        segment.check_invariants()

    run_forked(child)


def test_a_segment_larger_than_a_file_may_be() -> None:
    def child() -> None:
        limit(resource.RLIMIT_FSIZE, MIB)
        before = descriptor_count()
        with pytest.raises(OSError, match=r"ftruncate: File too large.*RLIMIT_FSIZE"):
            quire.Segment(100 * MIB)
        assert descriptor_count() == before

    run_forked(child)


def leave_descriptors(left: int) -> None:
    """Limit the process to so many descriptors more than it has."""
    lift(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    # They are given out lowest first: fill the gaps. One of those listed was the listing itself.
    while os.dup(0) < highest:
        pass
    highest = max(map(int, os.listdir("/proc/self/fd")))
    limit(resource.RLIMIT_NOFILE, highest + left)


@pytest.mark.parametrize("call", ["snapshot", "sever"])
@pytest.mark.parametrize("changed", [False, True])
def test_every_number_of_descriptors_that_may_be_left(call: str, changed: bool) -> None:
    """Whatever step it is that fails, the content is there and the next attempt succeeds."""
    # In a process of its own: what quire opens once may not be open yet.
    run_script(
        textwrap.dedent(
            """
            import sys
            import numpy as np
            from support import MIB, PAGE, content
            from test_limits import leave_descriptors, lift, resource
            import quire

            call, changed = sys.argv[1], sys.argv[2] == "True"
            segment = quire.Segment(32 * MIB)
            array = segment.array("u1")
            array[:: 256 * PAGE] = 1
            array[: 3000 * PAGE] = 2
            if changed:
                segment.snapshot()
                array[: 2500 * PAGE] = 3
            failures = 0
            for left in range(60):
                expected = array.tobytes()
                leave_descriptors(left)
                try:
                    version = getattr(segment, call)()
                except OSError as error:
                    assert "RLIMIT_NOFILE" in str(error), error
                    failures += 1
                    lift(resource.RLIMIT_NOFILE)
                    assert array.tobytes() == expected
                    array[left * 256 * PAGE] ^= 255
                    segment.check_invariants()
                    continue
                lift(resource.RLIMIT_NOFILE)
                assert content(version) == expected
                version.verify()
                break
            else:
                raise AssertionError("never succeeded")
            assert failures >= 1, failures
            assert (array.tobytes() == expected) == (call == "snapshot")
            array[7] = 77
            assert content(segment.snapshot())[7] == 77
            segment.check_invariants()
            # A lack of descriptors that has passed does not make snapshots slow for good.
            assert quire.capabilities().uses.tracking == sys.argv[3]
            """
        ),
        call,
        str(changed),
        quire.capabilities().uses.tracking,
    )


SPARSE = """
import quire
from support import PAGE, status_bytes, vma_count

limit = int(open("/proc/sys/vm/max_map_count").read())
# Mapped one by one they would take two VMAs each, five eighths of the limit.
pages = limit * 5 // 16
segment = quire.Segment(pages * 1024 * PAGE)
array = segment.array("u1")
array[:: 1024 * PAGE] = 1
first = segment.snapshot()
assert vma_count() < limit // 2 + 300, vma_count()
array[0] = 2
array[5 * 1024 * PAGE] = 0
second = segment.snapshot()
assert second.diff(first).total_pages == 2
assert second.stats.pages_copied <= 2
severed = segment.sever()
assert vma_count() < limit // 2 + 300, vma_count()
assert not array[0]
before = status_bytes("RssAnon")
with severed.map() as mapping:
    # A part of the islands is copied in, none of the sea.
    assert status_bytes("RssAnon") - before < pages * 2 * PAGE
    assert mapping[0] == 2
    assert mapping[5 * 1024 * PAGE] == 0
    assert mapping[(pages - 1) * 1024 * PAGE] == 1
"""


@pytest.mark.parametrize("tracking", ["", "compare"])
def test_islands_in_zero_memory_take_a_bounded_number_of_vmas(tracking: str) -> None:
    run_script(SPARSE, env={"QUIRE_TRACKING": tracking})


MANY_HOLES = """
import quire
from support import MIB, PAGE, vma_count

segment = quire.Segment(2048 * MIB)
array = segment.array("u1")
# Islands too far apart to be joined to one run, and everything written again: all stripes are rewritten.
array[:: 20 * PAGE] = 1
segment.snapshot()
array[:: 20 * PAGE] = 2
segment.snapshot()
array[:: 20 * PAGE] = 3
version = segment.snapshot()
assert vma_count() < int(open("/proc/sys/vm/max_map_count").read()) * 3 // 4
shown = version.map().array("u1")
assert (shown[:: 20 * PAGE] == 3).all()
assert not shown[PAGE :: 20 * PAGE].any()
segment.check_invariants()
"""


def test_rewriting_memory_with_many_holes_keeps_vmas_bounded() -> None:
    run_script(MANY_HOLES)


@pytest.mark.parametrize("tracking", ["", "compare"])
def test_severing_memory_with_many_holes(tracking: str) -> None:
    run_script(
        textwrap.dedent(
            """
            import quire
            from support import MIB, PAGE

            segment = quire.Segment(1024 * MIB)
            array = segment.array("u1")
            array[:: 4 * MIB] = 1
            segment.snapshot()
            array[MIB :: 4 * MIB] = 2
            severed = segment.sever().map().array("u1")
            assert (severed[:: 4 * MIB] == 1).all()
            assert (severed[MIB :: 4 * MIB] == 2).all()
            assert not array[:: MIB].any()
            segment.check_invariants()
            """
        ),
        env={"QUIRE_TRACKING": tracking},
    )


def test_a_fault_signal_that_is_sent_ends_the_process_as_ever() -> None:
    """The handler that holds writers, where userfaultfd is refused, lets pass what is no store of ours."""
    run_script(
        textwrap.dedent(
            """
            import os, signal
            from support import MIB, expect_signal
            import quire

            segment = quire.Segment(8 * MIB)
            array = segment.array("u1")
            for value in (1, 2, 3):
                array[:] = value
                segment.snapshot()
            expect_signal(lambda: os.kill(os.getpid(), signal.SIGSEGV))
            """
        ),
        env={"QUIRE_TRACKING": "compare"},
    )
