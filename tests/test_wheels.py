"""Wheels on ``sys.path``: hand-made ones for everything that real ones seldom show."""

import pathlib
import stat
import zipfile

import pytest
from wheelfiles import (
    MULTI_PHASE,
    SINGLE_PHASE,
    SUFFIX,
    compiled_library,
    extension,
    isolated,
    make_wheel,
)

Folder = pathlib.Path

ERROR_OF = """
def error_of(name):
    try:
        __import__(name)
    except ImportError as error:
        return error
    raise SystemExit(f"{name} was imported")
"""

MEMFDS = """
import os
def memfds():
    places = ((int(fd), f"/proc/{os.getpid()}/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    return {fd: os.readlink(place) for fd, place in places if os.path.exists(place)
            and os.readlink(place).startswith("/memfd:")}
"""


@pytest.mark.parametrize("template", [SINGLE_PHASE, MULTI_PHASE], ids=["single-phase", "multi-phase"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_extension_module(tmp_path: Folder, template: str, method: int) -> None:
    code = extension(tmp_path, "ext", template=template)
    wheel = make_wheel(tmp_path / "w.whl", {"pkg/__init__.py": "", f"pkg/ext{SUFFIX}": code}, method=method)
    isolated(
        MEMFDS
        + f"""
import fcntl, pathlib, pickle
import pkg.ext as ext
place = "{wheel}/pkg/ext{SUFFIX}"
assert ext.value() == 42
assert ext.__file__ == ext.__spec__.origin == ext.__loader__.path == place, ext.__file__
assert ext.__name__ == "pkg.ext" and ext.__package__ == "pkg" and ext.__spec__.loader is ext.__loader__
assert pickle.loads(pickle.dumps(ext.value)) is ext.value
[(fd, name)] = memfds().items()
assert "pkg/ext" in name, name
assert name in pathlib.Path("/proc/self/maps").read_text()
assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 15 == 15
assert not os.get_inheritable(fd)
for attempt in range(2):
    del sys.modules["pkg.ext"]
    import pkg.ext
assert pkg.ext.count() == 1 and ext.count() == 2, "one member is one object"
assert len(memfds()) == 1
""",
        wheel,
    )


def test_packages_come_before_modules_and_extensions_before_python(tmp_path: Folder) -> None:
    members = {
        f"both{SUFFIX}": extension(tmp_path, "both"),
        "both.py": "raise AssertionError",
        f"deep/__init__{SUFFIX}": extension(tmp_path, "deep", "7"),
        "deep/__init__.py": "raise AssertionError",
        "deep/data.txt": "bytes of a resource",
        "deep/inner.py": "value = 8",
        f"plain{SUFFIX}": b"not reached",
        "plain/__init__.py": "value = 9",
    }
    isolated(
        """
import importlib.resources, both, deep, plain, deep.inner
assert (both.value(), deep.value(), plain.value, deep.inner.value) == (42, 7, 9, 8)
assert deep.__path__ == [deep.__spec__.origin.rpartition("/")[0]]
assert importlib.resources.files("deep").joinpath("data.txt").read_text() == "bytes of a resource"
assert deep.__loader__.get_data(deep.__path__[0] + "/data.txt") == b"bytes of a resource"
""",
        make_wheel(tmp_path / "w.whl", members),
    )


@pytest.mark.parametrize("tags", ["--enable-new-dtags", "--disable-new-dtags"])
def test_libraries_that_an_extension_needs(tmp_path: Folder, tags: str) -> None:
    # The outer library finds the inner one by its own search path if the extension has a DT_RUNPATH, else by
    # the extension's DT_RPATH, which holds for what is needed by what is needed.
    own = ["-Wl,-rpath,$ORIGIN"] if tags == "--enable-new-dtags" else []
    inner = compiled_library(
        tmp_path, "libinner.so.1", "int inner(void) { return 40; }", "-Wl,-soname,libinner.so.1"
    )
    outer = compiled_library(
        tmp_path,
        "libouter-0a.so",
        "int inner(void); int outer(void) { return inner() + 2; }",
        "-Wl,-soname,libouter-0a.so",
        f"-Wl,{tags}",
        "-l:libinner.so.1",
        *own,
    )
    flags = [f"-Wl,{tags},-rpath,/nowhere:$ORIGIN/../../made.libs", "-l:libouter-0a.so"]
    code = extension(tmp_path, "ext", "outer()", *flags, declared="int outer(void);")
    members: dict[str, str | bytes] = {
        f"pkg/sub/ext{SUFFIX}": code,
        "made.libs/libouter-0a.so": outer,
        "made.libs/libinner.so.1": inner,
    }
    script = """
import threading
from concurrent.futures import ThreadPoolExecutor
start = threading.Barrier(2)
def load(name):
    start.wait()
    return __import__(name, fromlist=["value"]).value()
with ThreadPoolExecutor(2) as pool:
    assert list(pool.map(load, ["pkg.sub.ext", "pkg.sub.other"])) == [42, 43]
"""
    other = extension(tmp_path, "other", "outer() + 1", *flags, declared="int outer(void);")
    wheel = make_wheel(tmp_path / "w.whl", members | {f"pkg/sub/other{SUFFIX}": other})
    isolated(MEMFDS + script + "assert len(memfds()) == 4, memfds()", wheel)

    del members["made.libs/libinner.so.1"]
    script = f"""
error = error_of("pkg.sub.ext")
assert "libinner.so.1: cannot open shared object" in str(error), error
assert "{tmp_path}/less.whl/made.libs/libouter-0a.so" in str(error), error
assert "/proc/self" not in str(error) and not memfds(), error
"""
    isolated(MEMFDS + ERROR_OF + script, make_wheel(tmp_path / "less.whl", members))


def test_a_library_that_nothing_has(tmp_path: Folder) -> None:
    compiled_library(tmp_path, "libgone.so.3", "int gone(void) { return 1; }", "-Wl,-soname,libgone.so.3")
    code = extension(tmp_path, "ext", "gone()", "-l:libgone.so.3", declared="int gone(void);")
    wheel = make_wheel(tmp_path / "w.whl", {f"ext{SUFFIX}": code})
    script = f"""
for attempt in range(3):
    error = error_of("ext")
    assert "libgone.so.3" in str(error) and error.path == "{wheel}/ext{SUFFIX}", error
    assert error.path in str(error) and error.name == "ext" and not memfds(), error
"""
    isolated(MEMFDS + ERROR_OF + script, wheel)


def test_a_library_under_another_name(tmp_path: Folder) -> None:
    library = compiled_library(tmp_path, "libone.so", "int one(void) { return 1; }")
    code = extension(
        tmp_path, "ext", "one()", "-l:libone.so", "-Wl,-rpath,$ORIGIN", declared="int one(void);"
    )
    wheel = make_wheel(tmp_path / "w.whl", {f"ext{SUFFIX}": code, "libone.so": library})
    isolated(ERROR_OF + 'assert "DT_SONAME" in str(error_of("ext"))', wheel)


def test_damaged_members(tmp_path: Folder) -> None:
    code = extension(tmp_path, "ext")
    flipped = make_wheel(tmp_path / "flipped.whl", {f"ext{SUFFIX}": code}, method=zipfile.ZIP_STORED)
    data = bytearray(flipped.read_bytes())
    data[data.index(code[:64]) + len(code) // 2] ^= 1
    flipped.write_bytes(data)
    wheels = {
        flipped: "CRC-32",
        make_wheel(tmp_path / "text.whl", {f"ext{SUFFIX}": "no object"}): "not those of an ELF file",
        make_wheel(tmp_path / "short.whl", {f"ext{SUFFIX}": code[:3000]}): "are not within the file",
        make_wheel(tmp_path / "empty.whl", {f"ext{SUFFIX}": ""}): "e_ident",
        make_wheel(tmp_path / "xz.whl", {f"ext{SUFFIX}": code}, method=zipfile.ZIP_LZMA): "method 14",
    }
    for wheel, text in wheels.items():
        script = f"""
error = error_of("ext")
assert {text!r} in str(error) and error.path == "{wheel}/ext{SUFFIX}" and error.path in str(error), error
assert not memfds()
"""
        isolated(MEMFDS + ERROR_OF + script, wheel)


def test_a_wheel_that_changes_while_it_is_used(tmp_path: Folder) -> None:
    code = extension(tmp_path, "ext")
    old = make_wheel(tmp_path / "w.whl", {"first.py": "", f"ext{SUFFIX}": code})
    new = make_wheel(tmp_path / "new.whl", {"first.py": "", "more.py": "", f"ext{SUFFIX}": code})
    script = f"""
import first, importlib, os
os.replace("{new}", "{old}")
assert "has changed" in str(error_of("ext"))
importlib.invalidate_caches()
import ext, more
assert ext.value() == 42
"""
    isolated(ERROR_OF + script, old)


@pytest.mark.parametrize("suffix", [".cpython-38-aarch64-linux-gnu.so", ".cp38-win_amd64.pyd"])
def test_a_wheel_for_something_else(tmp_path: Folder, suffix: str) -> None:
    wheel = make_wheel(tmp_path / "w.whl", {f"pkg/ext{suffix}": b""}, tag="cp38-cp38-manylinux_2_17_aarch64")
    script = f"""
import importlib.util
assert importlib.util.find_spec("pkg.ext").origin == "{wheel}/pkg/ext{suffix}"
text = str(error_of("pkg.ext"))
assert "cp38-cp38-manylinux_2_17_aarch64" in text and {suffix!r} in text, text
assert sys.implementation.cache_tag in text, text
"""
    isolated(ERROR_OF + script, wheel)


def test_names_that_lead_elsewhere_are_ignored(tmp_path: Folder) -> None:
    link = zipfile.ZipInfo(f"link{SUFFIX}")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    python = zipfile.ZipInfo("script.py")
    python.external_attr = link.external_attr
    wheel = make_wheel(tmp_path / "w.whl", {f"pkg/../up{SUFFIX}": b"", f"/root{SUFFIX}": b"", "pkg/x.py": ""})
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, f"pkg/real{SUFFIX}")
        archive.writestr(python, "pkg/x.py")
    script = """
for name in ("up", "root", "link", "script", "pkg.up"):
    assert type(error_of(name)) is ModuleNotFoundError, name
import pkg.x
"""
    isolated(ERROR_OF + script, wheel)


def test_descriptors_that_were_closed_behind_our_back(tmp_path: Folder) -> None:
    members = {
        f"{name}{SUFFIX}": extension(tmp_path, name, value) for name, value in (("a", "1"), ("b", "2"))
    }
    isolated(
        MEMFDS
        + """
import a
[fd] = memfds()
os.closerange(3, 100)
import b
assert fd not in memfds(), "the number means another object to the dynamic linker"
assert (a.value(), b.value()) == (1, 2)
del sys.modules["a"]
import a
assert a.value() == 1
""",
        make_wheel(tmp_path / "w.whl", members),
    )


def test_no_descriptors_left(tmp_path: Folder) -> None:
    wheel = make_wheel(tmp_path / "w.whl", {f"ext{SUFFIX}": extension(tmp_path, "ext")})
    script = """
import importlib.util, resource
spec = importlib.util.find_spec("ext")
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
error = error_of("ext")
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
assert "Too many open files" in str(error) and not memfds(), error
import ext
assert ext.value() == 42
"""
    isolated(MEMFDS + ERROR_OF + script, wheel)


def test_forked_and_spawned_processes(tmp_path: Folder) -> None:
    members = {
        f"{name}{SUFFIX}": extension(tmp_path, name, value) for name, value in (("a", "1"), ("b", "2"))
    }
    isolated(
        """
import os, subprocess
import a
pid = os.fork()
if not pid:
    import b
    os._exit(10 * a.value() + b.value())
import b
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 12
child = "import sys; sys.path[:] = sys.argv[1:]; import quire.wheels as w; w.enable(); import b; print(b)"
home = quire.__path__[0].rpartition("/")[0]
argv = [sys.executable, "-I", "-S", "-c", child, home, *sys.path]
done = subprocess.run(argv, capture_output=True, text=True)
assert "w.whl/b." in done.stdout, done
""",
        make_wheel(tmp_path / "w.whl", members),
    )


def test_what_is_pure_python(tmp_path: Folder) -> None:
    members = {
        "pkg/__init__.py": "class Thing: pass\ndef fail():\n    raise KeyError('here')\n",
        "pkg/data.txt": "text",
        f"pkg/ext{SUFFIX}": extension(tmp_path, "ext"),
        "space/one/mod.py": "value = 1\n",
        "made-1.0.dist-info/entry_points.txt": "[some.group]\nname = pkg:fail\n",
    }
    other = make_wheel(tmp_path / "o.whl", {"space/two/mod.py": "value = 2\n"})
    # By content, not by name.
    wheel = make_wheel(tmp_path / "no suffix", members)
    isolated(
        f"""
import importlib.metadata, importlib.resources, inspect, pickle, pkgutil, traceback
import pkg, space.one.mod, space.two.mod
assert pkg.__file__ == "{wheel}/pkg/__init__.py" and pkg.__path__ == ["{wheel}/pkg"]
assert (space.one.mod.value, space.two.mod.value) == (1, 2) and len(space.__path__) == 2
assert pickle.loads(pickle.dumps(pkg.Thing)) is pkg.Thing
assert importlib.resources.files(pkg).joinpath("data.txt").read_text() == "text"
assert pkgutil.get_data("pkg", "data.txt") == b"text"
assert importlib.metadata.version("made") == "1.0"
[entry] = importlib.metadata.entry_points(group="some.group")
assert entry.load() is pkg.fail
assert "raise KeyError" in inspect.getsource(pkg.fail)
try:
    pkg.fail()
except KeyError:
    assert "raise KeyError('here')" in traceback.format_exc()
assert {{m.name for m in pkgutil.iter_modules(pkg.__path__)}} == {{"ext"}}
assert [(m.name, m.ispkg) for m in pkgutil.iter_modules(["{wheel}"])] == [("pkg", True)]
assert [m.name for m in pkgutil.walk_packages(["{wheel}"])] == ["pkg", "pkg.ext"]
assert pkg.__loader__._files and pkg.__loader__.get_data("pkg/data.txt") == b"text"
""",
        wheel,
        other,
    )


def test_other_archives_are_left_to_zipimport(tmp_path: Folder) -> None:
    plain = tmp_path / "plain.whl"
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("mod.py", "value = 3\n")
        archive.writestr("deep/x.dist-info/WHEEL", "")
    wheel = make_wheel(tmp_path / "w.whl", {f"ext{SUFFIX}": extension(tmp_path, "ext"), "pure.py": ""})
    (tmp_path / "broken.whl").write_bytes(wheel.read_bytes()[:-30])
    isolated(
        ERROR_OF
        + """
import mod, zipimport
assert mod.value == 3 and type(mod.__loader__) is zipimport.zipimporter
hooks = list(sys.path_hooks)
quire.wheels.enable()
assert sys.path_hooks == hooks
import pure
assert isinstance(pure.__loader__, zipimport.zipimporter)
quire.wheels.disable()
quire.wheels.disable()
assert len(sys.path_hooks) == len(hooks) - 1
assert type(error_of("ext")) is ModuleNotFoundError
quire.wheels.enable()
import ext
assert ext.value() == 42
""",
        plain,
        tmp_path / "broken.whl",
        tmp_path / "gone.whl",
        wheel,
    )


def test_hostile_archives_are_no_wheels(tmp_path: Folder) -> None:
    """Every cut of a wheel is refused or read; nothing but ImportError comes out."""
    good = make_wheel(tmp_path / "w.whl", {"mod.py": "value = 1\n", f"ext{SUFFIX}": b"\x7fELF"}).read_bytes()
    directory = good.index(b"PK\1\2")
    wheels = []
    for at in range(directory, len(good), 3):
        path = tmp_path / f"{at}.whl"
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        wheels.append(path)
    isolated(
        """
paths = [path for path in sys.path if path.endswith(".whl")]
del sys.path[:len(paths)]
imported = 0
for path in paths:
    sys.path.insert(0, path)
    for name in ("mod", "ext"):
        sys.modules.pop(name, None)
        try:
            __import__(name)
            imported += 1
        except ImportError:
            pass
    del sys.path[0]
assert imported > len(paths) // 3, imported
""",
        *wheels,
    )
