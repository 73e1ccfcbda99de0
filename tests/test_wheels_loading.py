"""Extension modules whose code is filled when it is touched: threads, forks, wheels that change or clash."""

import pathlib
import zipfile

import pytest
from libraries import LARGE
from wheelfiles import MULTI_PHASE, SUFFIX, compiled_library, extension, isolated, make_wheel

Folder = pathlib.Path

# LARGE, for a template.
LITERAL = LARGE.replace("{", "{{").replace("}", "}}")


def large(folder: Folder, name: str, value: str = "42") -> bytes:
    """Compile an extension module whose ``value()`` runs 2 MiB of code and reads a page of 4 MiB."""
    template = LITERAL + MULTI_PHASE
    return extension(folder, name, f"walk() == 7 && page_of(900) == 901 ? {value} : -1", template=template)


def test_how_much_is_in_memory(tmp_path: Folder) -> None:
    members: dict[str, str | bytes] = {
        f"pkg/ext{SUFFIX}": large(tmp_path, "ext"),
        f"pkg/small{SUFFIX}": extension(tmp_path, "small"),
    }
    wheel = make_wheel(tmp_path / "w.whl", members)
    script = f"""
assert quire.wheels.stats() == {{}}
import pkg.ext, pkg.small
stats = quire.wheels.stats()
assert list(stats) == ["{wheel}/pkg/ext{SUFFIX}", "{wheel}/pkg/small{SUFFIX}"], stats
ext, small = stats.values()
assert small.whole and small.lazy_bytes == 0 and small.size_bytes > 0, small
"""
    lazy = """
assert "not worth" in small.whole
assert ext.whole == "" and ext.filled_bytes < 1 << 20 < 5 << 20 < ext.lazy_bytes < ext.size_bytes, ext
assert pkg.ext.value() == 42
after = quire.wheels.stats()[pkg.ext.__file__]
assert 2 << 20 < after.filled_bytes < after.lazy_bytes and after.faults > ext.faults, after
"""
    isolated('import os; os.environ.pop("QUIRE_LIBRARIES", None)' + script + lazy, wheel)
    whole = (
        'assert ext.whole == "QUIRE_LIBRARIES=whole is set" and ext.lazy_bytes == 0 and pkg.ext.value() == 42'
    )
    isolated('import os; os.environ["QUIRE_LIBRARIES"] = "whole"' + script + whole, wheel)


def test_threads_and_forks_while_code_is_missing(tmp_path: Folder) -> None:
    # Eight modules need one library; threads import and call them while the process forks, again and again.
    names = [f"ext{number}" for number in range(8)]
    shared = compiled_library(tmp_path, "libshared.so", LARGE, "-Wl,-soname,libshared.so")
    members: dict[str, str | bytes] = {
        "pkg/__init__.py": "",
        "made.libs/libshared.so": shared,
        f"pkg/spare{SUFFIX}": large(tmp_path, "spare"),
    }
    flags = ["-Wl,-rpath,$ORIGIN/../made.libs", "-l:libshared.so"]
    for name in names:
        value, declared = "walk() + page_of(900)", "int walk(void); int page_of(long);"
        members[f"pkg/{name}{SUFFIX}"] = extension(tmp_path, name, value, *flags, declared=declared)
    isolated(
        f"""
import importlib, os, threading
from concurrent.futures import ThreadPoolExecutor
import pkg
names = {names!r}
def use(name):
    return importlib.import_module("pkg." + name).value()
statuses = []
done = threading.Event()
def fork():
    while True:
        last = done.is_set()
        pid = os.fork()
        if not pid:
            # What another thread was importing stays locked in the child, by Python: so take what it has.
            ready = [module for name, module in sys.modules.items()
                     if name.startswith("pkg.ext") and hasattr(module, "value")]
            from pkg import spare
            good = spare.value() == 42 and all(module.value() == 908 for module in ready)
            os._exit(0 if good else 1)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if last:
            return
forker = threading.Thread(target=fork)
forker.start()
with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(use, names)) == [908] * 8
done.set()
forker.join()
assert not any(statuses), statuses
[path] = [path for path in quire.wheels.stats() if "libshared" in path]
assert len(quire.wheels.stats()) == 9
""",
        make_wheel(tmp_path / "w.whl", members),
    )


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_wheel_that_is_replaced_while_code_is_missing(tmp_path: Folder, method: int) -> None:
    code = large(tmp_path, "ext")
    wheel = make_wheel(tmp_path / "w.whl", {f"ext{SUFFIX}": code}, method=method)
    other = make_wheel(tmp_path / "other.whl", {f"ext{SUFFIX}": large(tmp_path, "ext", "43")}, method=method)
    isolated(
        f"""
import os
import ext
os.replace("{other}", "{wheel}")
assert ext.value() == 42, "the rest comes from the file that was opened"
del sys.modules["ext"]
sys.path_importer_cache.clear()
import ext as new
assert new.value() == 43 and new is not ext and ext.value() == 42
""",
        wheel,
    )


@pytest.mark.parametrize("change", ["file.truncate(5000)", "file.seek(5000); file.write(bytes(1 << 16))"])
def test_a_wheel_that_is_written_to_while_code_is_missing(tmp_path: Folder, change: str) -> None:
    # Stored, so that nothing of what is missing was read while something else was decompressed.
    code = {f"ext{SUFFIX}": large(tmp_path, "ext")}
    wheel = make_wheel(tmp_path / "w.whl", code, method=zipfile.ZIP_STORED)
    isolated(
        f"""
import os, signal
import ext
reading, writing = os.pipe()
pid = os.fork()
if not pid:
    os.dup2(writing, 2)
    with open("{wheel}", "r+b") as file:
        {change}
    print("never", ext.value(), file=sys.stderr, flush=True)
    os._exit(0)
os.close(writing)
with open(reading) as said:
    text = said.read()
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS, text
assert "never" not in text and "w.whl/ext" in text and "the file changed after it was opened" in text, text
""",
        wheel,
    )


def test_two_wheels_with_one_package(tmp_path: Folder) -> None:
    # The first on the path is taken, each with the library of its own wheel where both have one of a name.
    wheels = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        members: dict[str, str | bytes] = {
            "pkg/__init__.py": "",
            f"pkg/both{SUFFIX}": large(folder, "both", str(number)),
            f"only{number}{SUFFIX}": large(folder, f"only{number}", str(10 * number)),
        }
        wheels.append(make_wheel(folder / "w.whl", members))
    isolated(
        """
import pkg.both, only1, only2
assert (pkg.both.value(), only1.value(), only2.value()) == (2, 10, 20)
assert len(quire.wheels.stats()) == 3
sys.path.reverse()
sys.modules.pop("pkg"), sys.modules.pop("pkg.both")
import pkg.both as other
assert other.value() == 1
""",
        wheels[1],
        wheels[0],
    )
