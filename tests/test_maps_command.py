"""``quire maps`` on real processes."""

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

import quire
from quire.commands import maps as command
from quire.process import maps
from quire.process.picture import picture

CHILD = """
import mmap, sys
memory = mmap.mmap(-1, 1 << 24)
memory[: 1 << 20] = b"x" * (1 << 20)
print(flush=True)
sys.stdin.read()
"""
MAIN = "from quire.cli import main; sys.exit(main(sys.argv[1:]))"
TERMINAL = {"COLUMNS": "140", "TERM": "dumb", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process with 16 MiB of shared memory, 1 MiB of them touched, that waits."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"\n"
        yield process
        process.stdin.close()


def run(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "quire", "maps", *map(str, arguments)]
    given = {"env": {**os.environ, **TERMINAL}, "capture_output": True, "text": True, **more}
    return subprocess.run(words, timeout=60, check=False, **given)


def test_draws_all_mappings_and_sums(child: subprocess.Popen[bytes]) -> None:
    done = run(child.pid)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["address", "size", "prot", "kind", "resident", "pss", "dirty", "name"]
    end = lines.index("")
    there = {(vma.start, vma.size, vma.label) for vma in maps(child.pid)}
    assert len(there) == end
    for line, (start, _, name) in zip(lines, sorted(there), strict=False):
        assert int(line.split("-")[0], 16) == start
        assert line.endswith(name)
    assert re.search(r"MM shareable +1 +16 MiB +16 MiB +1 MiB\n", done.stdout)
    assert re.search(r"\nresident +\S+ \S+ I+.*M+", done.stdout), "a bar without colours is of letters"


def test_tree(child: subprocess.Popen[bytes]) -> None:
    done = run(child.pid, "--tree")
    assert done.returncode == 0, done.stderr
    assert "shareable  1 mapping, 16 MiB, 1 MiB resident" in done.stdout
    assert "/dev/zero (deleted)" in done.stdout


def test_json_and_csv_have_all(child: subprocess.Popen[bytes]) -> None:
    done = run(child.pid, "--json")
    told = json.loads(done.stdout)
    assert told["pid"] == child.pid
    assert [vma["start"] for vma in told["vmas"]] == [vma.start for vma in maps(child.pid)]
    rows = list(
        csv.DictReader(io.StringIO(run(child.pid, "--csv", "--samples", "2", "--interval", "0.01").stdout))
    )
    assert {row["sample"] for row in rows} == {"0", "1"}
    assert [int(row["start"], 16) for row in rows if row["sample"] == "1"] == [
        vma.start for vma in maps(child.pid)
    ]
    assert {row["kind"] for row in rows} >= {"image", "heap", "stack", "shareable"}
    assert sum(int(row["resident"]) for row in rows if row["kind"] == "shareable") == 2 << 20


def test_writes_pictures_and_replaces_only_if_told(child: subprocess.Popen[bytes], tmp_path: Path) -> None:
    svg, html = tmp_path / "a.svg", tmp_path / "a.html"
    done = run(child.pid, "--svg", svg, "--html", html, "--samples", "3", "--interval", "0.01")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    root = ET.fromstring(svg.read_text("utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert f"({child.pid})" in root[0].text
    assert html.read_text("utf-8").startswith("<!DOCTYPE html>")
    before = svg.read_bytes()
    done = run(child.pid, "--svg", svg)
    assert done.returncode == 1
    assert "it exists; use force" in done.stderr
    assert svg.read_bytes() == before
    assert run(child.pid, "--svg", svg, "--force").returncode == 0
    assert svg.read_bytes() != before


def test_samples_and_top(child: subprocess.Popen[bytes]) -> None:
    done = run(child.pid, "--samples", "3", "--interval", "0.01")
    assert done.returncode == 0, done.stderr
    assert re.search(r"MM shareable +1 MiB +1 MiB +▁▁▁", done.stdout)
    assert re.search(r"no mapping changed|From 0.00 s to 0\.\d\d s:", done.stdout)
    done = run(child.pid, "--top", "--samples", "2", "--interval", "0.01")
    assert done.returncode == 0, done.stderr
    assert "zero (deleted)" in done.stdout


def test_a_process_that_ends_between_samples(capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        samples = command._samples(argparse.Namespace(pid=str(process.pid), interval=0.001), 3)
        assert len(next(samples)) > 10
        process.kill()
        process.wait()
        assert list(samples) == []
    assert "the process has ended after 1 of 3 samples" in capsys.readouterr().err


def test_pages_of_the_child_are_drawn(child: subprocess.Popen[bytes]) -> None:
    (drawn,) = picture([maps(child.pid)], pages=True).samples
    (memory,) = (row for row in drawn.rows if row.kind == "shareable")
    assert memory.pages.pages_per_cell == 1
    assert memory.pages.resident == b"\x0f" * 256 + b"\0" * (4096 - 256)
    assert memory.pages.shared == bytes(4096), "no other process has it"
    code = next(row for row in drawn.rows if row.name.endswith("libc.so.6") and "x" in row.protection)
    assert any(code.pages.shared), "this process has it too"


def test_a_process_that_ends_before_its_pages_are_read() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        read = maps(process.pid)
        process.kill()
    drawn = picture([read], pages=True)
    assert drawn.samples[0].note.startswith("pages are not shown: ")
    assert drawn.samples[0].rows[0].pages is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("0",), "'0' is no process number"),
        (("-5",), "'-5' is no process number"),
        (("x\n\x1b",), "'x\\\\n\\\\x1b' is no process number"),
        (("self", "--samples", "0"), "'0' is no number of samples"),
        (("self", "--interval", "nan"), "'nan' is no number of seconds"),
        (("self", "--interval", "1e300"), "'1e300' is no number of seconds up to a day"),
        (("self", "--tree", "--json"), "not allowed with"),
        (("self", "--top", "--svg", "/nowhere"), "--top writes no files"),
        (("self", "--svg", "/nowhere/at/all"), "No such file"),
    ],
)
def test_misuse(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_that_is_not_there() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    done = run(gone.pid)
    assert (done.returncode, done.stdout) == (1, "")
    assert str(gone.pid) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_of_somebody_else(child: subprocess.Popen[bytes]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    code = (
        "import os, sys, argparse, quire.cli, quire.commands.maps, quire.pictures.terminal;"
        f"os.setgroups([]); os.setgid(65534); os.setuid(65534); {MAIN}"
    )
    words = [sys.executable, "-c", code, "maps", str(child.pid)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"this user may not look at process {child.pid}" in done.stderr


def test_says_that_rich_is_missing(child: subprocess.Popen[bytes]) -> None:
    code = f"import sys; sys.modules['rich'] = sys.modules['rich.console'] = None; {MAIN}"
    words = [sys.executable, "-c", code, "maps", str(child.pid)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "pip install 'quire[tools]'" in done.stderr
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)["pid"] == child.pid


def test_whoever_reads_may_stop(child: subprocess.Popen[bytes]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = run(child.pid, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_partial_answers_say_so() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        done = run(zombie.pid)
    assert done.returncode == 0
    assert "not complete" in done.stderr
    assert "zombie" in done.stderr


def test_shows_itself_in_notebooks() -> None:
    found = quire.maps()
    shown = found._repr_mimebundle_()
    assert set(shown) == {"text/plain", "text/html", "image/svg+xml"}
    assert shown["text/html"].startswith("<iframe ")
    assert ET.fromstring(shown["image/svg+xml"]).tag.endswith("svg")
    assert found._repr_html_().startswith("<iframe ")
