"""The blocking and the awaited client say the same of what they do."""

import inspect

import pytest

from quire import aio, client
from quire.broker.operations import Operations

# Each has its own way to tell of versions.
DIFFERENT = {"subscribe"}
NAMES = sorted(
    name
    for name, value in vars(Operations).items()
    if not name.startswith("_") and callable(value) and name not in DIFFERENT
)


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_presented_by_both(name: str) -> None:
    operation = getattr(Operations, name)
    told = inspect.signature(operation)
    for module in (client, aio):
        method = getattr(module.Client, name)
        signature = inspect.signature(method)
        assert signature.parameters == told.parameters
        assert f"Steps[{signature.return_annotation}]" == told.return_annotation
        assert method.__doc__ == operation.__doc__
        assert (method.__module__, method.__qualname__) == (module.__name__, f"Client.{name}")
    assert inspect.iscoroutinefunction(getattr(aio.Client, name))
    assert not inspect.iscoroutinefunction(getattr(client.Client, name))


def test_help_shows_what_a_method_takes() -> None:
    told = str(inspect.signature(client.Client.weaken))
    assert told == "(self, handle: 'Handle', rights: 'Rights') -> 'Handle'"
