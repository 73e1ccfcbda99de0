"""Resources of packages in wheels, for `importlib.resources`."""

from __future__ import annotations

import contextlib
import importlib.resources
import pathlib
import zipfile
from importlib.readers import ZipReader
from typing import TYPE_CHECKING, Any

from quire.wheels.paths import as_file

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Reader"]


class _Resource(zipfile.Path):
    """A resource, for which ``as_file`` needs no folder for temporary files."""


class Reader(ZipReader):
    """Gives the resources of a package."""

    def files(self) -> Any:
        """Give the package's folder, to be walked down."""
        return _Resource(self.archive, self.prefix)


_ordinary = importlib.resources.as_file.dispatch(object)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _as_file(path: _Resource) -> Iterator[pathlib.Path]:
    """Extract a file to memory. Folders, from Python 3.12 on, are copied to temporary ones as ever."""
    if path.is_file():
        with as_file(str(path)) as real:
            yield pathlib.Path(real)
    else:
        with _ordinary(path) as folder:
            yield folder


importlib.resources.as_file.register(_Resource, _as_file)  # type: ignore[attr-defined]
