"""Program files: what is in them, how each becomes an address space, and what runs them."""

from quire.image.running import exec, spawn  # noqa: A004

__all__ = ["exec", "spawn"]
