"""What a region shows is lent: the same bytes, paid for by a bank, taken back without harm to the region."""

import asyncio
import gzip
import mmap
import os
import pathlib
import signal

import numpy as np
import pytest
from brokers import Inside, children, inside
from support import PAGE, pattern

import quire
import quire.aio
from quire.errors import PageError, QuotaExceeded, Revoked

MIB = 1 << 20
SIZE = 5 * MIB + 123
LIAR = """
from quire.broker import borrowed
borrowed.Lease._take_away = lambda self, start, stop: None
"""


@pytest.fixture
def broker(tmp_path: pathlib.Path):
    with inside(tmp_path / "broker", move_ms=5000) as running:
        yield running
        assert running.audit() == []


@pytest.fixture
def owner(broker: Inside):
    with quire.connect(broker.path) as connected:
        yield connected


@pytest.fixture
def data() -> np.ndarray:
    return pattern(SIZE, 12)


@pytest.fixture
def path(tmp_path: pathlib.Path, data: np.ndarray) -> pathlib.Path:
    """The data, compressed."""
    file = tmp_path / "data.gz"
    file.write_bytes(gzip.compress(data.tobytes(), 1))
    return file


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
@pytest.mark.parametrize(("offset", "length"), [(0, None), (12_345, 3 * MIB + 1), (SIZE - 1, 1)])
def test_lessees_see_what_the_region_shows(broker, owner, data, path, shared, offset, length) -> None:
    with quire.open(path, shared=shared) as region, children(broker.path, 1) as (child,):
        handle = owner.lend(region, offset, length)
        expected = data[offset:][:length]
        described = owner.describe(handle)
        assert (described.kind, described.size_bytes, described.sealed) == ("memory", len(expected), True)
        padded = -(-len(expected) // PAGE) * PAGE
        assert owner.describe(owner.bank).used == [padded, 1, 1]
        owner.publish(handle, "region")
        child("lease = c.lease(c.open('region'))")
        assert child("lease.size") == len(expected)
        assert child("int(lease.array('u1').astype('u8').sum())") == int(expected.astype("u8").sum())
        with owner.lease(handle) as lease:
            assert lease.read(0, lease.size) == expected.tobytes()


def test_nobody_can_write_to_it(owner, path) -> None:
    with quire.open(path) as region:
        handle = owner.lend(region, 0, PAGE)
        assert owner.holders(handle) == []
        with pytest.raises(PermissionError):
            owner.lease(handle, write=True)


@pytest.mark.parametrize("forced", [False, True], ids=["asked", "forced"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_taking_it_back_does_nothing_to_the_region_or_to_others(
    broker, owner, data, path, shared, forced
) -> None:
    with quire.open(path, shared=shared) as region, children(broker.path, 2) as (child, other):
        handle = owner.lend(region, MIB, 3 * MIB, extent_bytes=MIB)
        owner.publish(handle, "region")
        child(LIAR if forced else "")
        for each in (child, other):
            each("lease = c.lease(c.open('region')); a = lease.array('u1')")
        (outcome,) = owner.revoke(handle, client=child("c.number"), deadline_ms=5000).outcomes
        assert outcome.result == ("cut" if forced else "released")
        child.begin("a[5]")
        assert child.process.wait(10) == -signal.SIGBUS
        assert other("a.tobytes()") == data[MIB : 4 * MIB].tobytes()
        assert np.array_equal(region.array("u1"), data)
        region.discard()
        assert np.array_equal(region.array("u1"), data)
        assert other("a.tobytes()") == data[MIB : 4 * MIB].tobytes()
        owner.destroy(handle, deadline_ms=5000)
        assert owner.describe(owner.bank).used == [0, 0, 0]
        assert np.array_equal(region.array("u1"), data)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_with_discard_there_is_one_copy_in_the_end(owner, data, path, shared) -> None:
    with quire.open(path, shared=shared, discard="never") as region:
        window = region.window_bytes
        region.prefetch()
        first, last = window + 5, SIZE - window - 5
        handle = owner.lend(region, first, last - first, discard=True)
        # Windows that are not wholly in the range stay.
        outside = {0, window, (SIZE - 1) // window * window, (last // window) * window}
        resident = {
            start for at, end in region.resident() for start in range(at // window * window, end, window)
        }
        assert resident <= outside
        assert region.stats.refills == 0
        with owner.lease(handle) as lease:
            assert lease[:] == data[first:last].tobytes()
        assert np.array_equal(region.array("u1"), data)


def test_a_bank_that_cannot_pay_fills_nothing(owner, path) -> None:
    poor = owner.make_bank(MIB)
    with quire.open(path) as region:
        with pytest.raises(QuotaExceeded):
            owner.lend(region, bank=poor)
        assert region.stats.fills == 0
        assert owner.describe(poor).used == [0, 0, 0]
        handle = owner.lend(region, 0, MIB, bank=poor)
        assert owner.describe(poor).used == [MIB, 1, 1]
        owner.destroy(handle)


def test_a_region_that_cannot_be_filled_leaves_nothing_behind(owner, tmp_path) -> None:
    file = tmp_path / "plain"
    file.write_bytes(pattern(4 * MIB, 1).tobytes())
    with quire.open(file) as region:
        os.truncate(file, 2 * MIB)
        with pytest.raises(PageError):
            owner.lend(region)
    assert owner.describe(owner.bank).used == [0, 0, 0]
    assert owner._borrowed.all() == []


def test_a_bank_that_is_destroyed_while_it_is_filled(broker, owner, path) -> None:
    bank = owner.make_bank(8 * MIB)
    with quire.connect(broker.path) as other, quire.open(path) as region:
        owner.publish(bank, "bank", bank.rights)
        same = other.open("bank")

        class Slow:
            """Destroys the bank before the third piece is read."""

            window_bytes = region.window_bytes
            reads = 0

            def _range(self, offset: int, length: int | None) -> tuple[int, int]:
                return region._range(offset, length)

            def read(self, offset: int, length: int) -> bytes:
                self.reads += 1
                if self.reads == 3:
                    other.destroy(same, deadline_ms=5000)
                return region.read(offset, length)

        with pytest.raises(Revoked):
            owner.lend(Slow(), bank=bank)
        broker.wait(lambda world: not world.objects)
    assert owner.describe(owner.bank).used == [0, 0, 0]


def test_ranges_outside_and_closed_regions_are_refused(owner, path) -> None:
    with quire.open(path) as region:
        for offset, length in ((0, 0), (SIZE, None), (-1, 1), (0, SIZE + 1)):
            with pytest.raises(ValueError, match="byte"):
                owner.lend(region, offset, length)
    with pytest.raises(ValueError, match="closed"):
        owner.lend(region)
    assert owner.describe(owner.bank).used == [0, 0, 0]


def test_store_is_checked(owner) -> None:
    handle, lease = owner.memory(PAGE)
    lease.store(PAGE - 2, b"ab")
    assert lease[PAGE - 2 :] == b"ab"
    for offset in (-1, PAGE - 1, PAGE + 1):
        with pytest.raises(ValueError, match="not within"):
            lease.store(offset, b"cd")
    with owner.lease(handle) as reading, pytest.raises(PermissionError):
        reading.store(0, b"a")
    owner.destroy(handle, deadline_ms=5000)
    with pytest.raises(Revoked):
        lease.store(0, b"a")


def test_asyncio_lends_too(broker, data, path) -> None:
    async def run() -> bytes:
        client = await quire.aio.connect(broker.path)
        async with client:
            with quire.open(path) as region:
                handle = await client.lend(region, 7, 2 * MIB)
                lease = await client.lease(handle)
                copied = lease.read(0, lease.size)
                await client.give_back(lease)
                return copied

    assert asyncio.run(run()) == data[7:][: 2 * MIB].tobytes()


def test_why_pages_of_a_region_are_not_lent_themselves(data, path) -> None:
    """A mapping of a region's own file, with no pager behind it, is wrong, and could not be cut off."""
    with quire.open(path, shared=True, discard="never") as region:
        region.prefetch()
        descriptor = region.shared_fileno()
        with mmap.mmap(descriptor, SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as lessee:
            assert lessee[: 2 * MIB] == data[: 2 * MIB].tobytes()
            region.discard(0, MIB)
            # Zeros where the owner's touch is filled; and reading them allocates what nobody has paid for.
            assert lessee[:MIB] == bytes(MIB)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
