"""Code in regions runs, is produced when it is called, and is never writable where it is executable."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support import PAGE, TESTS, fork, wait

import quire

BACKENDS = ["thread", "signal", "sigsegv", "eager"]
EXAMPLES = TESTS.parent / "examples"
pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason=f"no code is known for {platform.machine()}"
)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import jit_region

    yield jit_region
    del sys.modules["jit_region"]


def accesses() -> set[str]:
    with open("/proc/self/maps", encoding="ascii", errors="replace") as lines:
        return {line.split()[1] for line in lines}


def code(example, pages: int) -> bytes:
    return b"".join(example.compiled(number).ljust(PAGE, b"\0") for number in range(pages))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("faults", BACKENDS)
def test_code_runs_and_nothing_is_writable_and_executable(example, faults: str, shared: bool) -> None:
    options = {"faults": faults, "shared": shared, "window_bytes": PAGE}
    with quire.Region(code(example, 50), executable=True, **options) as region:

        def call_all() -> None:
            for number in (7, 0, 49, 7):
                assert example.call(region, number) == number * number
                assert not any("w" in access and "x" in access for access in accesses())

        call_all()
        region.discard()
        call_all()
        assert wait(fork(call_all)) == 0
        region.prefetch()
        call_all()


@pytest.mark.parametrize("faults", BACKENDS)
def test_without_asking_nothing_is_executable(example, faults: str) -> None:
    with quire.Region(code(example, 2), faults=faults) as region:
        region.prefetch()
        start, end = region.address, region.address + region.size
        with open("/proc/self/maps", encoding="ascii", errors="replace") as lines:
            for line in lines:
                first, last, access = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()
                if int(first, 16) < end and start < int(last, 16):
                    assert "x" not in access
                    assert "w" not in access


def test_only_what_is_called_is_compiled(example) -> None:
    with example.open_functions() as region:
        for number in (5, 9_999, 5):
            assert example.call(region, number) == number * number
        assert region.stats.fills == 2


def test_the_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "jit_region.py")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ,
    )
    assert "9999 squared is 99980001" in done.stdout
    assert "3 were compiled" in done.stdout
