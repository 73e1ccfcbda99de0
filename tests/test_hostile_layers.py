"""Layers made by somebody who wants to harm: each raises, none crashes, hangs or leaves a descriptor."""

import fcntl
import os
import pathlib
import socket
import struct
import zlib
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerfiles import (
    ALL_SEALS,
    FANOUT,
    PAGE,
    LayerFile,
    layer_id,
    memfd,
    node,
    page,
    run,
    simple,
    with_table,
)
from leaks import no_new_descriptors

from quire import Malformed, NotImmutable, _native


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    with no_new_descriptors():
        yield


def receive(*layers: LayerFile) -> _native.Snapshot:
    return _native.Snapshot.from_fds([layer.descriptor() for layer in layers])


def content(snapshot: _native.Snapshot) -> bytes:
    mapping = _native.Mapping(snapshot)
    with memoryview(mapping) as view:
        return view.tobytes()


def test_right_ones_are_accepted() -> None:
    assert content(receive(simple())) == page(0) + page(1) + page(2)
    shuffled = receive(with_table({0: run(3), 2: run(0), 3: run(1)}, data=[page(i) for i in range(4)]))
    assert content(shuffled) == page(3) + bytes(PAGE) + page(0) + page(1)


def test_two_layers_are_accepted() -> None:
    bottom = LayerFile(2, data=[page(7)])
    top = with_table({0: run(0), 1: run(0, slot=1)}, pages=2, data=[page(0)], imports=[layer_id(2)])
    assert content(receive(top, bottom)) == page(0) + page(7)


TRAILERS = {
    "magic": {"magic": b"QUIRELYX"},
    "version 0": {"version": 0},
    "version 2": {"version": 2},
    "unknown flags": {"flags": 2},
    "a hash where none is announced": {"hash": b"\1" * 32},
    "page size": {"page_size": 16384},
    "empty id": {"id": bytes(16)},
    "data pages 2^63": {"data_pages": 1 << 63},
    "data pages wrap": {"data_pages": (1 << 64) - 1},
    "node pages wrap": {"node_pages": (1 << 64) - 3},
    "one data page too many": {"data_pages": 4},
    "one data page too few": {"data_pages": 2},
    "64 imports": {"imports": 64},
    "2^63 imports": {"imports": 1 << 63},
    "size 2^63": {"size": 1 << 63},
    "size 2^64 - 1": {"size": (1 << 64) - 1},
    "size past the last level": {"size": (1 << 47) + 1},
    "size 0": {"size": 0, "root": 0},
    "a root without a size": {"size": 0},
}


@pytest.mark.parametrize("claims", TRAILERS.values(), ids=TRAILERS)
def test_trailers(claims: dict[str, int | bytes]) -> None:
    layer = simple()
    layer.claims = claims
    with pytest.raises(Malformed):
        receive(layer)


def test_checksum() -> None:
    layer = simple()
    layer.checksum = 1
    with pytest.raises(Malformed):
        receive(layer)


IMPORTS = {
    "twice": [layer_id(2), layer_id(2)],
    "zero": [bytes(16)],
    "itself": [layer_id(1)],
}


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_import_lists(imports: list[bytes]) -> None:
    layer = simple()
    layer.imports = imports
    with pytest.raises(Malformed):
        receive(layer)


@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE, 3 * PAGE, 4 * PAGE - 1, 4 * PAGE + 1, 5 * PAGE])
def test_lengths(length: int) -> None:
    with pytest.raises(Malformed):
        _native.Snapshot.from_fds([memfd(simple().content(), length=length)])


TABLES = {
    "run past the data": with_table({0: run(4)}),
    "run far past the data": with_table({0: run((1 << 48) - 1)}),
    "run that ends past the data": LayerFile(data=[page(0)], size=2 * PAGE, root=run(0)),
    "run that starts too late": LayerFile(data=[page(0), page(1)], size=2 * PAGE, root=run(1)),
    "page named twice": with_table({0: run(1), 1: run(1)}),
    "runs overlap": LayerFile(
        data=[page(i % 250) for i in range(FANOUT + 1)],
        nodes=[{0: run(0), 1: node(1)}, {0: run(5)}],
        size=(FANOUT + 1) * PAGE,
        root=node(0),
    ),
    "node past the nodes": with_table({0: run(0)}, root=node(1)),
    "node far past the nodes": with_table({0: run(0)}, root=node((1 << 48) - 1)),
    "node empty": with_table({}),
    "node at the last level": with_table({0: node(0)}),
    "cycle of one": LayerFile(data=[page(0)], nodes=[{0: node(0)}], size=FANOUT**2 * PAGE, root=node(0)),
    "cycle of two": LayerFile(
        data=[page(0)], nodes=[{0: node(1)}, {0: node(0)}], size=FANOUT**3 * PAGE, root=node(0)
    ),
    "node named twice": LayerFile(
        data=[page(0)], nodes=[{0: node(1), 1: node(1)}, {0: run(0)}], size=2 * FANOUT * PAGE, root=node(0)
    ),
    "kind 3": with_table({0: 3 << 62}),
    "reserved bit 54": with_table({0: run(0) | 1 << 54}),
    "reserved bit 61": with_table({0: run(0) | 1 << 61}),
    "reserved bit in the root": with_table({0: run(0)}, root=node(0) | 1 << 57),
    "zero with an index": with_table({0: run(0), 1: 5}),
    "zero with a slot": with_table({0: run(0), 1: 1 << 48}),
    "slot without an import": with_table({0: run(0, slot=1)}),
    "last slot without an import": with_table({0: run(0, slot=63)}),
    "entry past the end": with_table({0: run(0), 4: run(1)}),
    "last entry past the end": with_table({0: run(0), FANOUT - 1: run(1)}),
    "import that did not come": with_table({0: run(0), 1: run(0, slot=1)}, imports=[layer_id(9)]),
    "slot past the imports": with_table({0: run(0), 1: run(0, slot=2)}, imports=[layer_id(9)]),
    "root is a run of another's pages": LayerFile(size=PAGE, root=run(0, slot=1), imports=[layer_id(9)]),
}


@pytest.mark.parametrize("layer", TABLES.values(), ids=TABLES)
def test_tables(layer: LayerFile) -> None:
    with pytest.raises(Malformed):
        receive(layer)


def test_a_wide_tree_of_shared_nodes_is_refused_quickly() -> None:
    # Each level names one node 512 times: walked without a memory of what was seen, that is 2^35 visits.
    levels = [{place: node(level + 1) for place in range(FANOUT)} for level in range(3)]
    layer = LayerFile(data=[page(0)], nodes=[*levels, {0: run(0)}], size=(1 << 35) * PAGE, root=node(0))
    with pytest.raises(Malformed):
        receive(layer)


def both(top: LayerFile, bottom: LayerFile) -> list[int]:
    return [top.descriptor(), bottom.descriptor()]


def importing(**more: object) -> LayerFile:
    return with_table(
        {0: run(0), 1: run(0, slot=1)}, pages=2, **({"data": [page(0)], "imports": [layer_id(2)]} | more)
    )


def twice(fd: int) -> list[int]:
    return [fd, os.dup(fd)]


def reopened(fd: int) -> list[int]:
    return [fd, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)]


SETS: dict[str, Callable[[], list[int]]] = {
    "none": list,
    "65 layers": lambda: [simple(number).descriptor() for number in range(1, 66)],
    "one layer twice": lambda: twice(simple().descriptor()),
    "one layer opened twice": lambda: reopened(simple().descriptor()),
    "two layers of one id": lambda: both(importing(), LayerFile(1, data=[page(1)])),
    "one that nothing uses": lambda: both(simple(), simple(2)),
    "an import under another id": lambda: both(importing(), LayerFile(3, data=[page(1)])),
    "a run past the import's data": lambda: both(
        importing(nodes=[{0: run(0), 1: run(1, slot=1)}]), simple(2, 1)
    ),
    "a node past the import's nodes": lambda: both(importing(root=node(0, slot=1)), simple(2, 1)),
    "the lower one first": lambda: both(LayerFile(2, data=[page(1)]), importing()),
    "the import imports back": lambda: both(
        LayerFile(1, data=[page(0)], nodes=[{0: node(0, slot=1)}], imports=[layer_id(2)],
                  size=FANOUT**2 * PAGE, root=node(0)),
        LayerFile(2, data=[page(0)], nodes=[{0: node(0, slot=1)}], imports=[layer_id(1)]),
    ),
    "the same page through two layers": lambda: both(
        LayerFile(1, nodes=[{0: node(0, slot=1), 1: run(0, slot=1)}], imports=[layer_id(2)],
                  size=FANOUT * 513 * PAGE, root=node(0)),
        LayerFile(2, data=[page(0)], nodes=[{0: run(0)}]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", SETS.values(), ids=SETS)
def test_sets_of_layers(make: Callable[[], list[int]]) -> None:
    with pytest.raises(Malformed):
        _native.Snapshot.from_fds(make())


@pytest.mark.parametrize(
    "missing", [fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL]
)
def test_half_sealed(missing: int) -> None:
    with pytest.raises(NotImmutable):
        _native.Snapshot.from_fds([simple().descriptor(ALL_SEALS & ~missing)])


def future_write() -> int:
    return simple().descriptor(0x10 | ALL_SEALS & ~fcntl.F_SEAL_WRITE)


def opened(path: str, flags: int = os.O_RDONLY) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


def one_end_of_a_pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def one_end_of_a_socketpair() -> int:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def huge_pages() -> int:
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    os.ftruncate(fd, 2 << 20)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
    return fd


OTHERS: dict[str, Callable[[], int]] = {
    "unsealed": lambda: simple().descriptor(0),
    "sealed against future writes only": future_write,
    "pipe": one_end_of_a_pipe,
    "socket": one_end_of_a_socketpair,
    "device": lambda: opened("/dev/null"),
    "directory": lambda: opened("/"),
    "proc file": lambda: opened("/proc/self/maps"),
    "path only": lambda: opened("/", os.O_PATH),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_descriptors(make: Callable[[], int]) -> None:
    with pytest.raises(NotImmutable):
        _native.Snapshot.from_fds([make()])


def test_memfd_of_huge_pages() -> None:
    try:
        fd = huge_pages()
    except OSError as error:
        pytest.skip(f"no memfd of huge pages here: {error}")
    with pytest.raises((Malformed, NotImmutable)):
        _native.Snapshot.from_fds([fd])


@pytest.mark.parametrize("folder", ["/dev/shm", None])
def test_regular_files(folder: str | None, tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(folder or tmp_path) / f"quire-test-{os.getpid()}"
    try:
        path.write_bytes(simple().content())
        with pytest.raises(NotImmutable):
            _native.Snapshot.from_fds([opened(str(path), os.O_RDWR)])
    finally:
        path.unlink()


def test_one_bad_layer_among_good_ones_closes_all() -> None:
    for place in range(3):
        fds = [simple(number).descriptor() for number in range(1, 4)]
        os.close(fds[place])
        fds[place] = opened("/dev/null")
        with pytest.raises(NotImmutable):
            _native.Snapshot.from_fds(fds)


VICTIM = LayerFile(
    data=[page(i) for i in range(6)],
    nodes=[{0: node(1), 1: node(2)}, {0: run(0), 3: run(2), 511: run(5)}, {0: run(1), 2: run(4)}],
    size=(FANOUT + 3) * PAGE,
    root=node(0),
)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 4 * PAGE - 1), st.integers(1, 255), st.booleans())
def test_any_byte_changed(offset: int, mask: int, right_checksum: bool) -> None:
    """A changed byte of the table or the trailer is refused, or makes another snapshot that is sound."""
    victim = bytearray(VICTIM.content())
    victim[len(victim) - 4 * PAGE + offset] ^= mask
    if right_checksum:
        struct.pack_into("<I", victim, len(victim) - 36, zlib.crc32(victim[-PAGE:-36]))
    try:
        snapshot = _native.Snapshot.from_fds([memfd(bytes(victim))])
    except Malformed:
        return
    snapshot.verify()
    snapshot.check_invariants()
    assert snapshot.size <= 1 << 47
    if snapshot.size < 1 << 30:
        seen = content(snapshot)
        pages = {seen[at : at + PAGE] for at in range(0, snapshot.size // PAGE * PAGE, PAGE)}
        assert pages <= {page(i) for i in range(6)} | {bytes(PAGE)}


def test_a_snapshot_larger_than_the_address_space() -> None:
    snapshot = receive(LayerFile(size=1 << 47))
    assert snapshot.size == 1 << 47
    with pytest.raises(MemoryError, match="address space"):
        _native.Mapping(snapshot)
