"""Shared objects out of archives, their code filled in when it is touched."""

import ctypes
import gzip
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from libraries import CODE_BYTES, LARGE, TABLE_BYTES, compiled, refusal, zipped
from support import MIB

import quire
from quire import image, linking
from quire.image import fatelf

Folder = pathlib.Path
PAGES = TABLE_BYTES // 4096


pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal())


def run(
    script: str, *arguments: object, expect: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process, its name and arguments as ``sys.argv``."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env=os.environ | environment,
    )
    assert done.returncode == expect, f"ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return compiled(tmp_path_factory.mktemp("large"), "liblarge.so", LARGE)


@pytest.fixture(scope="module")
def archive(large: pathlib.Path) -> pathlib.Path:
    return zipped(large.parent / "large.zip", large)


@pytest.fixture(autouse=True)
def no_notes(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what one test touches is filled at once for the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def nothing_stays_loaded() -> Iterator[None]:
    """What is left would be there in the children of other tests, which want to start without."""
    before = len(linking.all_linked())
    yield
    assert len(linking.all_linked()) == before


@pytest.fixture
def library(archive: pathlib.Path):
    made = image.load(f"{archive}!/liblarge.so")
    yield made
    made.close()


def test_what_is_touched_is_filled(library: image.Library) -> None:
    before = library.stats
    assert before.whole == ""
    assert before.lazy_bytes > TABLE_BYTES + CODE_BYTES - MIB // 2
    assert before.filled_bytes < MIB
    assert [library.page_of(ctypes.c_long(page)) for page in range(0, PAGES, 100)] == [
        page + 1 for page in range(0, PAGES, 100)
    ]
    some = library.stats
    assert before.filled_bytes < some.filled_bytes < TABLE_BYTES
    assert some.faults > before.faults
    assert library.walk() == 7
    assert library.stats.filled_bytes > CODE_BYTES
    library.fill()
    assert library.stats.filled_bytes == library.stats.lazy_bytes


def test_what_was_taken_is_filled_again(library: image.Library) -> None:
    library.fill()
    assert library.discard() >= TABLE_BYTES
    assert library.stats.filled_bytes < MIB
    assert library.walk() == 7
    assert library.page_of(ctypes.c_long(PAGES - 1)) == PAGES
    assert library.stats.refills > 0


def test_system_calls_read_what_is_missing(library: image.Library) -> None:
    library.discard()
    library.table_address.restype = ctypes.c_void_p
    reading, writing = os.pipe()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        address = library.table_address() + 4096 * 500
        assert libc.write(writing, ctypes.c_void_p(address), ctypes.c_size_t(4096)) == 4096
        assert int.from_bytes(os.read(reading, 4), sys.byteorder) == 501
    finally:
        os.close(reading)
        os.close(writing)


def test_from_everything(large: pathlib.Path, archive: pathlib.Path, tmp_path: Folder) -> None:
    packed = tmp_path / "liblarge.so.gz"
    packed.write_bytes(gzip.compress(large.read_bytes(), 1))
    stored = zipped(tmp_path / "stored.zip", large, method=zipfile.ZIP_STORED)
    fat = tmp_path / "large.fat"
    fatelf.glue([large], fat)
    data = large.read_bytes()
    with quire.open(f"{archive}!/liblarge.so") as region, quire.Segment(len(data)) as segment:
        memoryview(segment)[: len(data)] = data
        with segment.snapshot() as snapshot:
            targets = [f"{stored}!/liblarge.so", packed, str(fat), data, region, snapshot]
            for target in targets:
                library = image.load(target)
                assert library.page_of(ctypes.c_long(700)) == 701
                assert library.walk() == 7
                assert library.stats.whole == ""
                assert library.stats.size_bytes >= len(data)
                assert library.close()


def test_a_plain_file_is_the_kernels(large: pathlib.Path) -> None:
    library = image.load(large)
    assert library.page_of(ctypes.c_long(9)) == 10
    assert library.stats.whole == "the kernel pages it from its file"
    assert library.stats.lazy_bytes == 0
    assert not library.close()


def test_one_member_is_one_object(archive: pathlib.Path) -> None:
    first, second = (image.load(f"{archive}!/liblarge.so") for _ in range(2))
    address = [ctypes.cast(library.walk, ctypes.c_void_p).value for library in (first, second)]
    assert address[0] == address[1]
    assert not first.close()
    assert second.walk() == 7
    assert second.close()
    assert not second.close()
    assert second.stats.whole == "it is closed"


def test_closing_gives_all_back(archive: pathlib.Path) -> None:
    def state() -> tuple[int, int]:
        maps = pathlib.Path("/proc/self/maps").read_text("utf-8")
        return maps.count("liblarge.so"), len(os.listdir("/proc/self/fd"))

    image.load(f"{archive}!/liblarge.so").close()
    before = state()
    for _ in range(5):
        library = image.load(f"{archive}!/liblarge.so")
        library.walk()
        assert state()[0] > before[0]
        assert library.close()
    assert state() == before


CONSTRUCTORS = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static void say(const char *what, int argc, char **argv, char **envp) {
    int variables = 0;
    while (envp && envp[variables]) variables++;
    printf("%s %d %s %d\\n", what, argc, argv[argc - 1], variables > 0);
    fflush(stdout);
}
void first(int argc, char **argv, char **envp) { say("init", argc, argv, envp); }
#define CONSTRUCTOR(name, ...) \\
    __attribute__((constructor __VA_ARGS__)) static void name(int argc, char **argv, char **envp)
CONSTRUCTOR(third, (200)) { say("200", argc, argv, envp); }
CONSTRUCTOR(second, (101)) { say("101", argc, argv, envp); }
CONSTRUCTOR(fourth) { say("last", argc, argv, envp); }
__attribute__((destructor)) void bye(void) { puts("destroyed"); fflush(stdout); }
"""
LOAD = """
import sys
from quire import image
library = image.load(sys.argv[1] + "!/libctor.so")
again = image.load(sys.argv[1] + "!/libctor.so")
assert library.stats.whole == "", library.stats
print("loaded", flush=True)
if sys.argv[2] == "close":
    assert not again.close() and library.close()
    print("closed", flush=True)
"""


@pytest.mark.parametrize("end", ["close", "exit"])
def test_constructors_run_once_in_order(tmp_path: Folder, end: str) -> None:
    library = compiled(tmp_path, "libctor.so", CONSTRUCTORS + LARGE, "-Wl,-init,first")
    done = run(LOAD, zipped(tmp_path / "x.zip", library), end)
    # python, -X, faulthandler, -c, script, archive, end
    arguments = f"7 {end} 1"
    started = [f"{name} {arguments}" for name in ("init", "101", "200", "last")]
    assert done.stdout.splitlines() == [
        *started,
        "loaded",
        "destroyed",
        *(["closed"] if end == "close" else []),
    ]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the assembler is of x86-64")
def test_what_the_dynamic_linker_runs_or_writes_is_loaded_whole(tmp_path: Folder) -> None:
    resolver = "static int one(void) { return 1; }\nstatic int (*pick(void))(void) { return one; }\n"
    chosen = 'int chosen(void) __attribute__((ifunc("pick")));\nint call(void) { return chosen(); }\n'
    indirect = compiled(tmp_path, "libifunc.so", resolver + chosen + LARGE)
    text = LARGE + '__asm__(".text\\n.globl where\\nwhere: .quad table\\n");'
    written = compiled(tmp_path, "libtextrel.so", text, "-Wl,-z,notext")
    archive = zipped(tmp_path / "x.zip", indirect, written)
    library = image.load(f"{archive}!/libifunc.so")
    assert "IFUNC" in library.stats.whole
    assert library.call() == 1
    library.close()
    library = image.load(f"{archive}!/libtextrel.so")
    assert "text relocations" in library.stats.whole
    assert library.walk() == 7
    again = image.load(f"{archive}!/libtextrel.so", lazy=False)
    assert again.stats.whole.endswith("text relocations"), "it is the same object"
    again.close()
    library.close()


def test_loading_whole_when_asked(large: pathlib.Path, archive: pathlib.Path) -> None:
    library = image.load(large.read_bytes(), lazy=False)
    assert library.stats.whole == "that was asked for"
    assert library.walk() == 7
    library.close()
    script = (
        "import sys; from quire import image; print(image.load(sys.argv[1] + '!/liblarge.so').stats.whole)"
    )
    assert "QUIRE_LIBRARIES=whole" in run(script, archive, QUIRE_LIBRARIES="whole").stdout


SYMBOLS = """
import ctypes, os, sys
from quire import image
mode = getattr(os, sys.argv[2])
library = image.load(sys.argv[1] + "!/liblarge.so", mode)
try:
    print(ctypes.CDLL(None).walk())
except AttributeError:
    print("hidden")
image.load(sys.argv[1] + "!/liblarge.so", os.RTLD_GLOBAL)
print(ctypes.CDLL(None).walk())
"""


@pytest.mark.parametrize(("mode", "seen"), [("RTLD_LOCAL", "hidden"), ("RTLD_GLOBAL", "7")])
def test_whether_others_see_its_symbols(archive: pathlib.Path, mode: str, seen: str) -> None:
    assert run(SYMBOLS, archive, mode).stdout.split() == [seen, "7"]


def test_loading_from_threads(archive: pathlib.Path) -> None:
    count = 8
    start = threading.Barrier(count)

    def load(_: int) -> tuple[int, image.Library]:
        start.wait()
        library = image.load(f"{archive}!/liblarge.so")
        return library.walk() + library.page_of(ctypes.c_long(1000)), library

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(load, range(count)))
    assert {answer for answer, _ in results} == {7 + 1001}
    assert [library.close() for _, library in results] == [False] * (count - 1) + [True]


def test_thread_local_storage(tmp_path: Folder) -> None:
    source = """
static _Thread_local int counter = 5;
static _Thread_local char zero[3000];
int count(void) { zero[2999]++; return counter++ * 10 + zero[2999]; }
"""
    archive = zipped(tmp_path / "x.zip", compiled(tmp_path, "libtls.so", source + LARGE))
    library = image.load(f"{archive}!/libtls.so")
    assert library.stats.whole == ""
    with ThreadPoolExecutor(8) as pool:
        start = threading.Barrier(8)

        def count(_: int) -> list[int]:
            start.wait()
            return [library.count() for _ in range(3)]

        assert list(pool.map(count, range(8))) == [[51, 62, 73]] * 8
    assert library.count() == 51
    library.close()


THROWS = """
#include <stdexcept>
#include <string>
struct Noisy { int *left; ~Noisy() { ++*left; } };
extern "C" void throw_it(int *left) { Noisy noisy{left}; throw std::runtime_error("thrown"); }
extern "C" int catch_own(void) {
    int left = 0;
    try { throw_it(&left); }
    catch (const std::exception &e) { return std::string(e.what()) == "thrown" ? left : -1; }
    return -2;
}
typedef void (*Callback)(int *);
extern "C" int catch_of(Callback callback) {
    int left = 0;
    try { callback(&left); } catch (const std::runtime_error &e) { return 100 + left; }
    return -3;
}
"""


def test_exceptions_cross_libraries(tmp_path: Folder) -> None:
    text = LARGE.replace("extern const", 'extern "C" const').replace("void sled", 'extern "C" void sled')
    both = [compiled(tmp_path, f"lib{name}.so", THROWS + text, language="c++") for name in "ab"]
    archive = zipped(tmp_path / "x.zip", *both)
    a, b = (image.load(f"{archive}!/lib{name}.so") for name in "ab")
    assert a.stats.whole == b.stats.whole == ""
    for library in (a, b):
        library.discard()
    assert a.catch_own() == 1
    assert a.catch_of(b.throw_it) == 101
    assert ctypes.CDLL(str(both[0])).catch_of(b.throw_it) == 101
    assert a.close()
    assert b.close()


def test_dladdr(library: image.Library) -> None:
    class Info(ctypes.Structure):
        _fields_ = (
            ("name", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("symbol", ctypes.c_char_p),
            ("address", ctypes.c_void_p),
        )

    info = Info()
    address = ctypes.cast(library.walk, ctypes.c_void_p).value
    assert address is not None
    assert ctypes.CDLL(None).dladdr(ctypes.c_void_p(address + 4), ctypes.byref(info))
    assert (info.symbol, info.address) == (b"walk", address)
    assert os.path.samefile(os.fsdecode(info.name), f"/proc/self/fd/{info.name.rpartition(b'/')[2].decode()}")


CRASH = """
import faulthandler, sys
from quire import image
faulthandler.enable()
library = image.load(sys.argv[1] + "!/libcrash.so")
def outer():
    library.crash()
outer()
"""


def test_a_crash_in_it_is_reported(tmp_path: Folder) -> None:
    source = LARGE + "void crash(void) { *(volatile int *)0 = 1; }\n"
    archive = zipped(tmp_path / "x.zip", compiled(tmp_path, "libcrash.so", source))
    done = run(CRASH, archive, expect=-signal.SIGSEGV)
    assert "in outer" in done.stderr


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_gdb_names_its_functions(tmp_path: Folder) -> None:
    source = LARGE + (
        "__attribute__((noinline)) int inner(int x) { *(volatile int *)0 = x; return x + 1; }\n"
        "__attribute__((noinline)) int middle(int x) { return inner(x) * 3; }\n"
        "int crash(void) { return middle(4) - 1; }\n"
    )
    archive = zipped(tmp_path / "x.zip", compiled(tmp_path, "libcrash.so", source))
    command = ["gdb", "-nx", "-batch", "-ex", "set confirm off", "-ex", "run", "-ex", "bt 6", "--args"]
    done = subprocess.run(
        [*command, sys.executable, "-c", CRASH.replace("faulthandler.enable()", ""), str(archive)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    if "Couldn't" in done.stderr and "ptrace" in done.stderr:
        pytest.skip(f"gdb may not trace here: {done.stderr.strip()[-200:]}")
    frames = [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert [any(name in frame for frame in frames) for name in (" inner ", " middle ", " crash ")] == [
        True
    ] * 3, done


FORK = """
import ctypes, os, signal, sys
from quire import image
library = image.load(sys.argv[1] + "!/liblarge.so")
libc = ctypes.CDLL(None)
assert library.page_of(ctypes.c_long(3)) == 4
def child(generations):
    ok = library.walk() == 7 and library.page_of(ctypes.c_long(900)) == 901
    library.discard()
    ok = ok and library.page_of(ctypes.c_long(901)) == 902 and library.page_of(ctypes.c_long(3)) == 4
    if ok and generations:
        pid = os.fork()
        if pid == 0:
            os._exit(child(generations - 1))
        ok = os.waitpid(pid, 0)[1] == 0
    return 0 if ok else 1
pid = os.fork()
if pid == 0:
    os._exit(child(2))
assert os.waitpid(pid, 0)[1] == 0
assert library.walk() == 7 and library.page_of(ctypes.c_long(1001)) == 1002
# A child that no handler has prepared must not take zeros for code or constants.
pid = libc._Fork()
if pid == 0:
    libc._exit(library.page_of(ctypes.c_long(77)) != 0)
assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV
print("done")
"""


def test_forked_children(archive: pathlib.Path) -> None:
    assert run(FORK, archive).stdout == "done\n"


PRESSURE = """
import ctypes, os, sys
with open(sys.argv[2], "w") as group:
    group.write(str(os.getpid()))
from quire import image
library = image.load(sys.argv[1] + "!/liblarge.so")
for turn in range(2):
    for page in range(0, int(sys.argv[3]), 2):
        assert library.page_of(ctypes.c_long(page)) == page + 1
assert library.stats.whole == ""
print(library.stats.evictions)
"""


def test_memory_pressure_while_it_is_used(tmp_path: Folder) -> None:
    from cgroups import memory_limit

    big = 192 * MIB
    source = LARGE.replace(str(TABLE_BYTES // 4096), str(big // 4096))
    archive = zipped(tmp_path / "x.zip", compiled(tmp_path, "liblarge.so", source))
    with memory_limit(128 * MIB) as group:
        done = run(PRESSURE, archive, group, big // 4096)
    assert int(done.stdout) > 0


CLOSED = """
import ctypes, os, sys
from quire import image
library = image.load(sys.argv[1] + "!/liblarge.so")
os.closerange(3, 256)
with open("/dev/zero", "rb") as _, open("/dev/zero", "rb") as _:
    print("zeros", library.page_of(ctypes.c_long(500)), flush=True)
"""


def test_closed_descriptors_never_make_zeros(archive: pathlib.Path) -> None:
    done = run(CLOSED, archive, expect=-signal.SIGABRT)
    assert "zeros" not in done.stdout
    assert "closed the descriptor of userfaultfd" in done.stderr


def test_what_it_needs_comes_from_the_archive(tmp_path: Folder) -> None:
    inner = compiled(
        tmp_path, "libinner.so", LARGE + "int inner(void) { return 40; }", "-Wl,-soname,libinner.so"
    )
    code = "int inner(void);\nint outer(void) { return inner() + 2; }\n"
    outer = compiled(tmp_path, "libouter.so", code, "-l:libinner.so", "-Wl,-rpath,$ORIGIN/../deps")
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        out.write(inner, "deps/libinner.so")
        out.write(outer, "lib/libouter.so")
    library = image.load(f"{archive}!/lib/libouter.so")
    assert library.outer() == 42
    inner_too = image.load(f"{archive}!/deps/libinner.so")
    assert inner_too.stats.whole == ""
    assert not inner_too.close()
    assert library.close()
    assert not linking.all_linked(), "what was loaded for it is given back with it"
    with zipfile.ZipFile(tmp_path / "less.zip", "w") as out:
        out.write(outer, "lib/libouter.so")
    before = len(os.listdir("/proc/self/fd"))
    script = "import sys; from quire import image; image.load(sys.argv[1])"
    done = run(script, f"{tmp_path}/less.zip!/lib/libouter.so", expect=1)
    assert "lib/libouter.so: cannot be loaded: libinner.so: cannot open shared object file" in done.stderr
    assert len(os.listdir("/proc/self/fd")) == before
