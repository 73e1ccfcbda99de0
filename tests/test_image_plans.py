"""Load plans of ELF files against /proc/PID/maps of programs that run."""

import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

import quire
import quire.image
from quire.image import Operation, Protection
from quire.image.elf import ElfImage

PAGE = quire.PAGE_SIZE

PROGRAM = r"""
#include <stdio.h>
#ifdef LIBRARY
extern int library(void);
#else
static int library(void) { return 0; }
#endif
static char zeros[5 * 4096 + 123];
static int data[3000] = {1};
static int (*const volatile relocated)(void) = library;
int main(void) {
    zeros[sizeof zeros - 1] = (char)data[0];
    puts("ready");
    fflush(stdout);
    getchar();
    return relocated();
}
"""
LIBRARY = r"""
char more_zeros[3 * 4096];
static int (*const volatile relocated)(void);
int value = 7;
__thread int own = 3;
int library(void) { return value + own + more_zeros[0] - 10; }
int *const volatile places[600] = {&value, &value};
"""


class Page(NamedTuple):
    """What is at a page: permissions, and where in which file it comes from."""

    letters: str
    path: str | None
    offset: int


def mapped(pid: int) -> dict[int, Page]:
    """Every page of a process's maps."""
    found = {}
    for line in pathlib.Path(f"/proc/{pid}/maps").read_text("utf-8").splitlines():
        span, letters, offset, _, inode, *path = line.split(maxsplit=5)
        start, end = (int(each, 16) for each in span.split("-"))
        name = path[0] if path and inode != "0" else None
        for at in range(start, end, PAGE):
            found[at] = Page(letters[:3], name, int(offset, 16) + at - start if name else 0)
    return found


def planned(plan: list[Operation], path: str) -> dict[int, Page]:
    """What the operations leave, page by page."""
    found: dict[int, Page] = {}
    for step in plan:
        pages = range(step.address, step.address + -(-step.length // PAGE) * PAGE, PAGE)
        if step.call in ("mmap", "munmap", "mprotect"):
            assert step.address % PAGE == 0, step
        if step.call == "mmap":
            for at in pages:
                offset = step.offset + at - step.address
                file = path if step.file else None
                found[at] = Page(step.protection.letters, file, offset if file else 0)
        elif step.call == "munmap":
            for at in pages:
                found.pop(at, None)
        elif step.call == "mprotect":
            for at in pages:
                found[at] = found[at]._replace(letters=step.protection.letters)
        elif step.call == "zero":
            # Only what is mapped, and may be written at that moment, can be overwritten.
            assert "w" in found[step.address - step.address % PAGE].letters, step
            assert step.address % PAGE + step.length <= PAGE, step
    return found


def bias_of(image: ElfImage, pages: dict[int, Page], path: str) -> int:
    """How far the first page of the file is from where the file wants it."""
    first = next(each for each in image.segments if each.kind == "LOAD")
    start = min(at for at, page in pages.items() if page.path == path)
    return start - first.address // PAGE * PAGE


@contextmanager
def running(*command: str, ready: bytes = b"ready\n") -> Iterator[subprocess.Popen[bytes]]:
    """A program that says that it runs, and ends when its input does."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == ready
            yield process
        finally:
            process.kill()


def heap_of(pid: int) -> int | None:
    """Where the heap begins, if there is one."""
    text = pathlib.Path(f"/proc/{pid}/maps").read_text("utf-8")
    found = re.search(r"^([0-9a-f]+)-.*\[heap\]$", text, re.MULTILINE)
    return int(found[1], 16) if found else None


def check_all(pid: int) -> tuple[int, int]:
    """Compare each ELF file of a process with its plan; how many there were, and how many pages."""
    pages = mapped(pid)
    program = str(pathlib.Path(f"/proc/{pid}/exe").resolve())
    paths = sorted({page.path for page in pages.values() if page.path})
    interpreter = ""
    compared = files = 0
    with quire.image.read(program) as image:
        if image.interpreter:
            interpreter = str(pathlib.Path(image.interpreter).resolve())
    for path in paths:
        with open(path, "rb") as file:
            if file.read(4) != b"\x7fELF":
                continue
        with quire.image.read(path) as image:
            assert isinstance(image, ElfImage)
            bias = bias_of(image, pages, path)
            if path == interpreter:
                with quire.image.read(program) as main:
                    assert isinstance(main, ElfImage)
                    own = bias_of(main, pages, program)
                    whole = main.load_plan(own, interpreter=image, interpreter_bias=bias)
                plan = whole[len(main.load_plan(own)) :]
                assert {step.file for step in plan} <= {"interpreter", None}
            else:
                plan = image.load_plan(bias)
                assert image.kind == ("executable" if path == program else "shared object")
        expected = planned(plan, path)
        actual = {at: page for at, page in pages.items() if at in expected}
        assert actual == expected, path
        # And nothing of the file is elsewhere.
        assert {at for at, page in pages.items() if page.path == path} <= set(expected), path
        compared += len(expected)
        files += 1
        breaks = [step.address for step in plan if step.call == "brk"]
        if path == program:
            # With random addresses, the kernel moves the heap of a static program away from it.
            assert len(breaks) == 1
            heap = heap_of(pid)
            assert heap is None or heap >= breaks[0] or not image.interpreter
    return files, compared


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("there is no C compiler")
    return found


@pytest.mark.parametrize(
    "options",
    [
        ("-static",),
        ("-static-pie",),
        ("-no-pie",),
        ("-pie",),
        ("-pie", "-Wl,-z,now,-z,relro"),
        ("-pie", "-Wl,-z,norelro"),
        ("-pie", "-Wl,-z,noseparate-code"),
        ("-no-pie", "-Wl,-z,noseparate-code", "-Wl,-z,max-page-size=0x200000"),
        ("-pie", "-Wl,-z,max-page-size=0x10000"),
        ("-pie", "-Wl,-z,max-page-size=0x200000", "-Wl,-z,separate-code"),
        ("-pie", "-z", "execstack"),
    ],
    ids=" ".join,
)
def test_programs_of_our_own(tmp_path: pathlib.Path, compiler: str, options: tuple[str, ...]) -> None:
    source, library, program = tmp_path / "p.c", tmp_path / "libl.so", tmp_path / "p"
    source.write_text(PROGRAM)
    (tmp_path / "l.c").write_text(LIBRARY)
    command = [compiler, "-O0", "-o", str(program), str(source)]
    if "-static" not in options and "-static-pie" not in options:
        linker = [option for option in options if option.startswith("-Wl")]
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "l.c"), *linker], check=True
        )
        command += ["-DLIBRARY", str(library)]
    built = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if built.returncode and "-static" in options[0]:
        pytest.skip(f"this system cannot link {options[0]}: {built.stderr.strip()[-200:]}")
    assert built.returncode == 0, built.stderr
    with running(str(program)) as process:
        files, pages = check_all(process.pid)
        assert files == (1 if "-static" in options[0] else 4)
        assert pages > 10
    with quire.image.read(program) as image:
        assert isinstance(image, ElfImage)
        image.check()
        stack = [step.protection for step in image.load_plan() if step.call == "stack"]
        expected = Protection.READ | Protection.WRITE
        assert stack == [expected | Protection.EXEC if "execstack" in options else expected]


@pytest.mark.parametrize(
    "command",
    [
        ("bash", "-c", "echo ready; read line"),
        ("perl", "-e", '$| = 1; print "ready\\n"; <STDIN>'),
        (
            sys.executable,
            "-c",
            "import numpy.linalg, ssl, sqlite3, quire; print('ready', flush=True); input()",
        ),
    ],
    ids=["bash", "perl", "python"],
)
def test_programs_that_are_installed(command: tuple[str, ...]) -> None:
    found = shutil.which(command[0])
    if found is None:
        pytest.skip(f"there is no {command[0]}")
    with running(found, *command[1:]) as process:
        files, _ = check_all(process.pid)
        assert files >= 3


def test_a_bias_that_cannot_be(tmp_path: pathlib.Path, compiler: str) -> None:
    (tmp_path / "p.c").write_text(PROGRAM)
    program = tmp_path / "p"
    subprocess.run([compiler, "-no-pie", "-o", str(program), str(tmp_path / "p.c")], check=True)
    with quire.image.read(program) as image:
        with pytest.raises(ValueError, match="not position independent"):
            image.load_plan(0x1000)
        with pytest.raises(ValueError, match="multiple of the page size"):
            image.load_plan(1)
    subprocess.run([compiler, "-c", "-o", str(program), str(tmp_path / "p.c")], check=True)
    with quire.image.read(program) as image, pytest.raises(ValueError, match="relocatable"):
        image.load_plan()
