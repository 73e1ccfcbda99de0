"""Each public name has one home, and documentation."""

import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import quire

# Names that are no classes or functions, so that they cannot say where they were made.
CONSTANTS = {"PAGE_SIZE": "quire._native", "__version__": "quire"}
PUBLIC = sorted(set(quire.__all__) - set(CONSTANTS))
# Packages whose names are public as those of a module are; their own modules are private to them.
PACKAGES = {"process", "space"}
# Has the names of quire.client, awaited.
AWAITED = "aio"
MODULES = sorted(
    module.name
    for module in pkgutil.iter_modules(quire.__path__)
    if not module.name.startswith("_") and (not module.ispkg or module.name in PACKAGES)
)

DESCRIPTORS = (property, staticmethod, classmethod)


def members(cls: type) -> list[tuple[str, Any]]:
    """Public attributes that the class's own body, not a base, defines as code."""
    return [
        (name, value)
        for name, value in vars(cls).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, DESCRIPTORS))
    ]


def test_all_is_complete_and_unique() -> None:
    assert len(quire.__all__) == len(set(quire.__all__))
    for name in quire.__all__:
        assert getattr(quire, name) is not None
    public = {
        name
        for name, value in vars(quire).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("quire")
    }
    assert public <= set(quire.__all__), "a public name that __all__ does not list"


@pytest.mark.parametrize("name", PUBLIC)
def test_one_home(name: str) -> None:
    value = getattr(quire, name)
    made_in = value.__module__
    assert getattr(importlib.import_module(made_in), name) is value
    home = made_in.removeprefix("quire.").partition(".")[0]
    assert home in MODULES, f"{name} says that it lives in {made_in}"
    homes = [
        module
        for module in MODULES
        if module != AWAITED and name in getattr(importlib.import_module(f"quire.{module}"), "__all__", ())
    ]
    assert homes == [home], f"{name} is listed in __all__ of {homes}"


@pytest.mark.parametrize("name", PUBLIC)
def test_documented(name: str) -> None:
    value = getattr(quire, name)
    assert inspect.getdoc(value), f"{name} has no docstring"
    if isinstance(value, type):
        for member, code in members(value):
            assert inspect.getdoc(code), f"{name}.{member} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_are_and_export(module: str) -> None:
    loaded = importlib.import_module(f"quire.{module}")
    assert loaded.__doc__, f"quire.{module} has no docstring"
    assert loaded.__all__, f"quire.{module} does not say what is public"


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert quire.__version__ == version("quire")
