"""``quire image``: what it prints and draws, and the ranges of memory that it draws from."""

import ctypes
import errno
import io
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile

import pytest
from elffiles import S390X, compiled_program, head
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from quire import cli
from quire.image import MapFlags, Operation, Protection, fatelf, read
from quire.image.layout import Piece, layout, layout_of
from quire.pictures import filetext
from quire.pictures.filemap import FileMap, FilePart, MemoryRange, svg

Folder = pathlib.Path
R, W, X = Protection.READ, Protection.WRITE, Protection.EXEC
PAGE = 4096

HOLES = """
int big[300000]; int x = 5; const char s[] = "hello";
int main(void) { return x + big[3] + s[0]; }
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A program with holes between its segments."""
    flags = ("-Wl,-z,max-page-size=0x200000,-z,separate-code,-z,now,-z,noexecstack", "-pie", "-fPIE")
    return compiled_program(tmp_path_factory.mktemp("program"), HOLES, "holes", *flags)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["image", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def mapped(address: int, length: int, protection: Protection, offset: int | None = None) -> Operation:
    file = None if offset is None else "image"
    return Operation("mmap", address, length, protection, MapFlags.PRIVATE, file, offset or 0)


def test_layout_carries_out_every_operation() -> None:
    operations = [
        Operation("stack", 0, 0, R | W),
        mapped(0, 8 * PAGE, R, 0),
        Operation("munmap", PAGE, PAGE),
        mapped(2 * PAGE, 2 * PAGE, R | X, 5 * PAGE),
        mapped(4 * PAGE, 2 * PAGE, R | W, 6 * PAGE),
        Operation("zero", 5 * PAGE + 16, PAGE - 16),
        mapped(6 * PAGE, PAGE + 1, R | W),
        Operation("mprotect", 4 * PAGE, PAGE, R),
        Operation("relocate", 4 * PAGE, PAGE),
        Operation("mmap", 0, 99 * PAGE, R, MapFlags.PRIVATE, "interpreter", 0),
        Operation("copy", 6 * PAGE, 8, file="image", offset=77),
        Operation("brk", 9 * PAGE, 0),
    ]
    found = layout(operations, file_size=100 * PAGE, relro=(4 * PAGE, 5 * PAGE))
    assert found == [
        Piece(0, PAGE, R, 0),
        Piece(2 * PAGE, 4 * PAGE, R | X, 5 * PAGE),
        Piece(4 * PAGE, 5 * PAGE, R, 6 * PAGE, is_relro=True, is_relocated=True),
        Piece(5 * PAGE, 5 * PAGE + 16, R | W, 7 * PAGE),
        Piece(5 * PAGE + 16, 6 * PAGE, R | W, None),
        Piece(6 * PAGE, 6 * PAGE + 8, R | W, 77),
        Piece(6 * PAGE + 8, 8 * PAGE, R | W, None),
    ]
    kinds = ["constants", "code", "relro", "data", "zeros", "data", "zeros"]
    assert [piece.kind for piece in found] == kinds
    assert layout([mapped(0, PAGE, Protection.NONE)], file_size=0)[0].kind == "reserved"
    # Behind the end of the file are zeros.
    assert layout([mapped(0, PAGE, R, 0)], file_size=100) == [Piece(0, 100, R, 0), Piece(100, PAGE, R, None)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["mmap", "munmap", "mprotect", "zero", "copy", "relocate"]),
            st.integers(0, 9),
            st.integers(0, 6),
            st.sampled_from([R, R | W, R | X]),
            st.none() | st.integers(0, 9),
        ),
        max_size=12,
    )
)
def test_layout_is_what_a_list_of_pages_says(
    steps: list[tuple[str, int, int, Protection, int | None]],
) -> None:
    pages: dict[int, tuple[Protection, int | None]] = {}
    operations = []
    for call, start, count, protection, offset in steps:
        file = None if offset is None and call != "copy" else "image"
        operations.append(
            Operation(call, start * PAGE, count * PAGE, protection, file=file, offset=(offset or 0) * PAGE)
        )
        for index in range(count):
            page, at = start + index, (offset or 0) + index
            if call == "mmap":
                pages[page] = (protection, None if offset is None else at)
            elif page in pages:
                now, content = pages[page]
                if call == "munmap":
                    del pages[page]
                elif call == "mprotect":
                    pages[page] = (protection, content)
                elif call == "zero":
                    pages[page] = (now, None)
                elif call == "copy":
                    pages[page] = (now, at)
    found = layout(operations, file_size=100 * PAGE)
    assert all(low.end <= high.start for low, high in itertools.pairwise(found))
    shown = {
        page: (
            piece.protection,
            None if piece.offset is None else piece.offset // PAGE + page - piece.start // PAGE,
        )
        for piece in found
        for page in range(piece.start // PAGE, piece.end // PAGE)
    }
    assert shown == pages


def test_layout_is_what_the_kernel_shows_of_a_loaded_library(tmp_path: Folder) -> None:
    code, path = tmp_path / "code.c", tmp_path / "lib.so"
    code.write_text("int data = 5; int zeros[5000]; const int *p = &data; int f(void) { return *p; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, code, "-Wl,-z,relro,-z,now"], check=True)
    library = ctypes.CDLL(str(path))
    lines = [line.split(maxsplit=5) for line in pathlib.Path("/proc/self/maps").read_text().splitlines()]
    ours = [(*(int(x, 16) for x in line[0].split("-")), line[1]) for line in lines if line[5:] == [str(path)]]
    bias = min(start for start, _, _ in ours)
    with read(path) as image:
        pieces = layout_of(image, bias)
    real = {page: letters[:3] for start, end, letters in ours for page in range(start, end, PAGE)}
    shown = {
        page: piece.protection.letters
        for piece in pieces
        for page in range(piece.start // PAGE * PAGE, piece.end, PAGE)
        if piece.offset is not None
    }
    assert shown == real
    for piece in pieces:
        if piece.kind in ("code", "constants"):
            length = piece.end - piece.start
            assert ctypes.string_at(piece.start, length) == path.read_bytes()[piece.offset :][:length]
    del library


def test_terminal(
    capsys: pytest.CaptureFixture[str], program: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (60, 80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        status, out, err = run(capsys, program)
        assert (status, err) == (0, "")
        assert max(map(len, out.splitlines())) <= width
        for text in (
            "ELF executable",
            "entry",
            "libc.so.6",
            "RELRO full",
            "position independent",
            "r-x",
            "code",
        ):
            assert text in out, text
        assert out.count("not mapped") == 3
        assert "not loaded" in out


def test_what_is_printed_of_other_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Folder, program: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    script = tmp_path / "script"
    script.write_bytes(b"#!/bin/sh -e x\nexit\n")
    status, out, _ = run(capsys, script)
    assert status == 0
    assert "/bin/sh, argument '-e x'" in out
    fat = tmp_path / "fat"
    fatelf.glue([head(S390X, bytes(100)), program], fat)
    _, out, _ = run(capsys, "--svg", "-", fat)
    assert "s390" not in out
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.write(program, "bin/tool")
    status, out, _ = run(capsys, f"{tmp_path}/app.zip!/bin/tool")
    assert status == 0
    assert "app.zip!/bin/tool" in out
    empty = tmp_path / "e.o"
    subprocess.run(["cc", "-c", "-x", "c", os.devnull, "-o", empty], check=True)
    assert "ELF relocatable" in run(capsys, empty)[1]
    ET.fromstring(run(capsys, "--svg", "-", empty)[1])


def test_failures(capsys: pytest.CaptureFixture[str], tmp_path: Folder, program: Folder) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"text")
    for arguments, message in (
        ((text,), f"no known format.*quire image why {text}"),
        ((tmp_path / "none",), "No such file"),
        (("--tables", program), "--tables is for --json"),
        (("--svg", text, program), "exists"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (1, "")
        assert err.startswith("quire image: ")
        assert re.search(message, err), err
    assert text.read_bytes() == b"text"
    for wrong in (["perhaps", program], ["why"], ["why", "--tables", program], []):
        with pytest.raises(SystemExit) as caught:
            cli.main(["image", *map(str, wrong)])
        assert caught.value.code == 2
    capsys.readouterr()
    # A file may be called like an action.
    assert run(capsys, "show", "why")[0] == 1


def test_actions_and_options_in_any_order(capsys: pytest.CaptureFixture[str], program: Folder) -> None:
    outputs = [
        run(capsys, *arguments)
        for arguments in (("--json", program), (program, "--json"), ("show", "--json", program))
    ]
    assert outputs[0][0] == 0
    assert outputs[0] == outputs[1] == outputs[2]
    assert run(capsys, "why", "--json", program) == run(capsys, "why", program, "--json")
    with pytest.raises(SystemExit) as caught:
        cli.main(["image", "--help"])
    assert caught.value.code == 0
    assert "why" in capsys.readouterr().out


KEYS = {
    *("name", "format", "kind", "machine", "bits", "byte_order", "offset", "size", "entry", "interpreter"),
    *("argument", "needed", "soname", "rpath", "runpath", "build_id", "security", "segments", "sections"),
    *("load_plan", "load_error", "layout", "members"),
}


def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Folder, program: Folder) -> None:
    fat, script = tmp_path / "fat", tmp_path / "script"
    fatelf.glue([program], fat)
    script.write_bytes(b"#!/bin/sh -e\n")
    for path in (program, fat, script):
        found = json.loads(run(capsys, "--json", path)[1])
        assert found.keys() == KEYS
    assert found["argument"] == "-e"
    found = json.loads(run(capsys, "--json", "--tables", program)[1])
    assert found.keys() == KEYS | {"symbols", "imports", "exports", "relocations", "slots"}
    with read(program) as image:
        assert found["entry"] == image.entry
        assert [each["address"] for each in found["segments"]] == [each.address for each in image.segments]
        assert len(found["load_plan"]) == len(image.load_plan())
        assert len(found["symbols"]) == len(image.symbols())
    assert found["security"] == {
        "pie": True,
        "relro": "full",
        "bind_now": True,
        "nx_stack": True,
        "text_relocations": False,
        "writable_code": False,
        "search_path": None,
    }
    assert {each["kind"] for each in found["layout"]} == {"code", "constants", "relro", "data", "zeros"}


def test_svg(capsys: pytest.CaptureFixture[str], tmp_path: Folder, program: Folder) -> None:
    out = tmp_path / "out.svg"
    assert run(capsys, "--svg", out, program)[0] == 0
    assert run(capsys, "--svg", out, program)[0] == 1
    assert run(capsys, "--svg", out, "--force", program)[0] == 0
    tree = ET.parse(out)
    texts = [element.text or "" for element in tree.iter() if element.tag.endswith("text")]
    assert sum(text.startswith("not mapped: ") for text in texts) == 3
    assert sum(text.startswith("code, ") for text in texts) == 2, "in the file and in memory"
    assert sum(text.startswith("zeros, ") for text in texts) == 1
    assert "entry" in texts
    ribbons = [element for element in tree.iter() if element.get("fill-opacity")]
    assert len(ribbons) == 5
    assert "http" not in out.read_text().replace("http://www.w3.org/2000/svg", "")


def test_names_cannot_do_harm_in_pictures() -> None:
    evil = "</svg><script>\x1b[31m\u202e&\"'\0"
    drawn = FileMap(
        evil,
        evil,
        2 * PAGE,
        [MemoryRange(0, PAGE, "code", "r-x", evil, 0)],
        [FilePart(PAGE, 2 * PAGE, evil)],
        0,
    )
    tree = ET.fromstring(svg(drawn))
    assert not [element for element in tree.iter() if element.tag.endswith("script")]
    text = io.StringIO()
    Console(file=text, width=100, markup=False).print(filetext.table(drawn, 100))
    assert "\x1b[31m" not in text.getvalue()
    assert "\0" not in text.getvalue()


def test_nothing_to_draw() -> None:
    drawn = FileMap("name", "what", 0, [])
    ET.fromstring(svg(drawn))
    assert filetext.table(drawn, 80).row_count == 0
    assert filetext.table(FileMap("name", "what", 5, []), 80).row_count == 1


def test_why(capsys: pytest.CaptureFixture[str], tmp_path: Folder, program: Folder) -> None:
    status, out, _ = run(capsys, "why", program)
    assert status == 0
    assert out.startswith(f"{program}: would run\n  1. ")
    assert "libc.so.6" in out
    text = tmp_path / "text\n\x1b[31m"
    text.write_bytes(b"text")
    text.chmod(0o755)
    status, out, _ = run(capsys, "why", text)
    assert status == 1
    assert f"would not run ({os.strerror(errno.ENOEXEC)})" in out
    assert "\x1b" not in out
    status, out, _ = run(capsys, "why", "--json", text)
    assert status == 1
    assert json.loads(out)["errno"] == "ENOEXEC"


def test_without_rich_it_says_what_to_install(program: Folder) -> None:
    script = "import sys; sys.modules['rich'] = sys.modules['rich.console'] = None\n"
    script += "from quire import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "image", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "quire[tools]" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", script, "image", "--json", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
