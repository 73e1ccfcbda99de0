"""The benchmarks run and write a well-formed report. How fast anything is, no test asserts."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERDICTS = {"reached", "**missed**"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benches") / "report.md"
    command = [sys.executable, "-m", "benches", "--quick", "--without-ray", "--output", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=110, stdout=subprocess.DEVNULL)
    return path


def tables(text: str) -> list[list[list[str]]]:
    """Cells of the tables, the line below each head left out."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            if not re.fullmatch(r"\|(---\|)+", line):
                found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        inside = line.startswith("|")
    return found


def test_tables_are_whole(report: Path) -> None:
    found = tables(report.read_text(encoding="utf-8"))
    assert len(found) > 10
    for table in found:
        assert len(table) > 1
        assert {len(line) for line in table} == {len(table[0])}


def test_every_goal_has_a_verdict(report: Path) -> None:
    goals = next(
        table for table in tables(report.read_text(encoding="utf-8")) if table[0][:2] == ["work", "against"]
    )
    assert {line[-1] for line in goals[1:]} <= VERDICTS
    peers = {line[1] for line in goals[1:]}
    for peer in ("fork, 4 KiB pages", "np.copyto into a kept buffer", "numpy comparison", "bare start"):
        assert peer in peers


def test_says_that_a_smoke_run_means_nothing(report: Path) -> None:
    assert "mean nothing" in report.read_text(encoding="utf-8")


def test_says_what_was_left_out(report: Path) -> None:
    assert "Ray was left out of this run." in report.read_text(encoding="utf-8")


def test_picture_is_well_formed_and_shown(report: Path) -> None:
    picture = report.with_suffix(".svg")
    root = ET.fromstring(picture.read_text(encoding="utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.findall("{http://www.w3.org/2000/svg}polyline")
    assert f"]({picture.name})" in report.read_text(encoding="utf-8")


def test_only_a_full_run_replaces_the_published_report() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benches", "--quick"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--output is needed" in done.stderr


def test_measures_wheels_or_says_why_not(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "### Import numpy and call it, warm page cache" in text or "Not measured: pip cannot" in text


def test_lending_changes_nothing_for_others() -> None:
    from benches import lending

    lines = "\n".join(lending.report(clients=4, size=16 << 20))
    assert "take back from who complies" in lines
    assert "take back from who does not" in lines
    assert (
        "the other 2: changed bytes seen by 0; faults when they touched every page again: 0 at most" in lines
    )
