"""Choosing wheels of a folder: versions, tags, markers, extras, what is needed by what is needed."""

import pathlib
import sys
import zipfile

import pytest

from quire.wheels.requirements import Unresolvable, read_requirements, resolve

Folder = pathlib.Path


def put(
    folder: Folder, name: str, version: str, *needs: str, tag: str = "py3-none-any", more: str = ""
) -> str:
    """Write a wheel that has nothing but metadata."""
    path = folder / f"{name}-{version}-{tag}.whl"
    lines = [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(path, "w") as archive:
        text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, more, ""])
        archive.writestr(f"{name}-{version}.dist-info/METADATA", text)
    return path.name


def chosen(folder: Folder, *requirements: str) -> set[str]:
    return {pathlib.Path(path).name for path in resolve(requirements, str(folder))}


def test_the_newest_that_all_agree_on(tmp_path: Folder) -> None:
    old = put(tmp_path, "base", "1.5")
    put(tmp_path, "base", "2.0")
    put(tmp_path, "base", "3.0rc1")
    new = put(tmp_path, "app", "2.0", "base<2", "Some.Lib")
    put(tmp_path, "app", "1.0", "base")
    lib = put(tmp_path, "some_lib", "0.1", "base>=1")
    assert chosen(tmp_path, "App") == {old, new, lib}
    assert chosen(tmp_path, "base") == {"base-2.0-py3-none-any.whl"}
    assert chosen(tmp_path, "base>=3.0rc1") == {"base-3.0rc1-py3-none-any.whl"}


def test_older_versions_are_tried(tmp_path: Folder) -> None:
    put(tmp_path, "app", "2.0", "base>=2")
    app = put(tmp_path, "app", "1.0", "base<2")
    base = put(tmp_path, "base", "1.0")
    assert chosen(tmp_path, "app", "base") == {app, base}


def test_tags_markers_and_pythons(tmp_path: Folder) -> None:
    put(tmp_path, "ext", "1.0")
    put(tmp_path, "ext", "2.0", tag="cp27-cp27m-win32")
    put(tmp_path, "ext", "1.5", more="Requires-Python: <3")
    put(tmp_path, "app", "1.0", "gone; python_version < '3'", "ext; sys_platform == 'linux'")
    assert chosen(tmp_path, "app", "gone; os_name == 'nt'") == {
        "app-1.0-py3-none-any.whl",
        "ext-1.0-py3-none-any.whl",
    }
    with pytest.raises(Unresolvable, match=r"ext==2.0.*cp27-cp27m-win32.whl is for another interpreter"):
        chosen(tmp_path, "ext==2.0")


def test_the_tag_that_this_interpreter_likes_most(tmp_path: Folder) -> None:
    put(tmp_path, "ext", "1.0", tag="py3-none-any")
    best = put(tmp_path, "ext", "1.0", tag=f"cp{sys.version_info.major}{sys.version_info.minor}-none-any")
    assert chosen(tmp_path, "ext") == {best}
    built = put(tmp_path, "ext", "1.0-7", tag=f"cp{sys.version_info.major}{sys.version_info.minor}-none-any")
    assert chosen(tmp_path, "ext") == {built}


def test_extras(tmp_path: Folder) -> None:
    app = put(tmp_path, "app", "1.0", "more[deep]; extra == 'big'", more="Provides-Extra: big")
    more = put(tmp_path, "more", "1.0", "last; extra == 'deep'", more="Provides-Extra: deep")
    last = put(tmp_path, "last", "1.0")
    assert chosen(tmp_path, "app") == {app}
    assert chosen(tmp_path, "app[Big]") == {app, more, last}
    with pytest.raises(Unresolvable, match="has no extra none"):
        chosen(tmp_path, "app[none]")


def test_what_is_missing_is_named(tmp_path: Folder) -> None:
    put(tmp_path, "app", "1.0", "base>=2")
    with pytest.raises(Unresolvable, match=r"base>=2, needed by app 1.0: there is no wheel of this name"):
        chosen(tmp_path, "app")
    put(tmp_path, "base", "1.0")
    with pytest.raises(Unresolvable, match=r"base>=2, needed by app 1.0: there is base-1.0"):
        chosen(tmp_path, "app")


def test_what_cannot_be_understood(tmp_path: Folder) -> None:
    for text in ("", "a b", "app @ file:///x"):
        with pytest.raises(ValueError, match=r"requirement|URL"):
            chosen(tmp_path, text)
    (tmp_path / "app-1.0-py3-none-any.whl").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"app-1.0-py3-none-any.whl cannot be read as a wheel"):
        chosen(tmp_path, "app")
    (tmp_path / "app.whl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"app.whl"):
        chosen(tmp_path, "app")
    with pytest.raises(FileNotFoundError):
        chosen(tmp_path / "gone", "app")


def test_files_of_requirements(tmp_path: Folder) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "req.txt"
    (tmp_path / "other.txt").write_text("c#d\n\n")
    path.write_text(
        "\ufeff# first\na>=1 # why\n  b[x] ; os_name == 'posix'\n--requirement=../other.txt\ne \\\n ==1\\\n"
    )
    assert read_requirements(str(path)) == ["a>=1", "b[x] ; os_name == 'posix'", "c#d", "e  ==1"]
    for line in ("--index-url x", "a --hash=sha256:1", "-e ."):
        path.write_text(f"a\n{line}\n")
        with pytest.raises(ValueError, match=r"req.txt:2: .*no option is supported but -r"):
            read_requirements(str(path))
