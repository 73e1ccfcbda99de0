"""Parts of leases, and the descriptors that lessees are given."""

import itertools
import os

from hypothesis import given, settings
from hypothesis import strategies as st
from support import PAGE

from quire.broker import readers
from quire.broker.banks import UNLIMITED, Bank
from quire.broker.leases import Lease
from quire.broker.objects import Extent, Memory, allocate
from quire.broker.sessions import Session

PAGES = 48


def memory(extent_pages: int, descriptors: int = 0) -> Memory:
    made = Memory(1, Bank(1, UNLIMITED, None), PAGES * PAGE, extent_pages * PAGE, shared=False, maker=1)
    for index in range(made.extent_count):
        made.extents.append(Extent(made, index, 10 + index, allocate(PAGE)[0] if descriptors else -1))
    return made


def session() -> Session:
    return Session(1, b"", os.getpid(), os.getuid(), Bank(2, UNLIMITED, None))


bounds = st.one_of(st.integers(0, PAGES), st.sampled_from([8, 16, 20]))
ranges = st.tuples(bounds, bounds).map(sorted)


@settings(deadline=None)
@given(st.integers(1, 16), ranges.filter(lambda ends: ends[0] < ends[1]), st.lists(ranges, max_size=12))
def test_parts_of_a_lease_are_the_pages_that_are_left(extent_pages, whole, cuts) -> None:
    """Compared with a set of pages after each cut, and so are the extents that know of the lease."""
    made = memory(extent_pages)
    lease = Lease(5, made, session(), [(whole[0] * PAGE, whole[1] * PAGE)], False)
    pages = set(range(*whole))
    for start, stop in cuts:
        before = lease.spans
        parts = list(before)
        # A range without pages takes nothing and splits nothing.
        inside = start > 0 and {start - 1, *range(start, stop), stop} <= pages and start < stop
        assert lease.splits(start * PAGE, stop * PAGE) == bool(inside)
        lease.cut(start * PAGE, stop * PAGE)
        assert before == parts, "a list that the journal has was changed"
        pages -= set(range(start, stop))
        assert [page for a, b in lease.spans for page in range(a // PAGE, b // PAGE)] == sorted(pages)
        # Ascending, none empty, no two that touch.
        ends = [end for span in lease.spans for end in span]
        assert all(a < b for a, b in itertools.pairwise(ends))
        knowing = [extent.index for extent in made.extents if lease in extent.leases]
        assert knowing == sorted({page // extent_pages for page in pages})
        assert [extent.index for extent in lease.extents()] == knowing
        assert (lease in made.leases) == bool(pages)


def test_descriptors_for_reading_are_kept_bounded_and_renewed() -> None:
    made = memory(1, descriptors=1)
    kept = readers.Readers()
    try:
        for extent in made.extents[:4]:
            for _ in range(2):
                descriptor = kept.open(extent)
                assert os.fstat(descriptor).st_ino == os.fstat(extent.descriptor).st_ino
                assert not os.get_inheritable(descriptor)
                try:
                    os.write(descriptor, b"x")
                except OSError as error:
                    assert error.errno == 9  # noqa: PT017 - what is expected is that it fails
                else:
                    raise AssertionError("a lessee could write")
                os.close(descriptor)
        assert len(kept) == 4
        # Moved to other pages.
        moved = made.extents[0]
        os.close(moved.descriptor)
        moved.descriptor, moved.generation = allocate(PAGE)[0], 1
        descriptor = kept.open(moved)
        assert os.fstat(descriptor).st_ino == os.fstat(moved.descriptor).st_ino
        os.close(descriptor)
        kept.drop(made.extents[1].serial)
        kept.drop(made.extents[1].serial)
        assert len(kept) == 3
        for serial in range(1000, 1000 + readers._MOST):
            descriptor = kept.open(Extent(made, 0, serial, moved.descriptor))
            os.close(descriptor)
        assert len(kept) == readers._MOST
        assert moved.serial not in kept._kept
    finally:
        kept.close()
        for extent in made.extents:
            os.close(extent.descriptor)
    assert len(kept) == 0


def test_lessees_share_an_offset_and_nothing_else() -> None:
    """What docs/security.md says that one can see of another."""
    made = memory(1, descriptors=1)
    kept = readers.Readers()
    try:
        one, other = kept.open(made.extents[0]), kept.open(made.extents[0])
        os.lseek(one, 100, os.SEEK_SET)
        assert os.lseek(other, 0, os.SEEK_CUR) == 100
        assert os.lseek(made.extents[0].descriptor, 0, os.SEEK_CUR) == 0
        os.close(one)
        os.close(other)
    finally:
        kept.close()
        for extent in made.extents:
            os.close(extent.descriptor)
