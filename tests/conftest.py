"""Fixtures that several modules use."""

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def broker_settings() -> dict[str, Any]:
    """Fields of the configuration of `broker`; a module that needs others has its own."""
    return {}


@pytest.fixture
def broker(tmp_path: pathlib.Path, broker_settings: dict[str, Any]) -> Iterator[Any]:
    """A broker in this process, whose books are right at the end."""
    from brokers import inside

    with inside(tmp_path / "broker", **broker_settings) as running:
        yield running
        assert running.audit() == []


@pytest.fixture
def owner(broker: Any) -> Iterator[Any]:
    """A client of it, in this process."""
    import quire

    with quire.connect(broker.path) as connected:
        yield connected


@pytest.fixture
def other(broker: Any) -> Iterator[Any]:
    """Another one."""
    import quire

    with quire.connect(broker.path) as connected:
        yield connected
