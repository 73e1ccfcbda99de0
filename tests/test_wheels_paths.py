"""Paths that lead into wheels: what Python code asks of them is answered, and nothing else changes."""

import pathlib
import zipfile

import pytest
from wheelfiles import SUFFIX, compiled_library, extension, isolated, make_wheel

Folder = pathlib.Path

MEMBERS: dict[str, str | bytes] = {
    "pkg/__init__.py": "import os\nhere = os.path.dirname(__file__)\n",
    "pkg/data/one.txt": "first\nsecond\n",
    "pkg/data/two.bin": bytes(range(256)) * 1000,
    "pkg/data/deep/three.py": "value = 3\n",
}


def test_opening(tmp_path: Folder) -> None:
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    isolated(
        """
import io, mmap, os, pathlib, pkg, shutil
before = sorted(os.listdir("/proc/self/fd"))
one, two = os.path.join(pkg.here, "data/one.txt"), os.path.join(pkg.here, "data", "..", "data", "two.bin")
with open(one) as file:
    assert file.read() == "first\\nsecond\\n" and file.name == one
with open(two, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
    assert file.read() == bytes(range(256)) * 1000 == view[:]
with io.open(one.encode(), mode="rb", buffering=0) as file:
    file.seek(6)
    assert file.read() == b"second\\n"
assert list(open(file=one, encoding="ascii")) == ["first\\n", "second\\n"]
assert pathlib.Path(one).read_text().startswith("first")
fd = os.open(one, os.O_RDONLY)
assert os.read(fd, 5) == b"first" and not os.get_inheritable(fd)
try:
    os.write(fd, b"x")
    raise AssertionError
except OSError as error:
    assert error.errno == 9
os.close(fd)
assert sorted(os.listdir("/proc/self/fd")) == before, "nothing stays open"
""",
        wheel,
    )


def test_source_code(tmp_path: Folder) -> None:
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    isolated(
        """
import importlib.util, inspect, linecache, os, pkg, tokenize
from quire.wheels import paths
deep = os.path.join(pkg.here, "data/deep/three.py")
spec = importlib.util.spec_from_file_location("three", deep)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.value == 3
# As if it had been imported before wheels were enabled.
paths.uninstall()
importlib.reload(tokenize)
paths.install()
linecache.clearcache()
assert inspect.getsource(pkg).startswith("import os") and linecache.getline(deep, 1) == "value = 3\\n"
paths.uninstall()
linecache.clearcache()
assert linecache.getline(deep, 1) == ""
""",
        wheel,
    )


def test_copying_and_walking(tmp_path: Folder) -> None:
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    isolated(
        f"""
import fnmatch, glob, os, pathlib, pkg, shutil, stat
data = os.path.join(pkg.here, "data")
assert os.listdir(data) == ["deep", "one.txt", "two.bin"] and os.listdir(data.encode())[0] == b"deep"
assert os.path.isdir(data) and not os.path.isfile(data) and os.path.exists(data + "/deep")
assert os.path.getsize(data + "/two.bin") == 256000 and os.path.isfile(data + "/one.txt")
assert not os.path.exists(data + "/gone") and not os.path.islink(data + "/one.txt")
assert stat.S_IMODE(os.stat(data + "/one.txt").st_mode) == 0o444
assert os.access(data, os.R_OK | os.X_OK) and not os.access(data + "/one.txt", os.W_OK)
assert not os.access(data + "/gone", os.F_OK)
assert os.path.samefile(data + "/one.txt", data + "/deep/../one.txt")
assert not os.path.samefile(data + "/one.txt", data + "/two.bin")
assert [(top[len(data):], folders, files) for top, folders, files in os.walk(data)] == [
    ("", ["deep"], ["one.txt", "two.bin"]), ("/deep", [], ["three.py"])]
assert glob.glob(data + "/*.txt") == [data + "/one.txt"]
assert [path.name for path in pathlib.Path(data).rglob("*.py")] == ["three.py"]
assert sorted(path.name for path in pathlib.Path(pkg.here).iterdir()) == ["__init__.py", "data"]
with os.scandir(data) as entries:
    assert [(entry.name, entry.is_dir(), entry.stat().st_size) for entry in entries][1:] == [
        ("one.txt", False, 13), ("two.bin", False, 256000)]
shutil.copytree(data, "{tmp_path}/copy")
assert sorted(os.listdir("{tmp_path}/copy")) == ["deep", "one.txt", "two.bin"]
""",
        wheel,
    )
    assert (tmp_path / "copy/two.bin").read_bytes() == MEMBERS["pkg/data/two.bin"]


def test_errors_are_those_of_a_folder_that_nobody_can_write_to(tmp_path: Folder) -> None:
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    plain = tmp_path / "plain"
    plain.write_text("no archive")
    with zipfile.ZipFile(tmp_path / "unused.whl", "w") as archive:
        archive.writestr("a", "b")
    isolated(
        f"""
import os, pkg
def refused(kind, call, path, *args):
    try:
        call(path, *args)
    except OSError as error:
        assert type(error) is kind and error.filename == path, repr(error)
    else:
        raise AssertionError((call, path))
data = pkg.here + "/data"
for call in (open, os.stat, os.lstat, os.listdir, os.scandir):
    refused(FileNotFoundError, call, data + "/gone")
refused(IsADirectoryError, open, data)
refused(NotADirectoryError, os.listdir, data + "/one.txt")
refused(NotADirectoryError, open, data + "/one.txt", "w")
refused(NotADirectoryError, open, data + "/new", "x")
refused(NotADirectoryError, os.open, data + "/one.txt", os.O_RDWR)
refused(NotADirectoryError, os.mkdir, data + "/new")
# What is no wheel is as it was.
for other in ("{plain}", "{tmp_path}/unused.whl"):
    for call in (open, os.stat, os.listdir):
        refused(NotADirectoryError, call, other + "/x")
refused(FileNotFoundError, open, "{tmp_path}/gone.whl/x")
for wrong in (None, 1.5, [], "\\0"):
    for call in (os.stat, open):
        try:
            call(wrong)
            raise AssertionError(wrong)
        except (TypeError, ValueError):
            pass
""",
        wheel,
    )


def test_a_damaged_or_changed_file_is_named(tmp_path: Folder) -> None:
    path = make_wheel(tmp_path / "w.whl", MEMBERS, method=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(b"first\nsecond") + 2] ^= 1
    path.write_bytes(data)
    isolated(
        f"""
import os, pkg
def error_of(name):
    try:
        open(pkg.here + name)
    except OSError as error:
        return error
error = error_of("/data/one.txt")
assert error.errno == 5 and "CRC-32" in str(error) and error.filename == pkg.here + "/data/one.txt", error
os.utime("{path}", (1, 1))
assert "has changed" in str(error_of("/data/two.bin"))
""",
        path,
    )


def test_other_names_of_the_archive(tmp_path: Folder) -> None:
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    (tmp_path / "link.whl").symlink_to(wheel)
    isolated(
        f"""
import os, pkg
os.chdir("{tmp_path}")
for name in ("w.whl", "./w.whl", "link.whl", "{tmp_path}/link.whl"):
    assert open(name + "/pkg/data/one.txt").readline() == "first\\n"
assert open(os.path.realpath("link.whl/pkg/data/one.txt")).readline() == "first\\n"
""",
        wheel,
    )


def test_paths_that_climb_out(tmp_path: Folder) -> None:
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    (tmp_path / "outside.txt").write_text("outside")
    isolated(
        """
import os, pkg
for path in ("/data/../../../outside.txt", "/../../outside.txt", "/../..", "/../../../../../../etc/passwd"):
    for call in (open, os.stat, os.listdir):
        try:
            call(pkg.here + path)
            raise AssertionError(path)
        except NotADirectoryError:
            pass
assert open(pkg.here + "/data/../../pkg/data/one.txt").readline() == "first\\n"
""",
        wheel,
    )


def test_ctypes(tmp_path: Folder) -> None:
    inner = compiled_library(
        tmp_path, "libinner.so", "int inner(void) { return 40; }", "-Wl,-soname,libinner.so"
    )
    outer = compiled_library(
        tmp_path,
        "libouter.so",
        "int inner(void); int outer(void) { return inner() + 2; }",
        "-l:libinner.so",
        "-Wl,-rpath,$ORIGIN",
    )
    members = {"pkg/libinner.so": inner, "pkg/libouter.so": outer, "pkg/bad.so": "text", **MEMBERS}
    isolated(
        """
import ctypes, os, pkg
library = ctypes.CDLL(os.path.join(pkg.here, "libouter.so"))
assert library.outer() == 42 and library._name == os.path.join(pkg.here, "libouter.so")
assert ctypes.cdll.LoadLibrary(pkg.here + "/libouter.so")._handle == library._handle
assert ctypes.PyDLL(pkg.here + "/libinner.so").inner() == 40
for name in ("bad.so", "gone.so"):
    try:
        ctypes.CDLL(f"{pkg.here}/{name}")
        raise AssertionError(name)
    except OSError as error:
        assert f"{pkg.here}/{name}" in str(error), error
assert ctypes.CDLL(None).getpid() == os.getpid()
""",
        make_wheel(tmp_path / "w.whl", members),
    )


def test_libraries_in_another_wheel(tmp_path: Folder) -> None:
    library = compiled_library(
        tmp_path, "libfar.so.1", "int far(void) { return 6; }", "-Wl,-soname,libfar.so.1"
    )
    flags = ["-l:libfar.so.1", "-Wl,-rpath,$ORIGIN/../vendor/lib"]
    code = extension(tmp_path, "ext", "far()", *flags, declared="int far(void);")
    one = make_wheel(tmp_path / "one.whl", {"pkg/__init__.py": "", f"pkg/ext{SUFFIX}": code})
    two = make_wheel(tmp_path / "two.whl", {"vendor/lib/libfar.so.1": library})
    isolated("import pkg.ext\nassert pkg.ext.value() == 6", one, two)


def test_real_paths(tmp_path: Folder) -> None:
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    isolated(
        """
import importlib.resources, os, pkg, subprocess, tempfile
before = len(os.listdir("/proc/self/fd"))
def no_folder(*_, **__):
    raise AssertionError("a temporary file")
tempfile.mkstemp = tempfile.mkdtemp = no_folder
resource = importlib.resources.files("pkg").joinpath("data").joinpath("one.txt")
with importlib.resources.as_file(resource) as path:
    assert path.read_text() == "first\\nsecond\\n"
    assert subprocess.check_output(["cat", path]) == b"first\\nsecond\\n"
del resource  # which keeps the archive open
with quire.wheels.as_file(pkg.here + "/data/two.bin") as path:
    assert subprocess.check_output(["cat", path]) == bytes(range(256)) * 1000
with quire.wheels.as_file("/etc/passwd") as path:
    assert path == "/etc/passwd"
try:
    quire.wheels.as_file(pkg.here + "/gone").__enter__()
    raise AssertionError
except FileNotFoundError as error:
    assert error.filename == pkg.here + "/gone"
assert len(os.listdir("/proc/self/fd")) == before
""",
        wheel,
    )


@pytest.mark.parametrize("way", ["disable", "paths"])
def test_it_can_be_undone_or_left_out(tmp_path: Folder, way: str) -> None:
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    isolated(
        f"""
import builtins, ctypes, io, os, pickle
class Holder:
    open = open
assert pickle.loads(pickle.dumps(open)) is open and pickle.loads(pickle.dumps(os.stat)) is os.stat
assert Holder().open("/dev/null").read() == ""
assert open.__name__ == "open" and os.stat in os.supports_dir_fd and os.stat in os.supports_follow_symlinks
fd = os.open("/", os.O_RDONLY)
assert os.stat("dev/null", dir_fd=fd) == os.stat("/dev/null") and os.listdir(fd) == os.listdir("/")
os.close(fd)
quire.wheels.disable()
for function in (open, io.open, os.stat, os.listdir, os.scandir):
    assert type(function).__name__ == "builtin_function_or_method", function
assert not hasattr(ctypes.CDLL.__init__, "__wrapped__") and not hasattr(os.access, "__wrapped__")
quire.wheels.enable(paths={way != "paths"})
import pkg
try:
    found = open(pkg.here + "/data/one.txt").readline()
except NotADirectoryError as error:
    found = error.filename
assert found == ("first\\n" if {way != "paths"} else pkg.here + "/data/one.txt"), found
""",
        wheel,
    )
