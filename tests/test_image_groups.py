"""Shared objects out of archives that need each other, or count on what is loaded together with them."""

import ctypes
import gc
import os
import pathlib
import platform
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from libraries import LARGE, compiled, refusal, zipped

from quire import Malformed, image, linking

Folder = pathlib.Path
Needs = dict[str, list[str]]

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal())

FUNCTION = """
#include <stdio.h>
static int walk(void);
int {name}(int depth) {{ return depth ? walk() + {calls} : {small}; }}
static int seen = -1;
int {name}_seen(void) {{ return seen; }}
static void say(const char *what) {{ printf("%s {name}\\n", what); fflush(stdout); }}
__attribute__((constructor)) static void begin(void) {{ seen = {name}(2); say("begin"); }}
__attribute__((destructor)) static void end(void) {{ say("end"); }}
"""
SMALL = "static int walk(void) { return 7; }\n"
PAIR: Needs = {"a": ["b"], "b": ["a"]}
SHAPES: dict[str, Needs] = {
    "pair": PAIR,
    "below": {"top": ["a"], **PAIR},
    "both": {"top": ["b", "a"], **PAIR},
    "ring": {"top": ["a"], "a": ["b"], "b": ["e"], "e": ["a"]},
    "with others": {"top": ["a", "x"], "a": ["x", "b"], "b": ["y", "a"], "x": ["y"], "y": []},
    "open ring": {"a": ["b"], "b": ["e"], "e": ["a"]},
    "figure of eight": {"a": ["b", "e"], "b": ["a"], "e": ["a"]},
    "and itself": {"a": ["a", "b"], "b": ["b", "a"]},
}


def code(name: str, uses: list[str], *, large: bool = True) -> str:
    """Write a function of its name, which walks its own code and calls others; so does its constructor."""
    own = LARGE.replace("table_address", f"{name}_address")
    for symbol in ("page_of", "sled", "table"):
        own = own.replace(symbol, f"{name}_{symbol}")
    own = own.replace("int walk", "static int walk") if large else SMALL
    calls = " + ".join(f"{use}(depth - 1)" for use in uses) or "0"
    small = f"{name}_page_of(700)" if large else "701"
    return (
        "".join(f"int {use}(int);\n" for use in uses)
        + FUNCTION.format(name=name, calls=calls, small=small)
        + own
    )


def answer(needs: Needs, name: str, depth: int) -> int:
    """What the function of a library has to return."""
    return 7 + sum(answer(needs, use, depth - 1) for use in needs[name]) if depth else 701


def build(folder: Folder, needs: Needs, *, small: str = "", unsaid: str = "", **more: str) -> list[Folder]:
    """Compile libraries of which each needs others.

    Args:
        folder: Where to.
        needs: For each name the names of what it needs.
        small: Names of which the libraries are too small to be filled on demand.
        unsaid: Names of libraries that do not say what they need.
        more: Code for libraries, by their names.
    """
    stubs = folder / "stubs"
    stubs.mkdir()
    for name in needs:
        compiled(
            stubs, f"lib{name}.so", f"int {name}(int depth) {{ return depth; }}", f"-Wl,-soname,lib{name}.so"
        )
    return [
        compiled(
            folder,
            f"lib{name}.so",
            code(name, uses, large=name not in small) + more.get(name, ""),
            *(["-Wl,--unresolved-symbols=ignore-all"] if name in unsaid else []),
            f"-L{stubs}",
            "-Wl,--no-as-needed",
            *([] if name in unsaid else [f"-l:lib{use}.so" for use in uses]),
            f"-Wl,-soname,lib{name}.so",
            "-Wl,-rpath,$ORIGIN",
        )
        for name, uses in needs.items()
    ]


def state() -> tuple[int, int, int]:
    """What of libraries is in this process: mappings, descriptors, objects."""
    maps = pathlib.Path("/proc/self/maps").read_text("utf-8").splitlines()
    return sum("quire:" in line for line in maps), len(os.listdir("/proc/self/fd")), len(linking.all_linked())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pair")
    archive = zipped(folder / "x.zip", *build(folder, PAIR))
    # What the pager keeps for itself is there from the first library on.
    image.load(f"{archive}!/liba.so").close()
    return str(archive)


@pytest.fixture(autouse=True)
def nothing_is_left(pair: str) -> Iterator[None]:  # noqa: ARG001 - comes first
    gc.collect()
    before = state()
    gc.disable()  # What is given back does not wait for garbage.
    yield
    gc.enable()
    assert state() == before


def refused(target: str) -> linking.LinkError:
    """Why something cannot be loaded, without what a traceback holds."""
    with pytest.raises(linking.LinkError) as caught:
        image.load(target)
    return linking.LinkError(caught.value.path, str(caught.value).removeprefix(caught.value.path))


def test_two_that_need_each_other(pair: str) -> None:
    a = image.load(f"{pair}!/liba.so")
    b = image.load(f"{pair}!/libb.so")
    for name, library in {"a": a, "b": b}.items():
        assert library.stats.whole == ""
        assert library.stats.filled_bytes < library.stats.lazy_bytes // 2 + (2 << 20)
        assert library[f"{name}_seen"]() == answer(PAIR, name, 2)
        assert library[name](9) == answer(PAIR, name, 9)
        assert library.discard()
        assert library[f"{name}_page_of"](ctypes.c_long(900)) == 901
    assert not a.close(), "the other one needs it"
    assert b.a(3) == answer(PAIR, "a", 3)
    assert b.close()


LOAD = """
import ctypes, os, sys, _ctypes
from quire import image
target, mode = sys.argv[1], getattr(os, sys.argv[2])
if "!" in target:
    library = image.load(target, mode)
    print("loaded", flush=True)
    library.close()
else:
    library = ctypes.CDLL(target, mode)
    print("loaded", flush=True)
    _ctypes.dlclose(library._handle)
print("closed", flush=True)
"""


def said(*arguments: object, expect: int = 0, script: str = LOAD) -> list[str]:
    """What a script says in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == expect, f"ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return (done.stdout if expect == 0 else done.stderr).splitlines()


def glibc() -> tuple[int, ...]:
    """The version of glibc; it orders constructors otherwise since 2.35."""
    return tuple(int(part) for part in platform.libc_ver()[1].split("."))


@pytest.mark.skipif(glibc() < (2, 35), reason=f"glibc {platform.libc_ver()[1]} has another order")
@pytest.mark.parametrize("shape", SHAPES)
def test_order_is_the_dynamic_linkers(tmp_path: Folder, shape: str) -> None:
    files = build(tmp_path, SHAPES[shape], small="befxytop")
    plain = said(files[0], "RTLD_LOCAL")
    assert plain.count("loaded") == plain.count("closed") == 1
    assert len(plain) == 2 * len(files) + 2
    assert said(f"{zipped(tmp_path / 'x.zip', *files)}!/{files[0].name}", "RTLD_LOCAL") == plain


def test_a_ring_that_leads_into_another(tmp_path: Folder) -> None:
    """The first is linked for itself: which of its objects begins does not depend on the second."""
    needs: Needs = {"top": ["a", "e"], **PAIR, "e": ["f", "a"], "f": ["e"]}
    archive = zipped(tmp_path / "x.zip", *build(tmp_path, needs, small="bf"))
    library = image.load(f"{archive}!/libtop.so")
    order = [os.path.basename(each.name) for each in linking.all_linked()]
    assert order == ["liba.so", "libb.so", "libe.so", "libf.so", "libtop.so"]
    assert library.top(6) == answer(needs, "top", 6)
    assert library.close()


def test_what_counts_on_others_being_loaded_with_it(tmp_path: Folder) -> None:
    needs: Needs = {"top": ["middle", "other"], "middle": ["silent"], "silent": ["other", "top"], "other": []}
    archive = zipped(tmp_path / "x.zip", *build(tmp_path, needs, unsaid="silent"))
    top = image.load(f"{archive}!/libtop.so")
    assert [each.stats.whole for each in linking.all_linked()] == [""] * 4
    silent = image.load(f"{archive}!/libsilent.so")
    assert silent.silent(5) == answer(needs, "silent", 5)
    assert top.top_seen() == answer(needs, "top", 2)
    assert not top.close()
    assert silent.silent(4) == answer(needs, "silent", 4)
    assert silent.close()


def test_two_ways_to_one_that_waits(tmp_path: Folder) -> None:
    """What could not be linked with the first that needs it, for its symbols come later, is linked once."""
    needs: Needs = {"top": ["first", "second"], "first": ["silent"], "second": ["silent", "late"]}
    needs |= {"silent": ["late"], "late": []}
    files = build(tmp_path, needs, unsaid="silent")
    archive = zipped(tmp_path / "x.zip", *files)
    for name in ("top", "second"):
        library = image.load(f"{archive}!/lib{name}.so")
        assert library[name](4) == answer(needs, name, 4)
        assert library.close()
    failure = refused(f"{archive}!/libfirst.so")
    assert "undefined symbol: late" in str(failure)
    assert failure.path == f"{archive}/libsilent.so"
    gc.collect()


def test_several_loads_hold_a_group(pair: str) -> None:
    libraries = [image.load(f"{pair}!/lib{name}.so") for name in "abba"]
    assert len({ctypes.cast(library.a, ctypes.c_void_p).value for library in libraries}) == 1
    assert [library.close() for library in libraries] == [False, False, False, True]


def test_threads_load_it_at_once(pair: str) -> None:
    count = 8
    start = threading.Barrier(count)

    def load(number: int) -> image.Library:
        start.wait()
        return image.load(f"{pair}!/lib{'ab'[number % 2]}.so")

    with ThreadPoolExecutor(count) as pool:
        libraries = [*pool.map(load, range(count))]
        start.reset()

        def use(library: image.Library) -> int:
            start.wait()
            return int(library.a(8))

        assert {*pool.map(use, libraries)} == {answer(PAIR, "a", 8)}
    assert [library.close() for library in libraries] == [False] * (count - 1) + [True]


FORK = """
import ctypes, os, sys
from quire import image
library = image.load(sys.argv[1])
def child(generations):
    ok = library.b(6) == int(sys.argv[2]) and library.a_page_of(ctypes.c_long(900)) == 901
    library.discard()
    ok = ok and library.b_page_of(ctypes.c_long(901)) == 902 and library.a(6) == int(sys.argv[2])
    if ok and generations:
        pid = os.fork()
        if pid == 0:
            os._exit(child(generations - 1))
        ok = os.waitpid(pid, 0)[1] == 0
    elif ok:
        ok = library.close()
    return 0 if ok else 1
pid = os.fork()
if pid == 0:
    os._exit(child(2))
assert os.waitpid(pid, 0)[1] == 0
assert library.a(6) == int(sys.argv[2])
assert library.close()
"""


def test_forked_children(pair: str) -> None:
    said(f"{pair}!/liba.so", answer(PAIR, "a", 6), script=FORK)


SYMBOLS = """
import ctypes, os, sys
from quire import image
library = image.load(sys.argv[1], getattr(os, sys.argv[2]))
for name in "ab":
    print(hasattr(ctypes.CDLL(None), name))
"""


@pytest.mark.parametrize("mode", ["RTLD_LOCAL", "RTLD_GLOBAL"])
def test_whether_others_see_their_symbols(pair: str, mode: str) -> None:
    seen = [line for line in said(f"{pair}!/liba.so", mode, script=SYMBOLS) if line in ("True", "False")]
    assert seen == [str(mode == "RTLD_GLOBAL")] * 2


RESOLVER = """
extern int b(int);
static int one(void) { return 1; }
static int (*pick(void))(void) { return b(0) == 701 ? one : 0; }
int chosen(void) __attribute__((ifunc("pick")));
int call_chosen(void) { return chosen(); }
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="what resolvers may call differs")
def test_resolvers_find_all_of_a_group(tmp_path: Folder) -> None:
    """A resolver runs while its group is linked, and calls what would be filled on demand only afterwards."""
    archive = zipped(tmp_path / "x.zip", *build(tmp_path, PAIR, a=RESOLVER))
    library = image.load(f"{archive}!/libb.so")
    whole = {os.path.basename(each.name): each.stats.whole for each in linking.all_linked()}
    assert whole["liba.so"].startswith("it has indirect functions (IFUNC)")
    assert whole["libb.so"].endswith("liba.so, which has indirect functions (IFUNC)")
    assert library.b(5) == answer(PAIR, "b", 5)
    assert library.close()


def test_loading_a_group_whole(pair: str) -> None:
    library = image.load(f"{pair}!/liba.so", lazy=False)
    assert [each.stats.whole for each in linking.all_linked()] == ["that was asked for"] * 2
    assert library.a(5) == answer(PAIR, "a", 5)
    assert library.close()


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_of_a_group_is_damaged(pair: str, tmp_path: Folder, name: str) -> None:
    damaged = tmp_path / "x.zip"
    with zipfile.ZipFile(pair) as old, zipfile.ZipFile(damaged, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            data = bytearray(old.read(member))
            if member == f"lib{name}.so":
                data[18:20] = b"\0\0"  # e_machine
            new.writestr(member, data)
    if name == "a":
        with pytest.raises(Malformed, match=r"liba\.so: e_machine"):
            image.load(f"{damaged}!/liba.so")
    else:
        assert f"{damaged}/libb.so: e_machine" in str(refused(f"{damaged}!/liba.so"))
    gc.collect()


def test_something_is_missing_in_a_group(tmp_path: Folder) -> None:
    needs: Needs = {"top": ["a"], "a": ["b"], "b": ["a", "gone"], "gone": []}
    files = build(tmp_path, needs)
    archive = zipped(tmp_path / "x.zip", *files[:3])
    assert "libgone.so: cannot open shared object file" in str(refused(f"{archive}!/libtop.so"))
    more = tmp_path / "more"
    more.mkdir()
    files = build(more, {"top": ["a"], **PAIR}, b="int nobody(void); int user(void) { return nobody(); }")
    archive = zipped(more / "x.zip", *files)
    failure = refused(f"{archive}!/libtop.so")
    assert failure.path == f"{archive}/libb.so"
    assert "libb.so: undefined symbol: nobody" in str(failure)
    assert f"{archive}/libb.so, which {archive}/liba.so needs, cannot be loaded" in str(failure)
    gc.collect()


def test_another_name_in_a_circle(tmp_path: Folder) -> None:
    files = build(tmp_path, {"top": ["a"], **PAIR})
    flags = (f"-L{tmp_path}/stubs", "-l:libb.so", "-Wl,-rpath,$ORIGIN")
    compiled(tmp_path, "liba.so", code("a", ["b"]), *flags)
    archive = zipped(tmp_path / "x.zip", *files)
    assert "does not call itself liba.so (DT_SONAME)" in str(refused(f"{archive}!/libtop.so"))
    gc.collect()
