"""``#!`` lines: what is read of them is what the running kernel makes of them."""

import errno
import os
import pathlib
import random
import subprocess

import pytest
from elffiles import PRINTER, compiled_program

from quire.errors import Malformed
from quire.image.script import HEAD_BYTES, LEVELS_MAX, parse

Folder = pathlib.Path


@pytest.fixture(scope="module")
def printer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A program that prints its arguments, each with a zero behind it."""
    folder = tmp_path_factory.mktemp("p")
    return os.fsencode(compiled_program(folder, PRINTER, "i", "-static"))


def executed(path: Folder, *arguments: bytes) -> list[bytes] | int:
    """What the interpreter got as arguments, or the errno of ``execve``."""
    try:
        done = subprocess.run([b"argv0", *arguments], executable=path, capture_output=True, check=True)
    except OSError as error:
        return error.errno or 0
    return done.stdout.split(b"\0")[:-1]


def script_file(folder: Folder, content: bytes) -> Folder:
    path = folder / "s"
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def check(folder: Folder, content: bytes) -> None:
    path = script_file(folder, content)
    real = executed(path, b"one", b"two words")
    try:
        found = parse(content[:HEAD_BYTES])
    except Malformed:
        assert real == errno.ENOEXEC, content
        return
    if isinstance(real, int):
        # Random lines name what is not there, or a directory.
        assert not os.path.isfile(found.interpreter), (content, found, real)
        assert real in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG), content
    else:
        assert found.argv(os.fsencode(path), [b"one", b"two words"]) == real, content


LINES = [
    b"#!%s\n",
    b"#!%s",
    b"#! %s\n",
    b"#!\t \t%s \t \n",
    b"#!%s -x\n",
    b"#!%s -x -y  z \t\n",
    b"#!%s -x \t",
    b"#!%s  ",
    b"#!%s\0-x\n",
    b"#!%s \0-x\n",
    b"#!%s a\0b\n",
    b"#!%s \xff\xfe\x01\n",
    b"#!%s\r\n",
    b"#!%s -x\r\n",
    b"#!\n",
    b"#! \t\n",
    b"#!",
    b"#!  ",
    b"#! \0%s\n",
    b"#!\n%s\n",
    b"#!" + b" " * 300 + b"%s\n",
    b"#!nowhere\n",
    b"#!/etc\n",
    b"# !%s\n",
    b"#",
]


@pytest.mark.parametrize("line", LINES)
def test_line(tmp_path: Folder, printer: bytes, line: bytes) -> None:
    check(tmp_path, line.replace(b"%s", printer))


def test_arguments_that_end_about_the_end_of_the_buffer(tmp_path: Folder, printer: bytes) -> None:
    for length in range(250, 262):
        for end in (b"", b"\n", b" \n", b" ", b" more", b"\t\n"):
            line = b"#!" + printer + b" "
            check(tmp_path, line + b"a" * (length - len(line)) + end)


def test_paths_that_end_about_the_end_of_the_buffer(tmp_path: Folder, printer: bytes) -> None:
    # More slashes are the same path.
    for length in range(250, 262):
        for end in (b"", b"\n", b" \n", b" ", b" more", b"\0", b"\t"):
            check(tmp_path, b"#!" + b"/" * (length - 2 - len(printer)) + printer + end)
            check(tmp_path, b"#!" + printer.rjust(length - 2) + end)


def test_random_lines(tmp_path: Folder, printer: bytes) -> None:
    rng = random.Random(11)
    for _ in range(400):
        parts = [printer, b" ", b"\t", b"\0", b"\n", b"a", b"#!", b" " * 60, b"b" * 90, b"\r", b"\xff"]
        check(
            tmp_path,
            b"#!" + b"".join(rng.choices(parts, [9, 4, 2, 1, 3, 3, 1, 1, 1, 1, 1], k=rng.randint(1, 8))),
        )


def test_what_is_behind_the_buffer_does_not_count() -> None:
    line = b"#!/bin/sh " + b"x" * 245
    assert len(line) == HEAD_BYTES - 1
    assert parse(line + b"y" * 500) == parse(line + b"y")
    assert parse(line).argument == parse(line + b"yz").argument == b"x" * 245


def test_levels(tmp_path: Folder, printer: bytes) -> None:
    before = printer
    for level in range(1, LEVELS_MAX + 2):
        path = tmp_path / f"level{level}"
        path.write_bytes(b"#!" + before + b" of%d\n" % level)
        path.chmod(0o755)
        before = os.fsencode(path)
        if level <= LEVELS_MAX:
            arguments = executed(path)
            assert isinstance(arguments, list)
            assert arguments[0] == printer
            assert arguments[1] == b"of1"
            assert len(arguments) == 1 + 2 * level
        else:
            assert executed(path) == errno.ELOOP


def test_an_interpreter_that_may_not_be_executed(tmp_path: Folder) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"text")
    assert executed(script_file(tmp_path, b"#!" + os.fsencode(data))) == errno.EACCES


def test_a_relative_interpreter_is_found_from_the_current_directory(
    tmp_path: Folder, printer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = script_file(tmp_path, b"#!i")
    monkeypatch.chdir(os.path.dirname(os.fsdecode(printer)))
    assert executed(path) == [b"i", os.fsencode(path)]
    monkeypatch.chdir("/")
    assert executed(path) == errno.ENOENT
