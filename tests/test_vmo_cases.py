"""The cases that Zircon tests for clones of virtual memory objects, for segments, snapshots and forks.

Borrowed from the list of Zircon's core test ``vmo-clone2`` (BSD licence): every operation by call and by
mapping, parents and children that end in every order, loops that must not waste memory, zero pages, resizing,
progressive and many clones.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from support import (
    MIB,
    PAGE,
    changed_ranges,
    content,
    descriptor_count,
    layer_bytes,
    nothing_left,
    pattern,
    run_again_with_comparison,
    status_bytes,
    view,
    vma_count,
)

import quire

Memory = quire.Segment | quire.Mapping
Store = Callable[[Memory, int, bytes], None]
Fetch = Callable[[Memory, int, int], bytes]


def store_by_call(memory: Memory, offset: int, data: bytes) -> None:
    memory[offset : offset + len(data)] = data


def store_by_mapping(memory: Memory, offset: int, data: bytes) -> None:
    memory.array(np.uint8)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)


def fetch_by_call(memory: Memory, offset: int, length: int) -> bytes:
    return memory[offset : offset + length]


def fetch_by_mapping(memory: Memory, offset: int, length: int) -> bytes:
    return memory.array(np.uint8)[offset : offset + length].tobytes()


by_call_and_by_mapping = pytest.mark.parametrize(
    ("store", "fetch"),
    [(store_by_call, fetch_by_call), (store_by_mapping, fetch_by_mapping)],
    ids=["call", "mapping"],
)


@pytest.fixture(autouse=True)
def _nothing_leaks():
    with nothing_left():
        yield


def page_of(number: int) -> bytes:
    return bytes([number]) * PAGE


@by_call_and_by_mapping
def test_read(store: Store, fetch: Fetch) -> None:
    with quire.Segment(PAGE) as parent:
        store(parent, 0, page_of(1))
        snapshot = parent.snapshot()
        with snapshot.fork() as child, snapshot.map() as mapping:
            assert fetch(parent, 0, PAGE) == fetch(child, 0, PAGE) == fetch(mapping, 0, PAGE) == page_of(1)


@by_call_and_by_mapping
def test_write_of_the_child_stays_there(store: Store, fetch: Fetch) -> None:
    with quire.Segment(PAGE) as parent:
        store(parent, 0, page_of(1))
        snapshot = parent.snapshot()
        with snapshot.fork() as child:
            store(child, 0, page_of(2))
            assert fetch(parent, 0, PAGE) == content(snapshot) == page_of(1)
            assert fetch(child, 0, PAGE) == content(child.snapshot()) == page_of(2)


@by_call_and_by_mapping
def test_write_of_the_parent_stays_there(store: Store, fetch: Fetch) -> None:
    with quire.Segment(PAGE) as parent:
        store(parent, 0, page_of(1))
        snapshot = parent.snapshot()
        with snapshot.fork() as child:
            store(parent, 0, page_of(2))
            assert fetch(child, 0, PAGE) == content(snapshot) == page_of(1)
            assert fetch(parent, 0, PAGE) == content(parent.snapshot()) == page_of(2)


@by_call_and_by_mapping
def test_write_of_a_private_mapping_stays_there(store: Store, fetch: Fetch) -> None:
    with quire.Segment(3 * PAGE) as parent:
        store(parent, 0, page_of(1) * 3)
        snapshot = parent.snapshot()
        with snapshot.map(private=True) as mine, snapshot.map() as other:
            store(mine, PAGE, page_of(9))
            assert fetch(mine, 0, 3 * PAGE) == page_of(1) + page_of(9) + page_of(1)
            assert fetch(other, 0, 3 * PAGE) == content(snapshot) == page_of(1) * 3
            assert fetch(parent, 0, 3 * PAGE) == page_of(1) * 3


@by_call_and_by_mapping
def test_writes_to_parent_child_and_grandchild(store: Store, fetch: Fetch) -> None:
    with quire.Segment(4 * PAGE) as parent:
        store(parent, 0, page_of(1) * 4)
        with parent.snapshot().fork() as child:
            store(child, PAGE, page_of(2))
            with child.snapshot().fork() as grandchild:
                store(grandchild, 2 * PAGE, page_of(3))
                store(child, 3 * PAGE, page_of(4))
                store(parent, 0, page_of(5))
                assert fetch(parent, 0, 4 * PAGE) == page_of(5) + page_of(1) * 3
                assert fetch(child, 0, 4 * PAGE) == page_of(1) + page_of(2) + page_of(1) + page_of(4)
                assert fetch(grandchild, 0, 4 * PAGE) == page_of(1) + page_of(2) + page_of(3) + page_of(1)


@by_call_and_by_mapping
@pytest.mark.parametrize("parent_first", [True, False])
def test_one_ends_before_the_other(store: Store, fetch: Fetch, parent_first: bool) -> None:
    parent = quire.Segment(2 * PAGE)
    store(parent, 0, page_of(1) * 2)
    snapshot = parent.snapshot()
    child = snapshot.fork()
    store(child, 0, page_of(2))
    store(parent, PAGE, page_of(3))
    snapshot.close()
    gone, kept, expected = (
        (parent, child, page_of(2) + page_of(1)) if parent_first else (child, parent, page_of(1) + page_of(3))
    )
    gone.close()
    with pytest.raises(ValueError, match="closed"):
        fetch(gone, 0, 1)
    assert fetch(kept, 0, 2 * PAGE) == expected
    store(kept, 0, page_of(7))
    assert content(kept.snapshot()) == page_of(7) + expected[PAGE:]
    kept.close()


NAMES = ("segment", "snapshot", "mapping", "fork", "version of fork")


@pytest.mark.parametrize(
    "order", list(itertools.permutations(range(5))), ids=lambda order: "".join(map(str, order))
)
def test_every_order_of_closing(order: tuple[int, ...]) -> None:
    segment = quire.Segment(5 * PAGE)
    segment[:] = page_of(1) * 5
    snapshot = segment.snapshot()
    mapping = snapshot.map()
    fork = snapshot.fork()
    fork[PAGE : 2 * PAGE] = page_of(2)
    version = fork.snapshot()
    segment[:PAGE] = page_of(3)
    fork[2 * PAGE : 3 * PAGE] = page_of(4)
    expected = {
        0: page_of(3) + page_of(1) * 4,
        1: page_of(1) * 5,
        2: page_of(1) * 5,
        3: page_of(1) + page_of(2) + page_of(4) + page_of(1) * 2,
        4: page_of(1) + page_of(2) + page_of(1) * 3,
    }
    objects = {0: segment, 1: snapshot, 2: mapping, 3: fork, 4: version}
    for number in order:
        objects.pop(number).close()
        for other, left in objects.items():
            now = content(left) if isinstance(left, quire.Snapshot) else left[:]
            assert now == expected[other], f"{NAMES[other]} after {NAMES[number]} was closed"


def test_a_chain_of_forks_wastes_nothing() -> None:
    size = 64 * PAGE
    segment = quire.Segment.from_buffer(pattern(size, 1))
    model = bytearray(segment[:])
    vmas = vma_count()
    for number in range(500):
        at = number % 64 * PAGE + number % PAGE
        segment[at] = model[at] = number % 256
        version = segment.snapshot()
        segment.close()
        segment = version.fork()
        assert version.layers <= 64
        assert vma_count() <= vmas + 2 * 64 + 16
        memory = layer_bytes([version]) + segment.memory()["private"]
        # Live content, a quarter of it, and for each layer a trailer and a path of nodes.
        assert memory <= 1.25 * size + version.layers * 3 * PAGE, f"{memory} bytes after {number} forks"
    version._core.check_invariants()
    assert segment[:] == content(version) == model
    version.close()
    segment.close()


def test_a_loop_of_snapshots_wastes_nothing() -> None:
    size = MIB
    with quire.Segment.from_buffer(pattern(size, 1)) as segment:
        model = bytearray(segment[:])
        segment.snapshot().close()
        descriptors, vmas = descriptor_count(), vma_count()
        for number in range(2000):
            at = number * 7919 % size
            segment[at] = model[at] = number % 256
            snapshot = segment.snapshot()
            if number % 50 == 0 or number > 1990:
                memory = layer_bytes([snapshot]) + segment.memory()["private"]
                assert memory <= 1.25 * size + snapshot.layers * 3 * PAGE, f"{memory} bytes after {number}"
                assert descriptor_count() <= descriptors + 64
                assert vma_count() <= vmas + 2 * size // PAGE
            snapshot.close()
        assert segment[:] == model


def test_a_loop_without_changes_makes_no_layer() -> None:
    with quire.Segment.from_buffer(pattern(MIB, 1)) as segment:
        first = segment.snapshot()
        for _ in range(2000):
            again = segment.snapshot()
            assert again._core.layer_keys() == first._core.layer_keys()
            assert again.stats.pages_copied == 0
            again.close()
        first.close()


@by_call_and_by_mapping
def test_zero_pages_cost_nothing(store: Store, fetch: Fetch) -> None:
    with quire.Segment(64 * MIB) as segment:
        empty = segment.snapshot()
        assert layer_bytes([empty]) <= 4 * PAGE
        with empty.map() as mapping:
            assert fetch(mapping, 33 * MIB, 3 * PAGE) == bytes(3 * PAGE)
        store(segment, 5 * MIB, page_of(1))
        one = segment.snapshot()
        assert one.diff(empty) == [(5 * MIB, 5 * MIB + PAGE)]
        store(segment, 5 * MIB, bytes(PAGE))
        again = segment.snapshot()
        assert again.diff(empty) == []
        assert again.diff(one) == [(5 * MIB, 5 * MIB + PAGE)]
        assert again._core.check_invariants() == 0


def test_zeros_over_zeros_are_no_change() -> None:
    with quire.Segment(8 * MIB) as segment:
        empty = segment.snapshot()
        segment.array(np.uint8)[:] = 0
        again = segment.snapshot()
        assert again.diff(empty) == []
        assert again._core.check_invariants() == 0
        assert layer_bytes([again]) <= 8 * PAGE


def test_a_fork_of_zeros() -> None:
    with quire.Segment(3 * PAGE + 5) as segment:
        with segment.snapshot().fork() as child:
            assert child[:] == bytes(3 * PAGE + 5)
            child[3 * PAGE + 4] = 1
            assert content(child.snapshot()) == bytes(3 * PAGE + 4) + b"\1"
        assert content(segment.snapshot()) == bytes(3 * PAGE + 5)


@pytest.mark.parametrize("snapshot_before", [False, True])
@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 511 * PAGE, 512 * PAGE])
@pytest.mark.parametrize("more", [1, PAGE - 1, PAGE, 3 * PAGE, 513 * PAGE])
def test_growth(size: int, more: int, snapshot_before: bool) -> None:
    data = pattern(size, 2).tobytes()
    with quire.Segment.from_buffer(data) as segment:
        before = segment.snapshot() if snapshot_before else None
        segment.grow(size + more)
        assert segment.size == size + more
        assert segment[:] == data + bytes(more)
        after = segment.snapshot()
        assert after.size == size + more
        assert content(after) == data + bytes(more)
        segment[size + more - 1] = 9
        last = segment.snapshot()
        assert content(last) == data + bytes(more - 1) + b"\x09"
        assert last.diff(after) == changed_ranges(content(after), content(last))
        if before is not None:
            assert before.size == size
            assert content(before) == data
            assert after.diff(before) == before.diff(after) == changed_ranges(data, content(after))
        with after.fork() as child:
            child.grow(size + 2 * more)
            assert child[:] == data + bytes(2 * more)
            assert content(child.snapshot()) == data + bytes(2 * more)


def test_growth_of_the_parent_leaves_the_child() -> None:
    with quire.Segment.from_buffer(page_of(1) * 2) as parent:
        snapshot = parent.snapshot()
        with snapshot.fork() as child, snapshot.map() as mapping:
            parent.grow(4 * PAGE)
            parent[2 * PAGE :] = page_of(2) * 2
            assert child.size == mapping.size == 2 * PAGE
            assert child[:] == mapping[:] == page_of(1) * 2
            child.grow(3 * PAGE)
            assert child[:] == page_of(1) * 2 + bytes(PAGE)
            assert parent[:] == page_of(1) * 2 + page_of(2) * 2


def test_progressive_clones() -> None:
    """Each clone changes one page more; all are alive at once."""
    pages = 48
    segment = quire.Segment.from_buffer(bytes(pages * PAGE))
    alive, models = [], []
    model = bytearray(pages * PAGE)
    for number in range(pages):
        segment[number * PAGE : (number + 1) * PAGE] = page_of(number + 1)
        model[number * PAGE : (number + 1) * PAGE] = page_of(number + 1)
        snapshot = segment.snapshot()
        alive.append((segment, snapshot))
        models.append(bytes(model))
        segment = snapshot.fork()
    segment.close()
    for (clone, snapshot), expected in zip(alive, models, strict=True):
        assert clone[:] == expected
        assert content(snapshot) == expected
    # Every page was written once, so all together hold each once.
    together = layer_bytes(snapshot for _, snapshot in alive)
    assert together <= pages * PAGE + pages * 3 * PAGE
    for (clone, snapshot), expected in list(zip(alive, models, strict=True))[::-2]:
        clone.close()
        assert content(snapshot) == expected
        snapshot.close()
    for (clone, _), expected in list(zip(alive, models, strict=True))[::2]:
        if not clone.closed:
            assert clone[:] == expected
            clone.close()


def test_many_clones_share_one_copy() -> None:
    size = 4 * MIB
    with quire.Segment.from_buffer(pattern(size, 3)) as segment:
        data = segment[:]
        snapshot = segment.snapshot()
        before = status_bytes("RssAnon")
        clones = [snapshot.fork() for _ in range(64)]
        mappings = [snapshot.map() for _ in range(64)]
        for number, clone in enumerate(clones):
            clone[number * PAGE] = number
        assert layer_bytes([snapshot]) <= size + 4 * PAGE
        assert all(mapping[:] == data for mapping in mappings)
        for number, clone in enumerate(clones):
            expected = bytearray(data)
            expected[number * PAGE] = number
            assert clone[:] == expected
            assert clone.memory()["private"] <= 2 * PAGE
        assert status_bytes("RssAnon") - before < 4 * size
        for clone in clones[::2] + clones[1::2]:
            clone.close()
        for mapping in mappings:
            mapping.close()


def test_many_children_of_many_versions() -> None:
    size = 32 * PAGE
    with quire.Segment(size) as segment:
        versions = []
        for number in range(150):
            segment[number * 31 % size] = number % 255 + 1
            versions.append((segment.snapshot(), segment[:]))
        for snapshot, expected in versions[::-1]:
            with snapshot.fork() as child:
                assert child[:] == expected
                child[0] ^= 255
                again = child.snapshot()
                assert again.diff(snapshot) == [(0, PAGE)]
        for snapshot, expected in versions:
            assert content(snapshot) == expected


def test_sever_hands_everything_over() -> None:
    with quire.Segment.from_buffer(pattern(3 * MIB + 1, 4)) as segment:
        data = segment[:]
        shown = view(segment)
        severed = segment.sever()
        assert content(severed) == data
        assert not shown.any()
        shown[PAGE] = 7
        assert content(severed) == data
        second = segment.sever()
        assert content(second)[PAGE] == 7
        assert second.diff(quire.Segment(3 * MIB + 1).snapshot()) == [(PAGE, 2 * PAGE)]
        assert not segment.array(np.uint8).any()
        del shown


def test_the_same_with_comparison() -> None:
    run_again_with_comparison(__file__)
