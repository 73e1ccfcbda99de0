"""Programs run out of archives, FatELF files and memory."""

import errno
import os
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Callable

import pytest
from elffiles import I386, X86_64, compiled_program, head
from namespaces import with_mounts
from support import PAGE, fork, nothing_left, run_script, wait

from quire import image
from quire.image import fatelf
from quire.image.machines import Ident, identify, kernel_runs, native

Folder = pathlib.Path

SHOW = """
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
    char where[4096];
    for (int i = 0; i < argc; i++) printf("arg %s\\n", argv[i]);
    printf("env %s\\n", getenv("MARK") ? getenv("MARK") : "none");
    ssize_t length = readlink("/proc/self/exe", where, sizeof where - 1);
    where[length] = 0;
    printf("exe %s\\n", where);
    DIR *folder = opendir("/proc/self/fd");
    for (struct dirent *each; (each = readdir(folder));)
        if (atoi(each->d_name) > 2 && atoi(each->d_name) != dirfd(folder)) printf("fd %s\\n", each->d_name);
    return 3;
}
"""


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A program that tells how it was started."""
    return compiled_program(tmp_path_factory.mktemp("show"), SHOW, "show")


def archived(folder: Folder, name: str, content: bytes) -> str:
    with zipfile.ZipFile(folder / "app.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return f"{folder / 'app.zip'}!/{name}"


def glued(folder: Folder, *parts: bytes | Folder) -> str:
    output = folder / "fat"
    fatelf.glue(parts, output, force=True)
    return str(output)


def spawned(target: object, *arguments: str, **options: object) -> tuple[int, list[str]]:
    argv = ["name", *arguments]
    with image.spawn(target, argv, stdout=subprocess.PIPE, text=True, **options) as child:
        assert child.stdout is not None
        lines = child.stdout.read().splitlines()
    return child.returncode, lines


def executed(target: object, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """Run `exec` in a forked child; how it ended, and what it printed."""
    reading, writing = os.pipe()

    def work() -> None:
        os.dup2(writing, 1)
        os.closerange(3, 1000)
        image.exec(target, ["name", *arguments], env)

    child = fork(work)
    os.close(writing)
    with open(reading, "rb") as file:
        lines = file.read().decode().splitlines()
    return wait(child), lines


MAKERS: dict[str, Callable[[Folder, Folder], object]] = {
    "file": lambda _, show: str(show),
    "member": lambda folder, show: archived(folder, "bin/show", show.read_bytes()),
    "fatelf": lambda folder, show: glued(folder, head(I386), show, head(Ident(22, 0, 0, 64, "big"))),
    "member-fatelf": lambda folder, show: archived(
        folder, "fat", pathlib.Path(glued(folder, show)).read_bytes()
    ),
    "bytes": lambda _, show: show.read_bytes(),
    "path": lambda _, show: show,
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("call", [spawned, executed])
def test_runs(tmp_path: Folder, show: Folder, kind: str, call: Callable[..., tuple[int, list[str]]]) -> None:
    target = MAKERS[kind](tmp_path, show)
    before = sorted(tmp_path.iterdir())
    with nothing_left():
        status, lines = call(target, "one", "two words", env={"MARK": "here"})
    assert status == 3
    assert lines[:4] == ["arg name", "arg one", "arg two words", "env here"]
    where = str(show) if kind in ("file", "path") else "/memfd:"
    assert lines[4].startswith(f"exe {where}")
    assert not [line for line in lines if line.startswith("fd ")], "a descriptor was left open in it"
    assert sorted(tmp_path.iterdir()) == before


def test_the_name_and_the_environment_are_the_default(show: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "inherited")
    with image.spawn(str(show), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.read().splitlines()[:2] == [f"arg {show}", "env inherited"]


@pytest.mark.parametrize("call", [spawned, executed])
def test_scripts_in_memory_keep_their_descriptor(
    tmp_path: Folder, call: Callable[..., tuple[int, list[str]]]
) -> None:
    target = archived(tmp_path, "tool", b'#!/bin/sh -e\necho "$0"\ncat "$0" | head -1\necho "$@"\n')
    with nothing_left():
        status, lines = call(target, "a", "b c")
    assert status == 0
    assert lines[0].startswith("/dev/fd/")
    assert lines[1:] == ["#!/bin/sh -e", "a b c"]


def test_subprocess_options(tmp_path: Folder) -> None:
    target = archived(tmp_path, "tool", b"#!/bin/sh\npwd\ncat\n")
    reading, writing = os.pipe()
    os.write(writing, b"from the pipe")
    os.close(writing)
    status, lines = spawned(target, cwd="/", stdin=reading, pass_fds=(reading,))
    os.close(reading)
    assert (status, lines) == (0, ["/", "from the pipe"])
    with pytest.raises(FileNotFoundError) as caught:
        spawned(target, cwd=tmp_path / "none")
    assert os.fspath(caught.value.filename) == str(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"plain text", errno.ENOEXEC),
        (b"", errno.ENOEXEC),
        (b"#!/no/such/interpreter\n", errno.ENOENT),
        (b"#!/etc/passwd\n", errno.EACCES),
        (b"#!" + b"x" * 300, errno.ENOEXEC),
        (head(Ident(22, 0, 0, 64, "big"), bytes(100)), errno.ENOEXEC),
    ],
)
def test_what_cannot_be_run_says_so(tmp_path: Folder, content: bytes, code: int) -> None:
    target = archived(tmp_path, "tool", content)
    with nothing_left():
        for call in (image.exec, image.spawn):
            with pytest.raises(OSError, match=r"app\.zip!/tool") as caught:
                call(target)
            assert caught.value.errno == code
    plain = tmp_path / "plain"
    plain.write_bytes(content)
    plain.chmod(0o755)
    for call in (image.exec, image.spawn):
        with pytest.raises(OSError, match=str(plain)) as caught:
            call(plain)
        assert caught.value.errno == code
    plain.chmod(0o644)
    for call in (image.exec, image.spawn):
        with pytest.raises(PermissionError):
            call(plain)


def test_misuse(tmp_path: Folder, show: Folder) -> None:
    with pytest.raises(TypeError, match="argv is a list"):
        image.spawn(show, "text")
    with pytest.raises(ValueError, match="argv is empty"):
        image.exec(show, [])
    with pytest.raises(FileNotFoundError):
        image.spawn(tmp_path / "none")
    with pytest.raises(
        LookupError, match="this kernel runs none of its programs, which are for machine-9999"
    ):
        image.spawn(glued(tmp_path, head(native()._replace(machine=9999))))


def test_a_program_that_may_be_run_and_not_read(show: Folder) -> None:
    if os.getuid():
        pytest.skip("only root can become another user who may not read the file")
    folder = pathlib.Path("/tmp")
    copy = folder / f"quire-test-{os.getpid()}"
    try:
        copy.write_bytes(show.read_bytes())
        copy.chmod(0o711)

        def work() -> None:
            os.setuid(65534)
            image.exec(copy, ["name"])

        assert wait(fork(work)) == 3
    finally:
        copy.unlink()


def test_which_machines_the_kernel_runs() -> None:
    with nothing_left():
        assert kernel_runs(native()) == "native"
        wrong = native()._replace(byte_order="big" if native().byte_order == "little" else "little")
        if native() == X86_64:
            assert kernel_runs(wrong) is None
    with open(sys.executable, "rb") as file:
        assert identify(file.read(20)) == native()


def test_32_bits_are_found_to_run_if_they_do(tmp_path: Folder) -> None:
    if native() != X86_64:
        pytest.skip("the program is for i386, which only x86-64 runs too")
    # mov $1,%eax; mov $7,%ebx; int $0x80: exit with 7.
    code = bytes.fromhex("b801000000 bb07000000 cd80")
    header = head(I386) + (1).to_bytes(4, "little") + (0x10054).to_bytes(4, "little")
    header += (52).to_bytes(4, "little") + bytes(8) + bytes.fromhex("3400 2000 0100 0000 0000 0000")
    size = 84 + len(code)
    words = (1, 0, 0x10000, 0x10000, size, size, 5, PAGE)
    program = header + b"".join(word.to_bytes(4, "little") for word in words) + code
    if kernel_runs(I386) is None:
        with pytest.raises(OSError, match="another machine") as caught:
            spawned(program)
        assert caught.value.errno == errno.ENOEXEC
        with pytest.raises(LookupError):
            image.spawn(glued(tmp_path, program))
        return
    assert spawned(program)[0] == 7
    assert spawned(glued(tmp_path, program))[0] == 7


@pytest.mark.parametrize("command", [["fatelf", "run"], ["image", "exec"]])
def test_commands(tmp_path: Folder, show: Folder, command: list[str]) -> None:
    fat = glued(tmp_path, show, head(Ident(22, 0, 0, 64, "big")))
    done = subprocess.run(
        [sys.executable, "-m", "quire", *command, fat, "--option", "-x", "--", "last"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MARK": "m"},
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[:6] == [
        f"arg {fat}",
        "arg --option",
        "arg -x",
        "arg --",
        "arg last",
        "env m",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "quire", *command, str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"quire {command[0]}: ")


def test_memory_that_may_not_be_executed_is_reported(show: Folder) -> None:
    if os.getuid() or not os.path.exists("/proc/sys/vm/memfd_noexec"):
        pytest.skip("vm.memfd_noexec can be set only by root, on Linux 6.3 and later")
    # The setting is one of a pid namespace.
    script = f"""
import quire
from quire import image
try:
    image.spawn(open({str(show)!r}, "rb").read())
except quire.Unsupported as error:
    assert "vm.memfd_noexec" in str(error), error
else:
    raise SystemExit("it was run")
"""
    mounts = "mount -t proc proc /proc && echo 2 > /proc/sys/vm/memfd_noexec"
    with_mounts(mounts, script, unshare="-fpm")


def test_import_is_not_part_of_quire() -> None:
    run_script(
        "import sys, quire; assert 'quire.image' not in sys.modules and 'subprocess' not in sys.modules"
    )
