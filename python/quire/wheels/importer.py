"""Finding modules in wheels, and loading extension modules."""

from __future__ import annotations

import contextlib
import pkgutil
import posix
import stat
import sys
import zipimport
import zlib
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import decode_source
from typing import TYPE_CHECKING, Any

from quire.wheels.archive import UNREADABLE, open_wheel
from quire.wheels.compiled import code_of
from quire.wheels.objects import load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, ModuleType

__all__ = ["WheelExtensionLoader", "WheelImporter"]

_PYTHON_SUFFIXES = ("/__init__.pyc", "/__init__.py", ".pyc", ".py")


class WheelExtensionLoader(ExtensionFileLoader):
    """Loads an extension module of a wheel.

    ``path`` is that of the wheel with the member's name behind it; so are ``__file__`` and the spec's origin.
    """

    def __init__(self, name: str, importer: WheelImporter, member: str) -> None:
        """Name what to load.

        Args:
            name: Full name of the module.
            importer: Finder of the module's folder in the wheel.
            member: Name of the shared object in the wheel.
        """
        super().__init__(name, f"{importer.archive}/{member}")
        self._importer = importer
        self._member = member

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Load the shared object, after those that it needs, and make the module.

        Raises:
            ImportError: The member is damaged, is no shared object for this machine and interpreter, or needs
                a library that neither the wheel nor the system has; ``path`` names the member.
        """
        wheel = self._importer.wheel
        if self._member in wheel.foreign.values():
            text = f"{self.path}: not for this interpreter: {wheel.describe()}"
            raise ImportError(text, name=spec.name, path=self.path)
        path = load(wheel, self._member, spec.name, sys.getdlopenflags())
        # Modules that are initialised in one phase, and Cython's, have their __file__ from here at first.
        inner = ModuleSpec(spec.name, self, origin=path, is_package=self.is_package(spec.name))
        if spec.submodule_search_locations is not None:
            inner.submodule_search_locations = spec.submodule_search_locations
        try:
            module = super().create_module(inner)
        except ImportError as error:
            if error.path != path:
                raise
            reason = str(error).replace(path, self.path)
            text = f"{self.path}: cannot be loaded: {reason}; {wheel.describe()}"
            raise ImportError(text, name=spec.name, path=self.path) from error
        module.__file__ = self.path
        return module

    def get_data(self, path: str) -> bytes:
        """Read a member of the wheel by its path. Raises OSError if there is none."""
        return self._importer.get_data(path)

    def get_resource_reader(self, name: str | None = None) -> Any:
        """Give what `importlib.resources` reads from, for an extension module that is a package."""
        return self._importer.get_resource_reader(name or self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WheelExtensionLoader) and (self.name, self.path) == (other.name, other.path)

    def __hash__(self) -> int:
        return hash((self.name, self.path))


class WheelImporter(zipimport.zipimporter):
    """Finds modules in a wheel, or in a folder of one: those that `zipimport` finds, and extension modules.

    Args:
        path: Of a wheel, or of a folder in it.

    Raises:
        ImportError: It is no wheel.
    """

    def __init__(self, path: str) -> None:
        # zipimport would read the archive's directory, too, with code that takes as long as all else here.
        self.archive, self.prefix = _split(path)
        self.wheel = open_wheel(self.archive)
        """The wheel's directory. Not public."""

    def __getattr__(self, name: str) -> Any:
        """Read the directory as zipimport has it, when something asks for it."""
        if name != "_files":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with self._reading():
            self._files = zipimport.zipimporter(self.archive)._files  # type: ignore[attr-defined]
        return self._files

    def find_spec(
        self,
        fullname: str,
        target: ModuleType | None = None,  # noqa: ARG002 - what is loaded again is found like anything else
    ) -> ModuleSpec | None:
        """Find a module: packages before modules, extension modules before those in Python, as in folders.

        Args:
            fullname: Full name of the module; its last part is looked for in this folder.
            target: Ignored.

        Returns:
            How to load it; None if it is not here.
        """
        for stem in self._stems(fullname):
            if (member := self._extension(f"{stem}/__init__")) is not None:
                return self._spec(WheelExtensionLoader(fullname, self, member), fullname, member, stem)
            if not self._is_python_package(stem) and (member := self._extension(stem)) is not None:
                return self._spec(WheelExtensionLoader(fullname, self, member), fullname, member)
            if any(stem + suffix in self.wheel.ignored for suffix in _PYTHON_SUFFIXES):
                continue
            if (member := self._python(stem)) is not None:
                folder = stem if _is_init(member) else None
                return self._spec(self, fullname, member, folder)
            if (member := self.wheel.foreign.get(stem)) is not None:
                return self._spec(WheelExtensionLoader(fullname, self, member), fullname, member)
            if stem in self.wheel.folders:
                spec = ModuleSpec(fullname, None, is_package=True)
                spec.submodule_search_locations = [f"{self.archive}/{stem}"]
                return spec
        return None

    def get_code(self, fullname: str) -> CodeType:
        """Compile a module, or take what was compiled. Raises ImportError if it is damaged or not here."""
        member = self._member(fullname)
        if member.endswith(".py"):
            try:
                return code_of(self.wheel, member)
            except UNREADABLE as error:
                path = f"{self.archive}/{member}"
                raise ImportError(f"{path}: cannot be read from the wheel: {error}", path=path) from error
        with self._reading():
            return super().get_code(fullname)

    def get_filename(self, fullname: str) -> str:
        """Give the path of a module. Raises zipimport.ZipImportError if it is not here.

        zipimport compiles the module to know its path.
        """
        return f"{self.archive}/{self._member(fullname)}"

    def get_source(self, fullname: str) -> str | None:
        """Give a module's source, decoded as it says. Raises ImportError if it is damaged or not here."""
        member = self._member(fullname)
        if not member.endswith(".py"):
            return None
        with self._reading():
            return decode_source(self.get_data(f"{self.archive}/{member}"))

    def is_package(self, fullname: str) -> bool:
        """Tell whether a module is a package. Raises zipimport.ZipImportError if it is not here."""
        stems = self._stems(fullname)
        return any(self._extension(f"{stem}/__init__") for stem in stems) or _is_init(self._member(fullname))

    def get_resource_reader(self, fullname: str) -> Any:
        """Give what `importlib.resources` reads from; None if the name is not that of a package here."""
        try:
            if not self.is_package(fullname):
                return None
        except zipimport.ZipImportError:
            return None
        # Takes longer to import than all that importing modules needs.
        from quire.wheels.resources import Reader  # noqa: PLC0415

        return Reader(self, fullname)

    def invalidate_caches(self) -> None:
        """Read the wheel's directory again if the file has changed."""
        super().invalidate_caches()
        vars(self).pop("_files", None)
        with contextlib.suppress(OSError, ImportError):
            # A file that is gone, or no wheel any more, finds nothing: zipimport sees to that.
            self.wheel = open_wheel(self.archive)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise as ImportError what zipimport lets through when an archive is damaged."""
        try:
            yield
        except (OSError, EOFError, zlib.error) as error:
            raise ImportError(f"{self.archive}: {error}", path=self.archive) from error

    def _extension(self, stem: str) -> str | None:
        members = self.wheel.members
        return next((stem + suffix for suffix in EXTENSION_SUFFIXES if stem + suffix in members), None)

    def _python(self, stem: str) -> str | None:
        members = self.wheel.members
        return next((stem + suffix for suffix in _PYTHON_SUFFIXES if stem + suffix in members), None)

    def _is_python_package(self, stem: str) -> bool:
        return any(stem + suffix in self.wheel.members for suffix in _PYTHON_SUFFIXES[:2])

    def _stems(self, fullname: str) -> list[str]:
        """List the places of a module, without suffix: an installer would make one folder of several."""
        name = fullname.rpartition(".")[2]
        return [self.prefix + name, *(root + name for root in self.wheel.roots if not self.prefix)]

    def _member(self, fullname: str) -> str:
        """Find a module in Python."""
        found = next(filter(None, map(self._python, self._stems(fullname))), None)
        if found is None:
            raise zipimport.ZipImportError(f"can't find module {fullname!r}", name=fullname)
        return found

    def _spec(self, loader: Any, fullname: str, member: str, folder: str | None = None) -> ModuleSpec:
        origin = f"{self.archive}/{member}"
        spec = ModuleSpec(fullname, loader, origin=origin, is_package=folder is not None)
        spec.has_location = True
        if folder is not None:
            spec.submodule_search_locations = [f"{self.archive}/{folder}"]
        return spec


def _split(path: str) -> tuple[str, str]:
    """Tell the archive and the folder in it, which ends with a slash if it is not the root, of an entry."""
    archive, folder = path, ""
    while archive:
        try:
            # Not that of os, which may be one that looks into wheels.
            status = posix.stat(archive)
        except (OSError, ValueError):
            archive, _, base = archive.rpartition("/")
            folder = f"{base}/{folder}"
            continue
        if stat.S_ISREG(status.st_mode):
            return archive, folder.lstrip("/")
        break
    raise ImportError(f"{path!r} leads into no wheel", path=path)


def _iter_modules(importer: WheelImporter, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """List modules and packages for pkgutil, which would look for the directory where zipimport keeps it."""
    from inspect import getmodulename  # noqa: PLC0415 - slow to import, and seldom needed

    found: dict[str, bool] = {}
    for root in (importer.prefix, *(root for root in importer.wheel.roots if not importer.prefix)):
        for member in importer.wheel.members:
            head, slash, below = member.removeprefix(root).partition("/")
            if member.startswith(root) and (name := getmodulename(below if slash else head)) is not None:
                if slash and name == "__init__":
                    found[head] = True
                elif not slash and name != "__init__":
                    found.setdefault(name, False)
    for name in sorted(found):
        if "." not in name:
            yield prefix + name, found[name]


pkgutil.iter_importer_modules.register(WheelImporter, _iter_modules)  # type: ignore[attr-defined]


def _is_init(member: str) -> bool:
    return member.rpartition("/")[2].startswith("__init__.py")
