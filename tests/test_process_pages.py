"""Pages, find and sharing against processes whose memory is known page by page."""

import ctypes
import os
import pathlib
import subprocess

import numpy as np
import pytest
from brokers import inside
from processes import child

import quire
from quire.process import Kind, pages, sharing
from quire.process.procfs import Folder

PAGE = quire.PAGE_SIZE
MEMORY = """
a = map_memory(64 * PAGE, flags=0x4022)
libc.madvise(a, 64 * PAGE, 15)
for page in (0, 1, 7, 63): touch(a + page * PAGE)
ctypes.string_at(a + 9 * PAGE, 1)
ready(a)
"""


def test_pages_of_private_memory() -> None:
    with child(MEMORY) as (process, words):
        found = quire.maps(process.pid)
        start = int(words[0])
        part = found.pages((start, start + 64 * PAGE))
    assert part.total == 64
    assert list(part.numbers) == [0, 1, 7, 9, 63]
    assert part.present.all()
    assert not part.swapped.any()
    assert not part.file.any()
    if part.zero is None:
        pytest.skip("this kernel has no PAGEMAP_SCAN, which tells pages of zeros")
    assert list(part.numbers[part.zero]) == [9]
    assert list(part.numbers[part.exclusive]) == [0, 1, 7, 63]
    assert part.huge is not None
    assert not part.huge.any()
    assert list(np.flatnonzero(part.spread(part.present))) == [0, 1, 7, 9, 63]
    assert list(part.counts(part.present, 4)) == [4, 0, 0, 1]


def test_the_older_interface_tells_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with child(MEMORY) as (process, words):
        start = int(words[0])
        with Folder(process.pid) as folder:
            scanned = pages.read_pages(folder, start, start + 64 * PAGE)
            # As on a kernel before 6.7.
            monkeypatch.setattr(pages, "_PAGEMAP_SCAN", 0)
            read = pages.read_pages(folder, start, start + 64 * PAGE)
    assert read.huge is None
    assert read.zero is None
    assert list(read.numbers) == list(scanned.numbers)
    assert list(read.words) == list(scanned.words)


def test_frames_are_told_to_root_only() -> None:
    with child(MEMORY) as (process, words):
        part = quire.maps(process.pid).pages((int(words[0]), int(words[0]) + 64 * PAGE))
    if os.geteuid() == 0 and part.has_frames:
        frames = part.frames
        assert frames is not None
        assert len(set(frames.tolist())) == 5
        assert frames.all()
    else:
        assert part.frames is None


def test_a_gibibyte() -> None:
    body = "a = map_memory(1 << 30, flags=0x4022); touch(a, 1); touch(a + (1 << 30) - PAGE, 1); ready(a)"
    with child(body) as (process, words):
        start = int(words[0])
        part = quire.maps(process.pid).pages((start, start + (1 << 30)))
    assert part.numbers[0] == 0
    assert part.numbers[-1] == (1 << 18) - 1


def test_find_a_function() -> None:
    address = ctypes.cast(ctypes.CDLL(None).malloc, ctypes.c_void_p).value
    assert address is not None
    found = quire.maps().find(address + 1)
    assert found.vma is not None
    assert found.vma.kind is Kind.IMAGE
    assert found.file_offset == address + 1 - found.vma.start + found.vma.offset
    assert found.place is not None
    # Names of the C library at this address: malloc, __libc_malloc and the like.
    assert found.place.symbol is not None
    assert "malloc" in found.place.symbol
    assert found.place.symbol_offset == 1
    assert found.place.is_inside
    assert found.place.section == ".text"
    assert found.place.segment is not None
    assert found.place.segment.endswith("r-x")
    assert found.page is not None
    assert found.page.written is False
    assert "malloc" in str(found)


def test_find_agrees_with_the_symbols_that_another_tool_lists() -> None:
    found = quire.maps()
    library = next(vma for vma in found if vma.path and "libc.so" in vma.path and vma.offset == 0)
    assert library.path is not None
    done = subprocess.run(
        ["readelf", "-W", "--dyn-syms", library.path], capture_output=True, text=True, check=True
    )
    checked = 0
    for line in done.stdout.splitlines():
        fields = line.split()
        if (
            len(fields) < 8
            or fields[3] not in ("FUNC", "OBJECT")
            or fields[6] == "UND"
            or not int(fields[2], 0)
        ):
            continue
        checked += 1
        if checked % 300 != 1:
            continue
        value = int(fields[1], 16)
        place = found.find(library.start + value).place
        assert place is not None
        assert place.address == value
        assert place.symbol_offset == 0, f"{fields[7]} at {value:#x}: {place}"
    assert checked > 1000


def test_find_a_variable_that_begins_as_zeros() -> None:
    """Such memory is in no file: its program is the one that ends where it begins."""
    found = quire.maps()
    none = ctypes.addressof(ctypes.c_int.in_dll(ctypes.pythonapi, "Py_OptimizeFlag"))
    place = found.find(none).place
    assert place is not None
    assert place.symbol == "Py_OptimizeFlag"
    assert place.section == ".bss"


def test_find_objects_of_the_library() -> None:
    with quire.Segment(4 * PAGE) as segment, quire.Region(bytes(range(256)) * 1024) as region:
        memoryview(segment)[0] = 1
        with segment.snapshot() as snapshot, snapshot.map() as mapping:
            assert bytes(mapping[:1]) == b"\1"
            assert bytes(region[:1]) == b"\0"
            found = quire.maps()
            for thing in (segment, mapping, region):
                objects = found.find(thing.address).objects
                assert any(repr(thing) in line for line in objects), objects
                vma = found.at(thing.address)
                assert vma is not None
                assert vma.kind is Kind.QUIRE
            layers = found.find(mapping.address).objects
            assert any(f"layer 0 of 1 of {snapshot!r}" in line for line in layers)
            assert any(line.endswith(", filled") for line in found.find(region.address).objects)
            far = found.find(region.address + region.window_bytes).objects
            assert any(line.endswith(", not filled") for line in far)
    assert quire.maps().find(0).objects == ()


def test_find_a_lease(tmp_path: pathlib.Path) -> None:
    with inside(tmp_path / "broker") as broker, quire.connect(broker.path) as owner:
        handle, lease = owner.memory(4 * PAGE)
        owner.publish(handle, "memory")
        with quire.connect(broker.path) as other, other.lease(other.open("memory")) as borrowed:
            for each in (lease, borrowed):
                found = quire.maps()
                (line,) = found.find(each.address + PAGE + 7).objects
                assert line == f"byte {PAGE + 7} of the memory of {each!r}"
                vma = found.at(each.address)
                assert vma is not None
                assert vma.kind is Kind.QUIRE
            owner.revoke(handle, PAGE, PAGE, deadline_ms=5000)
            (line,) = quire.maps().find(borrowed.address + PAGE).objects
            assert line.endswith(", taken back")
            (line,) = quire.maps().find(borrowed.address).objects
            assert line.endswith("partly taken back>")
            address = borrowed.address
        assert quire.maps().find(address).objects == ()
        lease.close()


def test_find_nothing() -> None:
    found = quire.maps()
    nowhere = found.find(4096)
    assert nowhere.vma is None
    assert nowhere.before is None
    assert nowhere.after == found[0]
    assert "nothing is mapped" in str(nowhere)
    for wrong in (-1, 1 << 64):
        with pytest.raises(ValueError, match="no address"):
            found.find(wrong)


def test_find_what_was_written_since_a_fork() -> None:
    body = """
a = map_memory(4 * PAGE, flags=0x4022); libc.madvise(a, 4 * PAGE, 15); touch(a, 3)
pid = os.fork()
if pid == 0:
    touch(a, 1)
    ready(a, os.getpid())
    import signal; signal.pause()
"""
    with child(body) as (_, words):
        start, pid = map(int, words)
        try:
            found = quire.maps(pid)
            written, untouched, empty = (found.find(start + number * PAGE).page for number in (0, 1, 3))
        finally:
            os.kill(pid, 9)
    assert written is not None
    assert written.written is True
    assert untouched is not None
    assert untouched.written is False
    assert "fork" in untouched.written_evidence
    assert empty is not None
    assert not empty.present
    if untouched.frame is not None:
        assert untouched.mapped == 2
        assert written.mapped == 1


FORK = """
a = map_memory(100 * PAGE, flags=0x4022); libc.madvise(a, 100 * PAGE, 15); touch(a, 100)
memfd = os.memfd_create("both"); os.ftruncate(memfd, 50 * PAGE)
m = map_memory(50 * PAGE, flags=1, fd=memfd); touch(m, 50)
pid = os.fork()
if pid == 0:
    touch(a, 40); touch(m, 50)
    ready(os.getpid())
    import signal; signal.pause()
"""


def test_sharing_by_frames() -> None:
    with child(FORK) as (process, words):
        other = int(words[0])
        try:
            found = sharing(process.pid, other)
            weaker = sharing(process.pid, other, frames=False)
        finally:
            os.kill(other, 9)
    by_name = {each.name: each for each in found.names}
    assert weaker.evidence == "file pages"
    memfd = b"/memfd:both (deleted)"
    assert {each.name: each.bytes for each in weaker.names}[memfd] == 50 * PAGE
    # The anonymous pages that neither has written are told as somebody's too, no more.
    assert all(unknown >= 60 * PAGE for unknown in weaker.unknown)
    if found.evidence != "frames":
        assert os.geteuid(), "root is told frames"
        return
    assert by_name[memfd].bytes == by_name[memfd].all_bytes == 50 * PAGE
    # Of 100 pages the child wrote 40, and so has copies of them.
    assert by_name[b""].bytes >= 60 * PAGE
    assert found.pairs[0, 1] == found.bytes == found.all_bytes
    assert found.bytes == sum(each.bytes for each in found.names)
    assert found.bytes <= min(found.resident)
    assert found.unknown == (0, 0)
    assert found.bytes >= weaker.bytes


def test_sharing_of_three_and_misuse() -> None:
    with child("ready('x')") as (one, _), child("ready('x')") as (two, _):
        found = sharing(one.pid, two.pid, os.getpid())
        assert set(found.pairs) == {(0, 1), (0, 2), (1, 2)}
        assert found.all_bytes <= min(found.pairs.values())
        assert found.bytes >= max(found.pairs.values())
        assert found.all_bytes > 0, "all three run the same program"
        for wrong in ((one.pid,), (one.pid, one.pid), ()):
            with pytest.raises(ValueError, match="two or more"):
                sharing(*wrong)
