"""``quire space play``: the language, the included lessons, and the pictures in the documents."""

# Words are easier to read as text.
# ruff: noqa: SIM905

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.commands.space import lessons
from quire.errors import Malformed
from quire.pictures.model import Step
from quire.pictures.strip import strip
from quire.space import AddressSpace, File, Rules
from quire.space import constants as c
from quire.space.script import play

DOCS = Path(__file__).parents[1] / "docs"
LESSONS = lessons()


def steps(*lines: str) -> list[Step]:
    return play("\n".join(lines)).steps


def ranges(step: Step, panel: int = 0) -> list[tuple[int, int, str]]:
    return [(row.start, row.end, row.protection) for row in step.panels[panel].rows]


def run(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "quire", "space", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, timeout=60, **more
    )


# Lessons: each states by ``expect`` what comes out, and playing it checks that.


@pytest.mark.parametrize("name", LESSONS)
def test_lesson_is_as_it_says_and_drawn_as_in_the_documents(name: str) -> None:
    lesson = play(LESSONS[name].read_text("utf-8"))
    drawn = strip(lesson.title, lesson.steps, lesson.about)
    assert len(ET.fromstring(drawn)) > 5
    picture = DOCS / "address-spaces" / f"{name}.svg"
    again = f"quire space play lesson:{name} --force --svg docs/address-spaces/{name}.svg"
    assert picture.read_text("utf-8") == drawn, f"the picture is not what the tool draws now: {again}"
    assert f"](address-spaces/{name}.svg)" in (DOCS / "address-spaces.md").read_text("utf-8")


def test_the_three_cases_of_overlap() -> None:
    for name, before, after in (
        ("last-page", [(0x20, 0x41, "r--p")], [(0x20, 0x40, "r--p"), (0x40, 0x41, "rw-p")]),
        ("first-page", [(0x40, 0x50, "r--p")], [(0x40, 0x41, "rw-p"), (0x41, 0x50, "r--p")]),
        (
            "middle",
            [(0x20, 0x50, "r--p")],
            [(0x20, 0x40, "r--p"), (0x40, 0x41, "rw-p"), (0x41, 0x50, "r--p")],
        ),
    ):
        played = play(LESSONS[f"overlap-{name}"].read_text("utf-8")).steps
        # The first and last VMA are bystanders.
        for step, wanted in zip(played, (before, after), strict=False):
            seen = [(start >> 12, end >> 12, protection) for start, end, protection in ranges(step)]
            assert seen[1:-1] == wanted


def test_frames_tell_copies_from_shared_pages() -> None:
    played = steps("mmap 8K rw name a", "touch a 8K write", "fork child", "child: touch a write")
    before, after = ([panel.rows[0].pages for panel in step.panels] for step in played[-2:])
    assert [pages.frames for pages in before] == [(1, 2), (1, 2)]
    assert [pages.shared for pages in before] == [b"\x0f\x0f"] * 2
    assert [pages.frames for pages in after] == [(1, 2), (3, 2)]
    assert [pages.shared for pages in after] == [b"\x00\x0f"] * 2


# The language


def test_steps_tell_what_happened_and_why_not() -> None:
    played = steps(
        "mmap 16K rw at 0x10000 fixed name a",
        "mprotect a+4K 4K r   # a comment",
        "mmap 4K rw at 0x10000 noreplace",
        "munmap 0x10001 4K",
    )
    assert [step.failed for step in played] == [False, False, True, True]
    assert [len(ranges(step)) for step in played] == [1, 3, 3, 3]
    assert "split 0x10000-0x14000" in " ".join(played[1].notes)
    assert "EEXIST" in played[2].notes[0]
    assert "EINVAL" in played[3].notes[0]
    assert played[1].title == "mprotect a+4K 4K r   # a comment"
    assert played[1].panels[0].marks


def test_a_process_of_windows() -> None:
    played = steps(
        "virtual_alloc 128K reserve rw name a",
        "virtual_alloc 4K commit rw+guard at a+4K",
        "touch a+4K write",
        "virtual_protect a+4K 4K r",
        "virtual_free a 4K release",
    )
    assert [step.failed for step in played] == [False, False, True, False, True]
    assert [[row.protection for row in step.panels[0].rows] for step in played] == [
        ["---"], ["---", "rw-g", "---"], ["---", "rw-", "---"], ["---", "r--", "---"], ["---", "r--", "---"],
    ]  # fmt: skip
    assert played[3].notes == ("it was rw-",)
    assert "ERROR_INVALID_PARAMETER, 87" in played[4].notes[0]


def test_setup_is_one_step() -> None:
    played = steps("setup", "mmap 4K rw", "mmap 4K r", "begin", "say Now.", "brk +4K")
    assert [step.title for step in played] == ["At the beginning", "brk +4K"]
    assert [step.said for step in played] == [(), ("Now.",)]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["frobnicate"], "line 1: 'frobnicate' is no operation"),
        (["", "mmap"], "line 2: a length is missing"),
        (["mmap 4K"], "a protection is missing"),
        (["mmap 4K rz"], "'rz' is no protection"),
        (["mmap 4Q rw"], "'4Q' is no number"),
        (["mmap 99999999999999999999 rw"], "has more than 64 bits"),
        (["mmap 4K rw sideways"], "'sideways' says nothing to mmap"),
        (["mmap 4K rw name 9"], "'9' is no name"),
        (["mmap 4K rw file /x"], "unknown name '/x'"),
        (["munmap x 4K"], "unknown name 'x'"),
        (["munmap 0x10000 4K 4K"], "'4K' is too much"),
        (["mmap 4K rw name a", "munmap a-1G 4K", "munmap a-0xffffffffffff 4K"], "line 3: 'a-0xffff"),
        (["child: brk 0"], "unknown name 'child'"),
        (["brk 0", "fork process"], "no name for a new process"),
        (["madvise 0 4K nicely"], "'nicely' is no advice"),
        (["touch 0x10000 16T"], "a touch is of 65536 pages at most"),
        (["rule no_such 1"], "unknown name 'no_such'"),
        (["rule overcommit maybe"], "'maybe' is no way to overcommit"),
        (["brk 0", "rule min_address 1"], "rules come before"),
        (["brk 0", "expect EEXIST"], "expected EEXIST, there was success"),
        (["brk 0", "expect minor"], "expected minor, there was no touch"),
        (["touch 0 read", "expect success"], "expected success, there was SIGSEGV"),
        (["expect sometimes"], "'sometimes' is no error"),
        (["brk 0", "virtual_alloc 4K reserve rw"], "'virtual_alloc' is no operation"),
        (["virtual_alloc 4K reserve rw", "mmap 4K rw"], "mmap is no operation on a process of Windows"),
        (["virtual_alloc 4K reserve rw", "fork child"], "fork is no operation on a process of Windows"),
        (["virtual_alloc 4K hold rw"], "'hold' is none of reserve, commit, reserve+commit"),
        (["virtual_alloc 4K reserve w"], "'w' is none of none, r, rw"),
        (
            ["virtual_alloc 4K reserve rw", "virtual_free 0x10000 4K 4K release"],
            "decommit or release is missing",
        ),
        (["virtual_alloc 4K reserve rw", "touch 0x10000"], "read or write is missing"),
        (["virtual_alloc 4K reserve rw", "touch 0 read", "expect sigsegv"], "there was access-violation"),
        (["mmap 4K rw 'open"], "No closing quotation"),
        (["brk 0"] * 10_001, "at most 10000 lines"),
        ([f"mmap 4K {'rw'[n % 2]}" for n in range(500)], "all steps together draw more than 100000 VMAs"),
    ],
)
def test_what_is_not_of_the_language(lines: list[str], said: str) -> None:
    with pytest.raises(Malformed) as caught:
        steps(*lines)
    assert said in str(caught.value)


WORDS = st.one_of(
    st.sampled_from("mmap munmap mprotect mremap brk madvise touch fork exit child: process:".split()),
    st.sampled_from("file title say rule setup begin expect max_map_count a a+4K a-1G child x".split()),
    st.sampled_from("0 1 4K 0x10000 0x7ffffffff000 1T 99999999T +8K -8K # ' \x00 \ud800".split(" ")),
    st.sampled_from("r rw rwx none at fixed noreplace shared name offset growsdown read write".split()),
    st.sampled_from("virtual_alloc virtual_free virtual_protect reserve commit decommit rw+guard".split()),
    st.sampled_from("dontneed free maymove dontunmap".split()),
)


@given(st.lists(st.lists(WORDS, max_size=8).map(" ".join), max_size=12))
def test_any_words_are_played_or_malformed(lines: list[str]) -> None:
    try:
        lesson = play("\n".join(lines))
    except Malformed:
        return
    if lesson.steps:
        ET.fromstring(strip(lesson.title, lesson.steps))


# The command


def test_draws_in_the_terminal() -> None:
    done = run("play", "lesson:copy-on-write")
    assert (done.returncode, done.stderr) == (0, "")
    assert "0x10000000-0x10004000 rw-p 16 KiB data  pages D B C ." in done.stdout
    assert "copy on write: the page was copied" in done.stdout


def test_lists_lessons() -> None:
    done = run("lessons")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [f"lesson:{name}" for name in LESSONS]


def test_writes_files_and_reads_stdin(tmp_path: Path) -> None:
    svg, html = tmp_path / "a.svg", tmp_path / "a.html"
    done = run("play", "-", "--svg", svg, "--html", html, input="mmap 4K rw\nfork child\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert ET.parse(svg).getroot().tag.endswith("svg")
    assert '"title":"child, after 1: fork child"' in html.read_text("utf-8")
    assert run("play", "-", "--svg", svg, input="brk 0\n").returncode == 1
    assert run("play", "-", "--svg", svg, "--force", input="brk 0\n").returncode == 0


def test_says_what_is_wrong(tmp_path: Path) -> None:
    binary, large = tmp_path / "binary", tmp_path / "large"
    binary.write_bytes(b"\xff\xfe")
    large.write_bytes(b"#" * ((1 << 20) + 1))
    for name, said in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, "can't decode"),
        (large, "1 MiB at most"),
        ("lesson:none", "there are copy-on-write, demand-paging"),
    ):
        done = run("play", name)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert "no operation that is drawn" in run("play", "-", input="title x\n").stderr


def test_rules_of_the_running_kernel() -> None:
    assert run("play", "-", "--running-kernel", input="mmap 4K rw\nexpect success\n").returncode == 0


# In notebooks


def test_a_space_shows_itself_in_notebooks() -> None:
    space = AddressSpace(Rules())
    shown = space._repr_mimebundle_()
    assert set(shown) == {"text/plain", "text/html", "image/svg+xml"}
    assert shown["text/plain"] == "<quire.AddressSpace: 0 VMAs, 0 bytes, 0 resident>"
    rw, private = c.PROT_READ | c.PROT_WRITE, c.MAP_PRIVATE | c.MAP_ANONYMOUS
    base = space.mmap(0, 8 * 4096, rw, private).value
    space.mmap(0, 4096, c.PROT_READ, c.MAP_PRIVATE, File('/<script>alert("x")</script>', 4096))
    space.touch(base, write=True)
    shown = space._repr_mimebundle_()
    assert repr(space) == "<quire.AddressSpace: 2 VMAs, 36864 bytes, 4096 resident>"
    assert "<script>alert" not in shown["image/svg+xml"]
    assert ET.fromstring(shown["image/svg+xml"]).tag.endswith("svg")
    assert space._repr_html_() == shown["text/html"]
    assert shown["text/html"].startswith("<iframe ")
