"""``import quire`` loads the standard library and the extension, nothing else. How long it takes is measured
by the benchmarks: a test that measures time fails on a busy machine."""

import json
import subprocess
import sys

import pytest

LOADED = """
import json, sys
before = set(sys.modules)
{statement}
json.dump(sorted(set(sys.modules) - before), sys.stdout)
"""


def loaded_by(statement: str) -> list[str]:
    """Names of the modules that a statement loads in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(statement=statement)], capture_output=True, text=True, check=True
    )
    names: list[str] = json.loads(done.stdout)
    return names


@pytest.mark.parametrize(
    "statement",
    ["import quire", "import quire.cli", "import quire.wheels", "import quire.wheels; quire.wheels.enable()"],
)
def test_only_the_standard_library(statement: str) -> None:
    tops = {name.partition(".")[0] for name in loaded_by(statement)}
    assert tops - sys.stdlib_module_names == {"quire"}


def test_nothing_slow() -> None:
    # Each of these takes longer to import than quire itself.
    slow = {"asyncio", "dataclasses", "importlib.metadata", "inspect", "json", "logging", "multiprocessing"}
    slow |= {"pathlib", "subprocess", "tempfile", "unittest"}
    for statement in ("import quire", "import quire.wheels"):
        assert not slow & set(loaded_by(statement)), "import it where it is used"


def test_command_loads_only_the_subcommand_asked_for() -> None:
    loaded = loaded_by("import quire.cli")
    assert not {"quire.commands.demo", "quire.commands.doctor"} & set(loaded)
