"""What memory maps tell of shared objects that were loaded out of archives."""

import ctypes
import pathlib
import subprocess
import sys

import pytest
from libraries import LARGE, compiled, zipped

import quire
from quire import image
from quire.process import Kind


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("maps")
    return zipped(
        folder / "large.zip",
        compiled(
            folder,
            "liblarge.so",
            LARGE + "static int own(void) { return 5; }\nint (*get(void))(void) { return own; }\n",
        ),
    )


def address_of(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address


def test_what_is_in_this_process(archive: pathlib.Path) -> None:
    library = image.load(f"{archive}!/liblarge.so")
    address = address_of(library, "walk")
    maps = quire.maps()
    vma = maps.at(address)
    assert vma is not None
    assert vma.label == f"/memfd:quire:{archive}/liblarge.so (deleted)"
    of_it = [each for each in maps if each.inode == vma.inode and each.device == vma.device]
    assert len(of_it) > 2
    assert {each.kind for each in of_it} == {Kind.IMAGE}
    filled = library.stats.filled_bytes
    found = maps.find(address + 2)
    assert found.place is not None
    assert (found.place.symbol, found.place.symbol_offset, found.place.is_inside) == ("walk", 2, True)
    assert found.place.section == ".text"
    assert found.place.segment is not None
    assert found.place.segment.endswith("r-x")
    # A local function's name is far behind in the file; it is found, and nothing was filled in for that.
    library.get.restype = ctypes.c_void_p
    own = maps.find(library.get()).place
    assert own is not None
    assert own.symbol == "own"
    assert found.notes == ()
    assert library.stats.filled_bytes <= filled + 65536, "only what get() is in"
    assert library.close()
    assert quire.maps().at(address) is None


def test_what_is_in_another_process(archive: pathlib.Path) -> None:
    script = """
import ctypes, sys
from quire import image
library = image.load(sys.argv[1])
print(ctypes.cast(library.walk, ctypes.c_void_p).value, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, f"{archive}!/liblarge.so"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        address = int(child.stdout.readline())
        maps = quire.maps(child.pid)
        found = maps.find(address)
        child.communicate("")
    assert found.vma is not None
    assert found.vma.kind is Kind.IMAGE
    assert any("never touched read as zeros" in note for note in found.notes), found.notes
    if found.place is None:
        # Without the right to open files that have no name nothing of it can be read.
        assert any("may not open it" in note for note in found.notes), found.notes
    else:
        # What the dynamic linker needed is there.
        assert found.place.symbol == "walk"
