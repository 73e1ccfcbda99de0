"""Running a program in this process as ``python`` would have run it."""

from __future__ import annotations

import functools
import importlib.machinery
import os
import runpy
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from quire import wheels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.metadata import EntryPoint
    from types import CodeType, TracebackType

__all__ = ["console_script", "run", "run_command", "run_module", "run_script", "use"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def use(archives: Sequence[str], first: str | None) -> None:
    """Put wheels on ``sys.path``, where PYTHONPATH would be, for this process and those that it spawns.

    Args:
        archives: Paths of wheels.
        first: What Python puts before all else for a program of this kind. Not used, as by Python itself, in
            isolated mode and with ``-P``.
    """
    if not sys.flags.safe_path:
        # The place of the quire command.
        del sys.path[:1]
        if first is not None:
            sys.path.insert(0, first)
    at = 0 if sys.flags.safe_path or first is None else 1
    sys.path[at:at] = [wheels.Entry(os.path.abspath(archive)) for archive in archives]
    wheels.enable()


def run(program: Callable[[], None]) -> None:
    """Call a function whose errors are shown without the frames of quire.

    Raises:
        BaseException: What the program raised. ``sys.excepthook``, the program's own if it set one, is given
            the traceback that begins in the program.
    """
    try:
        program()
    except SystemExit:
        raise
    except BaseException as error:
        rest = error.__traceback__
        while rest is not None and rest.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            rest = rest.tb_next
        hook, failure = sys.excepthook, error

        def shown(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
            if value is failure:
                value, trace = value.with_traceback(rest), rest
            if hook is sys.__excepthook__ and not issubclass(kind, KeyboardInterrupt):
                # The interpreter's own, before Python 3.13, shows no source lines of archives. But to import
                # anything now would have it forget that it was interrupted, and not die by the signal.
                import traceback  # noqa: PLC0415 - only now

                traceback.print_exception(kind, value, trace)
            else:
                hook(kind, value, trace)

        sys.excepthook = shown
        raise


def _main_module() -> ModuleType:
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    return module


def _execute(code: CodeType, module: ModuleType) -> None:
    exec(code, vars(module))  # noqa: S102 - this is what it is for


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a script, or the ``__main__`` of a folder or archive; ``use`` has been called.

    Raises:
        OSError: The script cannot be read.
    """
    sys.argv[:] = [path, *arguments]
    # Python, too, makes it absolute without looking at what it is made of.
    path = os.path.join(os.getcwd(), path)
    if is_container(path):
        _main_module()
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        return
    loader: importlib.machinery.SourceFileLoader | importlib.machinery.SourcelessFileLoader
    if path.endswith(".pyc"):
        loader = importlib.machinery.SourcelessFileLoader("__main__", path)
        code = loader.get_code("__main__")
    else:
        loader = importlib.machinery.SourceFileLoader("__main__", path)
        code = compile(loader.get_data(path), path, "exec", dont_inherit=True)
    module = _main_module()
    module.__loader__ = loader
    module.__file__ = path
    vars(module)["__cached__"] = None
    assert code is not None
    _execute(code, module)


def is_container(path: str) -> bool:
    """Tell whether a program is a folder or an archive with a ``__main__``, not a script."""
    if os.path.isdir(path):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\3\4"
    except OSError:
        return False


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module, or the ``__main__`` of a package, as ``python -m``; ``use`` has been called."""
    sys.argv[:] = ["-m", *arguments]
    _main_module()
    # What python -m calls.
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def run_command(source: str, arguments: Sequence[str]) -> None:
    """Run source code as ``python -c``; ``use`` has been called."""
    sys.argv[:] = ["-c", *arguments]
    module = _main_module()
    module.__loader__ = importlib.machinery.BuiltinImporter
    _execute(compile(source, "<string>", "exec", dont_inherit=True), module)


def console_script(name: str, archives: Sequence[str], arguments: Sequence[str]) -> Callable[[], None]:
    """Find what an installer would have made a command of: an entry point, or a script in Python.

    Args:
        name: Of the command.
        archives: The wheels to look in.
        arguments: What follows the command.

    Returns:
        What runs it, after ``use`` was called.

    Raises:
        LookupError: No wheel has a command of this name, or it is no Python; the message lists what there is.
    """
    import importlib.metadata  # noqa: PLC0415 - takes longer to import than all that the others need

    from quire.wheels.archive import open_wheel  # noqa: PLC0415

    known = set()
    for archive in archives:
        for distribution in importlib.metadata.distributions(path=[archive]):
            for point in distribution.entry_points.select(group="console_scripts"):
                known.add(point.name)
                if point.name == name:
                    return functools.partial(_run_entry_point, point, [name, *arguments])
        wheel = open_wheel(archive)
        for member in wheel.members:
            folder, _, base = member.rpartition("/")
            if folder.endswith(".data/scripts"):
                known.add(base)
                if base == name:
                    source = wheel.read(member)
                    if not source.startswith(b"#!python"):
                        raise LookupError(f"{archive}/{member} is no script in Python")
                    path = f"{archive}/{member}"
                    return functools.partial(_run_source, source, path, [name, *arguments])
    raise LookupError(f"no wheel has a command {name!r}; there are: {', '.join(sorted(known)) or 'none'}")


def _run_entry_point(point: EntryPoint, argv: list[str]) -> None:
    sys.argv[:] = argv
    _main_module()
    function = point.load()
    sys.exit(function())


def _run_source(source: bytes, path: str, argv: list[str]) -> None:
    sys.argv[:] = argv
    module = _main_module()
    # Without __file__, for processes that are spawned could not read it there.
    _execute(compile(source, path, "exec", dont_inherit=True), module)
