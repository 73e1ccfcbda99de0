"""Every test that docs/security.md names is there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()
LETTERS = {letter: module for module, letter in re.findall(r"`(test_\w+)`\s+\(([A-Z])\)", PAGE)}


def named() -> list[tuple[str, str]]:
    """Module and function of each test in the last column of a table; empty where it names none."""
    found = []
    for line in PAGE.splitlines():
        if not line.startswith("|"):
            continue
        module = ""
        last = line.rstrip("| ").rpartition("|")[2]
        for letter, text in re.findall(r"(?:\b([A-Z])\b[ ,]*)?(?:`([^`]+)`)?", last):
            if letter:
                module = LETTERS[letter]
            one, _, two = text.partition("::")
            if one.endswith(".rs"):
                found.append((pathlib.Path(one).name, ""))
            elif two:
                module = one
                found.append((one, two))
            elif one.startswith("test_"):
                is_module = (ROOT / "tests" / f"{one.removesuffix('.py')}.py").exists()
                found.append((one.removesuffix(".py"), "") if is_module else (module, one))
    return found


NAMED = named()


def test_there_are_some() -> None:
    assert len(NAMED) > 100
    assert set("HRBCPKMO") <= set(LETTERS)


@pytest.mark.parametrize(("module", "function"), sorted(set(NAMED)))
def test_it_is_there(module: str, function: str) -> None:
    if module.endswith(".rs"):
        found = [path for folder in ("crates", "fuzz") for path in (ROOT / folder).rglob(module)]
        assert [path for path in found if "target" not in path.relative_to(ROOT).parts[:2]]
        return
    path = ROOT / "tests" / f"{module}.py"
    if module and not path.exists():
        pytest.fail(f"no {path.name}")
    modules = [path] if module else sorted((ROOT / "tests").glob("test_*.py"))
    pattern = rf"^ *(async )?def {function}\(" if function else ""
    assert any(re.search(pattern, each.read_text(), re.MULTILINE) for each in modules), function
