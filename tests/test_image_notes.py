"""What was touched of a shared object is noted, and the next process fills it at once."""

import contextlib
import ctypes
import os
import pathlib
import struct
import subprocess
import sys

import pytest
from libraries import LARGE, compiled, zipped
from support import MIB, PAGE, run_forked
from test_image_load import refusal

from quire import image

Folder = pathlib.Path

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal())

# Prints what was filled when it was loaded, and how many touches were served until the end.
TOUCH = """
import ctypes, sys
from quire import image
library = image.load(sys.argv[1])
loaded = library.stats
pages = range(*map(int, sys.argv[2:5]))
assert [library.page_of(ctypes.c_long(page)) for page in pages] == [page + 1 for page in pages]
print(loaded.filled_bytes, library.stats.faults - loaded.faults)
"""
PAGES = (0, 1024, 40)
COUNT = len(range(*PAGES))
# Pages of its data, each with 512 pointers that the dynamic linker writes.
POINTERS = 1 << 18
WRITTEN = f"""
__asm__(".data\\n.balign 4096\\npointers:\\n.set at, 0\\n"
        ".rept {POINTERS}\\n.quad pointers + at\\n.set at, at + 8\\n.endr\\n.previous");
extern void *pointers[];
int wrong(void) {{
    int n = 0;
    for (long i = 0; i < {POINTERS}; i++) n += pointers[i] != pointers + i;
    return n;
}}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quire"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = tmp_path_factory.mktemp("large")
    return zipped(folder / "large.zip", compiled(folder, "liblarge.so", LARGE))


def notes_in(cache: Folder) -> list[Folder]:
    return list(cache.glob("*-4.idx"))


def touched(archive: Folder, *pages: int, script: str = TOUCH) -> tuple[int, int]:
    """Load and touch in a process of its own; bytes filled when it was loaded, and touches served then."""
    command = [sys.executable, "-c", script, f"{archive}!/liblarge.so", *map(str, pages or PAGES)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    filled, faults = map(int, done.stdout.split())
    return filled, faults


def test_the_next_process_fills_it_at_once(archive: Folder, cache: Folder) -> None:
    filled, faults = touched(archive)
    assert faults >= COUNT
    again, missing = touched(archive)
    assert missing == 0
    assert filled + COUNT * PAGE <= again < MIB
    (notes,) = notes_in(cache)
    assert notes.stat().st_mode & 0o777 == 0o600
    before = notes.read_bytes()
    touched(archive)
    assert notes.read_bytes() == before


def test_what_is_not_used_any_more_is_forgotten(archive: Folder) -> None:
    touched(archive, 0, 256, 8)
    # As many others, so that the notes are written again.
    filled, faults = touched(archive, 512, 768, 8)
    assert faults > 0
    again, missing = touched(archive, 512, 768, 8)
    assert missing == 0
    assert again < filled + 32 * PAGE
    _, faults = touched(archive, 0, 256, 8)
    assert faults > 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "another version", "a folder"])
def test_damaged_notes_are_as_good_as_none(archive: Folder, cache: Folder, damage: str) -> None:
    touched(archive)
    (notes,) = notes_in(cache)
    data = bytearray(notes.read_bytes())
    match damage:
        case "flipped":
            data[60] ^= 1
        case "cut":
            del data[-5:]
        case "empty":
            data.clear()
        case "another version":
            struct.pack_into("<I", data, 8, 9)
    notes.unlink()
    if damage == "a folder":
        notes.mkdir()
    else:
        notes.write_bytes(data)
    assert touched(archive)[1] >= COUNT
    # Made anew where that can be done.
    assert (touched(archive)[1] == 0) == (damage != "a folder")


def test_a_folder_that_others_may_enter_is_not_used(archive: Folder, cache: Folder) -> None:
    touched(archive)
    assert notes_in(cache)
    cache.chmod(0o755)
    assert touched(archive)[1] >= COUNT


def test_forked_children_note_nothing(archive: Folder) -> None:
    script = TOUCH.replace("pages = range", "import os\nchild = os.fork()\npages = () if child else range")
    script += "if child: assert os.waitpid(child, 0)[1] == 0\n"
    command = [sys.executable, "-c", script, f"{archive}!/liblarge.so", *map(str, PAGES)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert touched(archive)[1] >= COUNT


def test_a_process_that_rests_notes_what_it_touched(archive: Folder, cache: Folder) -> None:
    # It never ends by itself: whoever is killed later has left notes.
    script = TOUCH + "import signal\nsys.stdout.flush()\nsignal.pause()\n"
    command = [sys.executable, "-c", script, f"{archive}!/liblarge.so", *map(str, PAGES)]
    cache.mkdir(mode=0o700, parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_CLOEXEC)
    try:
        moved_to = 0x80
        assert libc.inotify_add_watch(watch, os.fsencode(cache), moved_to) >= 0
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                while not notes_in(cache):
                    os.read(watch, 4096)
            finally:
                process.kill()
    finally:
        os.close(watch)
    assert touched(archive)[1] == 0


def test_closing_leaves_notes_and_sources_that_are_not_decoded_have_none(
    cache: Folder, archive: Folder
) -> None:
    with contextlib.closing(image.load(f"{archive}!/liblarge.so")) as library:
        assert library.page_of(ctypes.c_long(3)) == 4
    (notes,) = notes_in(cache)
    data = (archive.parent / "liblarge.so").read_bytes()
    with contextlib.closing(image.load(data)) as library:
        assert library.page_of(ctypes.c_long(3)) == 4
    assert notes_in(cache) == [notes]


def held_bytes(name: str) -> int:
    """How much memory this process's memory files of that name have."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        place = f"/proc/self/fd/{fd}"
        if os.path.exists(place) and name in os.readlink(place):
            total += os.stat(place).st_blocks * 512
    return total


def test_what_was_relocated_is_in_memory_once(tmp_path: Folder) -> None:
    made = compiled(tmp_path, "libwritten.so", LARGE + WRITTEN)
    archive = zipped(tmp_path / "w.zip", made)
    with contextlib.closing(image.load(f"{archive}!/libwritten.so")) as library:
        assert library.stats.whole == ""
        # 2 MiB of pointers are private copies, and the 6 MiB of relocations that made them are done.
        assert held_bytes("w.zip") < MIB
        assert library.wrong() == 0

        def child() -> None:
            assert library.wrong() == 0
            assert library.page_of(ctypes.c_long(9)) == 10

        run_forked(child)
        library.fill()
        assert library.wrong() == 0
        assert library.discard() > 0
        assert library.wrong() == 0
        assert library.page_of(ctypes.c_long(1000)) == 1001
