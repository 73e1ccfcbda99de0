"""``why``: what is said of files is compared with what the running kernel and linker do with them."""

import contextlib
import errno
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import zipfile

import pytest
from elffiles import AARCH64, I386, MIPS, S390X, compiled_program, head
from namespaces import with_mounts
from support import nothing_left

from quire.errors import Malformed
from quire.image import binfmt, fatelf, libraries, read
from quire.image.elf import ElfImage
from quire.image.machines import machine_name, native
from quire.image.verdict import Verdict, why

Folder = pathlib.Path

HELLO = "int main(void) { return 0; }"
PE = b"MZ".ljust(60, b"\0") + (64).to_bytes(4, "little") + b"PE\0\0\x64\x86".ljust(24, b"\0") + b"\x0b\x02"


def outcome(path: Folder | str, env: dict[str, str] | None = None) -> int | str:
    """What happens to a file that is executed: an errno, or ``runs``, or ``fails`` after it was started."""
    try:
        done = subprocess.run(["argv0"], executable=path, capture_output=True, check=False, env=env)
    except OSError as error:
        return error.errno or -1
    return "runs" if done.returncode == 0 else "fails"


def made(folder: Folder, content: bytes, mode: int = 0o755, name: str = "file") -> Folder:
    path = folder / name
    path.write_bytes(content)
    path.chmod(mode)
    return path


def judged(path: Folder | str, env: dict[str, str] | None = None) -> Verdict:
    """The verdict of a file, which must be what happens."""
    with nothing_left():
        verdict = why(path, env)
    real = outcome(path, env)
    if isinstance(real, int):
        assert verdict.runs is False, (verdict, errno.errorcode[real])
        assert errno.errorcode[verdict.errno] == errno.errorcode[real], verdict
        assert verdict.missing
    else:
        assert verdict.errno == 0, (verdict, real)
        assert verdict.runs is (real == "runs"), (verdict, real)
    json.dumps(verdict.as_dict())
    return verdict


@pytest.fixture(scope="module")
def hello(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return compiled_program(tmp_path_factory.mktemp("hello"), HELLO)


def test_programs(tmp_path: Folder, hello: Folder) -> None:
    verdict = judged(hello)
    assert [library.name for library in verdict.libraries] == ["libc.so.6"]
    assert any("dynamic linker" in step for step in verdict.steps)
    static = compiled_program(tmp_path, HELLO, "static", "-static")
    assert "statically linked" in judged(static).steps[-1]
    pie = compiled_program(tmp_path, HELLO, "static-pie", "-static-pie")
    assert "statically linked" in judged(pie).steps[-1]
    assert judged(sys.executable).runs
    linker = read(hello).interpreter
    assert linker is not None
    assert why(linker).runs
    assert outcome(linker) in ("runs", "fails"), "without an argument it says how it is used"


FORMATS = {
    "empty": (b"", "a shell runs it"),
    "text": (b"echo hello\n", "shells and execvp"),
    "utf-8": ("# Grüße\n".encode(), "shells and execvp"),
    "binary": (b"\x01\x02\x03", "no known format"),
    "pe": (PE.ljust(400, b"\0"), "Wine"),
    "net": (PE.ljust(24 + 64 + 112 + 14 * 8, b"\0") + b"\1\0\0\0\1\0\0\0", "Mono"),
    "dos": (b"MZ".ljust(200, b"\0"), "DOSBox"),
    "mach-o": (bytes.fromhex("cffaedfe07000001") + bytes(24), "Darling"),
    "universal": (bytes.fromhex("cafebabe00000002") + bytes(40), "Darling"),
    "java": (bytes.fromhex("cafebabe00000041") + bytes(40), "Java"),
    "wasm": (b"\0asm\1\0\0\0", "WebAssembly"),
    "bitcode": (b"BC\xc0\xde" + bytes(20), "lli"),
    "pyc": (bytes.fromhex("a70d0d0a") + bytes(20), "Python"),
    "one": (b"\x7f", "no known format"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "quire image exec"),
    "fatelf": (b"\xfa\x70\x0e\x1f\1\0\1\0", "quire fatelf run"),
    "mz": (b"MZ\n", "shells and execvp"),
    "pe-cut": (b"MZ".ljust(60, b"\0") + b"\xff\xff\xff\xff", "DOSBox"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_the_kernel_does_not_run(tmp_path: Folder, kind: str) -> None:
    content, hint = FORMATS[kind]
    verdict = judged(made(tmp_path, content))
    assert verdict.errno == errno.ENOEXEC
    assert any(hint in text for text in (*verdict.hints, *verdict.missing)), verdict


def test_archives(tmp_path: Folder) -> None:
    for member, hint in {
        "META-INF/MANIFEST.MF": "java -jar",
        "__main__.py": "python3",
        "x": "!/member",
    }.items():
        path = tmp_path / "archive"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, "")
        path.chmod(0o755)
        found = {"java": "#!/bin/sh\n", "python3": "#!/bin/sh\n"}
        for name, content in found.items():
            made(tmp_path, content.encode(), name=name)
        verdict = why(path, {"PATH": str(tmp_path)})
        assert any(hint in text for text in verdict.hints), verdict
        assert judged(path).errno == errno.ENOEXEC


def test_a_loader_that_is_installed_is_named(tmp_path: Folder) -> None:
    path = made(tmp_path, PE.ljust(400, b"\0"), name="a.exe")
    assert any("Wine would run it and is not installed" in hint for hint in why(path, {"PATH": ""}).hints)
    made(tmp_path, b"#!/bin/sh\n", name="wine")
    hints = why(path, {"PATH": str(tmp_path)}).hints
    assert any(f"wine {path} runs it" in hint for hint in hints), hints


def test_other_machines(tmp_path: Folder, hello: Folder) -> None:
    for ident in (AARCH64, S390X, MIPS, native()._replace(machine=9999)):
        if ident.machine == native().machine:
            continue
        verdict = judged(made(tmp_path, head(ident, bytes(100))))
        assert verdict.errno == errno.ENOEXEC
    # As real as they get: a program for this machine that says it is for another.
    data = bytearray(hello.read_bytes())
    data[18:20] = (243).to_bytes(2, "little")
    verdict = judged(made(tmp_path, bytes(data)))
    assert "does not run programs for riscv" in verdict.missing[0]
    assert any("qemu-riscv64" in hint for hint in verdict.hints)


def test_other_kinds_of_elf(tmp_path: Folder) -> None:
    code = tmp_path / "code.c"
    code.write_text("int f(void) { return 1; }")
    for flags in (["-c"], ["-shared", "-fPIC"]):
        subprocess.run(["cc", *flags, "-o", tmp_path / "out", code], check=True)
        (tmp_path / "out").chmod(0o755)
        judged(tmp_path / "out")
    assert judged(made(tmp_path, b"\x7fELF")).errno == errno.ENOEXEC
    assert judged(made(tmp_path, head(native()))).errno == errno.ENOEXEC


def test_permissions(tmp_path: Folder, hello: Folder) -> None:
    verdict = judged(made(tmp_path, hello.read_bytes(), 0o644))
    assert verdict.errno == errno.EACCES
    assert "its mode is -rw-r--r--" in verdict.missing[0]
    assert any("dynamic linker" in step for step in verdict.steps)
    assert judged(tmp_path).errno == errno.EACCES
    assert judged(tmp_path / "none").errno == errno.ENOENT
    assert judged(hello / "below").errno == errno.ENOTDIR
    os.symlink("loop", tmp_path / "loop")
    assert judged(tmp_path / "loop").errno == errno.ELOOP
    os.mkfifo(tmp_path / "pipe", 0o755)
    assert judged(tmp_path / "pipe").errno == errno.EACCES


def test_file_systems_without_execution(tmp_path: Folder, hello: Folder) -> None:
    script = f"""
import json, subprocess
from quire.image.verdict import why
try:
    subprocess.run(["x"], executable="{tmp_path}/mount/file")
except OSError as error:
    print(error.errno)
print(json.dumps(why("{tmp_path}/mount/file").as_dict()))
"""
    target = tmp_path / "mount"
    target.mkdir()
    mounts = f"mount -t tmpfs -o noexec tmpfs {target} && cp {hello} {target}/file"
    number, verdict = with_mounts(mounts, script).splitlines()
    assert int(number) == errno.EACCES
    found = json.loads(verdict)
    assert found["errno"] == "EACCES"
    assert found["missing"] == [
        f"{tmp_path}/mount/file is on a file system that is mounted noexec ({tmp_path}/mount)"
    ]


@pytest.mark.parametrize(
    "line",
    [
        "#!/bin/sh\n",
        "#!/no/such\n",
        "#!/etc/passwd\n",
        "#!/etc\n",
        "#!\n",
        "#!",
        "#!/usr/bin/env sh\n",
        "#!/usr/bin/env no-such-program\n",
        "#!/usr/bin/env -S sh -e\n",
        "#!/usr/bin/env -S A=b no-such-program\n",
        "#! /bin/true with arguments\n",
    ],
)
def test_scripts(tmp_path: Folder, line: str) -> None:
    judged(made(tmp_path, line.encode()))


def test_env_that_starts_the_same_script_for_ever(tmp_path: Folder) -> None:
    # Only judged: it would run for ever.
    path = made(tmp_path, b"#!/usr/bin/env again\n", name="again")
    verdict = why(path, {"PATH": str(tmp_path)})
    assert verdict.runs is False
    assert "without end" in verdict.missing[0]


def test_scripts_of_scripts(tmp_path: Folder, hello: Folder) -> None:
    before = hello
    for level in range(7):
        before = made(tmp_path, b"#!" + os.fsencode(before) + b"\n", name=f"level{level}")
        verdict = judged(before)
        assert verdict.errno == (errno.ELOOP if level >= 5 else 0)
    itself = tmp_path / "itself"
    assert judged(made(tmp_path, b"#!" + os.fsencode(itself), name="itself")).errno == errno.ELOOP
    text = made(tmp_path, b"text", name="text")
    assert judged(made(tmp_path, b"#!" + os.fsencode(text))).errno == errno.ENOEXEC


def test_the_dynamic_linker(tmp_path: Folder) -> None:
    def linked(linker: Folder | str) -> Folder:
        return compiled_program(tmp_path, HELLO, "program", f"-Wl,--dynamic-linker={linker}")

    assert judged(linked("/no/linker")).errno == errno.ENOENT
    assert judged(linked(made(tmp_path, b"x" * 100, 0o644, "data"))).errno == errno.EACCES
    assert judged(linked(made(tmp_path, b"x" * 100, 0o755, "text"))).errno == errno.ELIBBAD
    other = I386 if native() != I386 else S390X
    assert judged(linked(made(tmp_path, head(other, bytes(100)), 0o755, "other"))).errno == errno.ELIBBAD


LIBRARY = "int value(void) { return 0; }"
USER = "int value(void); int main(void) { return value(); }"


def library(folder: Folder, name: str, *flags: str | Folder, source: str = LIBRARY) -> Folder:
    folder.mkdir(exist_ok=True)
    code = folder / "code.c"
    code.write_text(source)
    out = folder / name
    subprocess.run(["cc", "-shared", "-fPIC", "-o", out, code, f"-Wl,-soname,{name}", *flags], check=True)
    return out


@pytest.mark.parametrize("tags", ["--disable-new-dtags", "--enable-new-dtags"], ids=["rpath", "runpath"])
def test_libraries_are_found_as_the_linker_finds_them(tmp_path: Folder, tags: str) -> None:
    inner = library(tmp_path / "inner", "libinner.so", source="int inner(void) { return 0; }")
    outer = library(
        tmp_path / "outer",
        "libouter.so",
        inner,
        source="int inner(void); int value(void) { return inner(); }",
    )
    other = library(tmp_path / "other", "libouter.so")
    rpath = f"-Wl,{tags},-rpath,$ORIGIN/outer:{tmp_path}/inner,-rpath-link,{tmp_path}/inner"
    program = compiled_program(tmp_path, USER, "program", str(outer), rpath)
    verdict = judged(program, {"PATH": "/bin"})
    # Only DT_RPATH is for what is needed by what is needed.
    assert verdict.runs is (tags == "--disable-new-dtags")
    places = {found.name: found.path for found in verdict.libraries}
    assert places["libouter.so"] == str(outer)
    verdict = judged(program, {"LD_LIBRARY_PATH": f"{tmp_path}/none:{tmp_path}/inner;/nowhere"})
    assert verdict.runs
    # LD_LIBRARY_PATH comes after DT_RPATH and before DT_RUNPATH.
    verdict = judged(program, {"LD_LIBRARY_PATH": f"{other.parent}:{inner.parent}"})
    assert verdict.libraries[0].path == str(outer if tags == "--disable-new-dtags" else other)
    # What is for another machine is passed over.
    wrong = bytearray(outer.read_bytes())
    wrong[18] ^= 1
    (tmp_path / "wrong").mkdir()
    made(tmp_path / "wrong", bytes(wrong), name="libouter.so")
    verdict = judged(program, {"LD_LIBRARY_PATH": f"{tmp_path}/wrong:{inner.parent}"})
    assert verdict.libraries[0].path == str(outer)
    outer.unlink()
    verdict = judged(program)
    assert "the library libouter.so" in verdict.missing[0]


def test_versions_that_a_library_lacks(tmp_path: Folder) -> None:
    versions = tmp_path / "map"
    versions.write_text("V_2 { global: value; local: *; };")
    new = library(tmp_path / "lib", "libv.so", f"-Wl,--version-script={versions}")
    program = compiled_program(tmp_path, USER, "program", str(new), f"-Wl,-rpath,{new.parent}")
    assert judged(program).runs
    versions.write_text("V_1 { global: value; local: *; };")
    library(tmp_path / "lib", "libv.so", f"-Wl,--version-script={versions}")
    verdict = judged(program)
    assert verdict.runs is False
    assert "has no symbols of version V_2" in verdict.missing[0]


def test_damaged_and_missing_sections(tmp_path: Folder, hello: Folder) -> None:
    rng = random.Random(3)
    whole = hello.read_bytes()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(rng.choice([64, 800, len(data)]))] = rng.randrange(256)
        path = made(tmp_path, bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
        verdict = why(path)
        assert verdict.runs in (True, False, None)


def traced(program: str) -> dict[str, str]:
    """What the linker itself says that it loads, of a program that the system came with."""
    linker = read(program).interpreter
    assert linker is not None
    done = subprocess.run(
        [linker, "--list", os.path.realpath(program)], capture_output=True, text=True, check=True
    )
    lines = (line.split() for line in done.stdout.splitlines() if "=>" in line)
    return {words[0]: words[2] for words in lines}


def test_the_systems_programs_need_what_their_linker_loads() -> None:
    names = sorted(os.listdir("/usr/bin"))
    checked = 0
    for name in names[:: max(1, len(names) // 60)]:
        path = f"/usr/bin/{name}"
        with open(path, "rb") as file:
            if file.read(4) != b"\x7fELF":
                continue
        image = read(path)
        if not isinstance(image, ElfImage) or image.interpreter is None:
            continue
        verdict = why(path)
        assert verdict.runs, verdict
        ours = {library.name: library.path for library in verdict.libraries}
        real = traced(path)
        assert ours.keys() == real.keys(), path
        assert all(os.path.samefile(ours[key] or "", place) for key, place in real.items()), path
        checked += 1
    assert checked > 10


def test_the_linkers_cache(tmp_path: Folder) -> None:
    if not os.path.exists(libraries.CACHE):
        pytest.skip(f"there is no {libraries.CACHE}")
    assert "libc.so.6" in libraries.cached()
    assert libraries.cached(str(tmp_path / "none")) == {}
    whole = pathlib.Path(libraries.CACHE).read_bytes()
    for data in (b"", whole[:47], whole[:100], b"x" * 100, whole[:20] + b"\xff" * 8 + whole[28:]):
        with pytest.raises(Malformed, match="cache"):
            libraries.cached(str(made(tmp_path, data)))
    for at in range(48, 96):
        data = bytearray(whole)
        data[at] ^= 0xFF
        with contextlib.suppress(Malformed):
            libraries.cached(str(made(tmp_path, bytes(data))))


def test_members_and_bytes_are_judged_as_what_runs_from_memory(tmp_path: Folder, hello: Folder) -> None:
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.write(hello, "bin/tool")
    assert why(f"{tmp_path}/app.zip!/bin/tool").runs
    assert why(hello.read_bytes()).runs
    assert why(b"text").errno == errno.ENOEXEC
    fat = tmp_path / "fat"
    fatelf.glue([hello, head(S390X)], fat)
    assert why(fat).errno == errno.ENOEXEC
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.write(fat, "fat")
    verdict = why(f"{tmp_path}/app.zip!/fat")
    assert verdict.runs
    assert [library.name for library in verdict.libraries] == ["libc.so.6"]
    assert why(hello.as_uri()).runs
    other = native()._replace(machine=9999)
    fatelf.glue([head(other)], fat, force=True)
    verdict = why(fat.read_bytes())
    assert f"which are for {machine_name(9999)}" in verdict.missing[0]
    with pytest.raises(FileNotFoundError):
        why(f"{tmp_path}/app.zip!/none")


def test_rules_of_binfmt_misc(tmp_path: Folder, hello: Folder) -> None:
    script = f"""
import errno, json, subprocess, sys
from quire.image.verdict import why
def register(rule):
    open("{binfmt.DIRECTORY}/register", "w").write(rule)
def show(name):
    path = "{tmp_path}/" + name
    try:
        real = subprocess.run(["x"], executable=path).returncode
    except OSError as error:
        real = errno.errorcode[error.errno]
    print(json.dumps([name, real, why(path).as_dict()]))
register(":pe:M::MZ::{tmp_path}/s.sh:")
register(":one:E::one::{hello}:")
register(":two:E::two::/no/such:")
register(":three:E::three::{hello}:F")
for name in ("a.one", "a.two", "a.three", "a.exe", "s.sh", "elf"):
    show(name)
register(r":elf:M::\\x7fELF::{tmp_path}/s.sh:")
show("elf")
"""
    for name in ("a.one", "a.two", "a.three", "a.exe"):
        made(tmp_path, b"MZ", name=name)
    made(tmp_path, f"#!{shutil.which('true')}\n".encode(), name="s.sh")
    made(tmp_path, hello.read_bytes(), name="elf")
    printed = with_mounts(f"mount -t binfmt_misc binfmt_misc {binfmt.DIRECTORY}", script)
    results = [json.loads(line) for line in printed.splitlines()]
    reals = [real for _, real, _ in results]
    # The last rule is for the interpreters of all others, and for its own.
    assert reals == [0, "ENOENT", 0, 0, 0, 0, "ELOOP"]
    for name, real, verdict in results:
        assert verdict["errno"] == (real if isinstance(real, str) else None), (name, real, verdict)
        assert verdict["runs"] is (real == 0), (name, real, verdict)
    assert "the rule one of binfmt_misc" in results[0][2]["steps"][0]
