"""Compiled code of wheels: kept for the next process, of the same source only, in the user's own folder."""

import os
import pathlib

import pytest
from libraries import LARGE
from wheelfiles import MULTI_PHASE, SUFFIX, extension, isolated, make_wheel

from quire.wheels.compiled import VARIABLE

Folder = pathlib.Path

COUNTED = """
import builtins
compiled = []
original = builtins.compile
def counted(source, path, *args, **more):
    compiled.append(path)
    return original(source, path, *args, **more)
builtins.compile = counted
import pkg.mod
print(len(compiled), pkg.mod.value, pkg.mod.where())
"""
MEMBERS = {
    "pkg/__init__.py": "",
    "pkg/mod.py": "import sys\nvalue = 1\ndef where(): return where.__code__.co_filename\n",
}


def files_in(folder: Folder) -> list[Folder]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_next_process_compiles_nothing(tmp_path: Folder) -> None:
    cache = tmp_path / "cache"
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    assert isolated(COUNTED, wheel, code_cache=cache) == f"2 1 {wheel}/pkg/mod.py\n"
    assert isolated(COUNTED, wheel, code_cache=cache) == f"0 1 {wheel}/pkg/mod.py\n"
    assert len(files_in(cache)) == 2
    for path in (cache, *files_in(cache)):
        assert not path.stat().st_mode & 0o077, path
    # Another wheel at the same place, and one that only was touched, are other sources.
    make_wheel(wheel, MEMBERS | {"pkg/mod.py": MEMBERS["pkg/mod.py"].replace("1", "2")})
    assert isolated(COUNTED, wheel, code_cache=cache).startswith("2 2 ")
    os.utime(wheel, ns=(1, 1))
    assert isolated(COUNTED, wheel, code_cache=cache).startswith("2 2 ")
    assert isolated(COUNTED, wheel, code_cache=cache).startswith("0 2 ")
    assert len(files_in(cache)) == 2


def test_damaged_files_are_made_again(tmp_path: Folder) -> None:
    cache = tmp_path / "cache"
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    isolated(COUNTED, wheel, code_cache=cache)
    [place] = [path for path in files_in(cache) if "mod" in path.name]
    good = place.read_bytes()
    flipped = bytearray(good)
    flipped[-9] ^= 1
    for bad in (b"", good[:20], good[:-1], bytes(len(good)), bytes(flipped)):
        place.write_bytes(bad)
        assert isolated(COUNTED, wheel, code_cache=cache).startswith("1 1 ")
        assert place.read_bytes() == good


@pytest.mark.parametrize("case", ["off", "relative", "readable", "link", "file"])
def test_folders_that_are_not_used(tmp_path: Folder, case: str) -> None:
    folder = tmp_path / "cache"
    if case == "readable":
        # Who may write to it is what matters; a folder that others may read is not ours either.
        folder.mkdir()
        folder.chmod(0o755)
    elif case == "link":
        (tmp_path / "target").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "target")
    elif case == "file":
        folder.write_bytes(b"")
    cache = {"off": "off", "relative": "cache"}.get(case, folder)
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    for _ in range(2):
        assert isolated(COUNTED, wheel, code_cache=cache).startswith("2 1 ")
    assert not [path for path in files_in(tmp_path) if path.name.endswith("c")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user")
def test_a_folder_of_another_user(tmp_path: Folder) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    assert isolated(COUNTED, wheel, code_cache=folder).startswith("2 1 ")
    assert not files_in(folder)


def test_nothing_is_written_when_python_writes_nothing(tmp_path: Folder) -> None:
    cache = tmp_path / "cache"
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    isolated("sys.dont_write_bytecode = True\nimport pkg.mod", wheel, code_cache=cache)
    assert not files_in(cache)


def test_a_full_disk_or_a_folder_that_goes(tmp_path: Folder) -> None:
    """What cannot be kept is compiled, and nothing half-written stays."""
    cache = tmp_path / "cache"
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    script = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
import pkg.mod
assert pkg.mod.value == 1
"""
    isolated(script, wheel, code_cache=cache)
    assert not files_in(cache)


def test_source_and_errors_are_as_without(tmp_path: Folder) -> None:
    members = {
        "latin.py": "# -*- coding: latin-1 -*-\r\nvalue = '\xe9'\r\n".encode("latin-1"),
        "wrong.py": "x = = 1\n",
    }
    wheel = make_wheel(tmp_path / "w.whl", members)
    script = f"""
import inspect, latin
assert latin.value == "\\xe9" and "latin-1" in inspect.getsource(latin)
try:
    import wrong
except SyntaxError as error:
    assert error.filename == "{wheel}/wrong.py" and error.lineno == 1, error
else:
    raise AssertionError
"""
    for _ in range(2):
        isolated(script, wheel, code_cache=tmp_path / "cache")


def test_the_default_is_the_users_cache_folder(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    isolated(COUNTED, wheel, code_cache="")
    assert len(files_in(tmp_path / "xdg" / "quire" / "code")) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    isolated(COUNTED, wheel, code_cache="")
    assert len(files_in(tmp_path / "home" / ".cache" / "quire" / "code")) == 2
    assert VARIABLE == "QUIRE_CODE_CACHE"


def test_what_is_kept_beside_compiled_code_finds_a_folder_of_its_own(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever comes first makes the folder; checkpoints are kept only where nobody else may enter.
    library = extension(tmp_path, "large", template=LARGE.replace("{", "{{").replace("}", "}}") + MULTI_PHASE)
    wheel = make_wheel(tmp_path / "w.whl", {**MEMBERS, f"large{SUFFIX}": library})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    isolated(COUNTED + "import large", wheel, code_cache="")
    folder = tmp_path / "xdg" / "quire"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(files_in(folder / "code")) == 2
    assert list(folder.glob("*-1.idx"))
