"""The broker's configuration: limits of users, and what is done to clients that do not comply."""

from __future__ import annotations

import os
import tomllib
from typing import TYPE_CHECKING, Any

import msgspec

from quire.broker.metrics import address

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["BankConfig", "Config", "load"]


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class BankConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The limits of a user's bank. What is left out is the general default."""

    uid: int
    limit_bytes: int | None = None
    limit_objects: int | None = None
    limit_descriptors: int | None = None
    publish: bool = True
    """Whether its handles have the right PUBLISH."""


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Everything that may be set. Sizes are in bytes, times in the unit that the name says."""

    limit_bytes: int = 0
    """For all clients together; 0 is half of the machine's memory."""
    limit_objects: int = 100_000
    limit_descriptors: int = 0
    """0 is what RLIMIT_NOFILE leaves after 1024 for connections."""
    user_limit_bytes: int = 0
    """For a user without an entry of his own; 0 is ``limit_bytes``."""
    reserve_bytes: int = 64 << 20
    """For the second copy of an extent while others are moved off it; on top of ``limit_bytes``."""
    users: list[int] | None = None
    """Who may connect, by user id; None is everybody who can reach the socket."""
    policy: str = "cut"
    """What is done to a client that does not give memory back: ``cut``, ``disconnect`` or ``kill``."""
    move_ms: int = 2000
    """How long clients may take to be moved before they are cut off as well; 2 ms for each MiB that each of
    them has to map are added."""
    resume_seconds: float = 10.0
    """How long a client may take to come back after the broker was restarted."""
    rate: float = 20_000.0
    """Requests a second of a connection; one that takes long counts as several."""
    handles: int = 4096
    """Of a client."""
    user_handles: int = 16_384
    """Of all clients of a user together."""
    leases: int = 1024
    names: int = 256
    connections: int = 256
    frame_seconds: float = 5.0
    metrics: str = ""
    """``HOST:PORT`` on which Prometheus may read; empty is none. Whoever reaches it can read it."""
    log_format: str = "json"
    """``json``, an object a line, or ``text``."""
    log_level: str = "info"
    """``debug`` (every request), ``info`` (what changes something), ``warning`` or ``error``."""
    banks: list[BankConfig] = []

    @property
    def total_bytes(self) -> int:
        """The limit of the root bank."""
        return self.limit_bytes or _memory_bytes() // 2


def load(path: str | Path | None, **given: Any) -> Config:
    """Read a configuration.

    Args:
        path: A TOML file with the fields of `Config`; None is all defaults.
        **given: Fields that override the file's.

    Raises:
        ValueError: The file is no TOML, or a field is unknown or of the wrong type; the message says which.
        OSError: It cannot be read.
    """
    data: dict[str, Any] = {}
    if path is not None:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    data.update(given)
    try:
        config = msgspec.convert(data, Config)
    except msgspec.ValidationError as error:
        raise ValueError(f"configuration: {error}") from error
    if config.policy not in ("cut", "disconnect", "kill"):
        raise ValueError(f"configuration: policy {config.policy!r} is not cut, disconnect or kill")
    if config.log_format not in ("json", "text"):
        raise ValueError(f"configuration: log_format {config.log_format!r} is not json or text")
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise ValueError(
            f"configuration: log_level {config.log_level!r} is not debug, info, warning or error"
        )
    if config.metrics:
        address(config.metrics)
    return config
