"""Shared objects of wheels, loaded for the import of extension modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.errors import Malformed, PageError
from quire.linking import LinkError, link
from quire.wheels.archive import UNREADABLE

if TYPE_CHECKING:
    from quire.wheels.archive import Wheel

__all__ = ["load"]


def load(wheel: Wheel, member: str, module: str | None, mode: int) -> str:
    """Load a shared object of a wheel, after those that it needs.

    Args:
        wheel: Where it is.
        member: Its name there.
        module: Full name of the module that is imported, if one is; for errors.
        mode: Flags of ``dlopen``.

    Returns:
        The path by which the dynamic linker knows it. It stays loaded.

    Raises:
        ImportError: It, or one that it needs, is damaged, not for this machine, or refused by the dynamic
            linker; ``path`` names it.
    """
    name = f"{wheel.archive}/{member}"
    try:
        return link(wheel, member, mode).path
    except LinkError as error:
        text = str(error)
        if error.path == name:
            text = f"{text}; {wheel.describe()}"
        raise ImportError(text, name=module, path=error.path) from error
    except (Malformed, PageError) as error:
        raise ImportError(str(error), name=module, path=name) from error
    except UNREADABLE as error:
        raise ImportError(
            f"{name}: cannot be read from the wheel: {error}", name=module, path=name
        ) from error
