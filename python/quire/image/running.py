"""Running programs out of archives, FatELF files, or memory, without a file on disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING, Any, NoReturn

from quire.errors import QuireError, Unsupported
from quire.image import binfmt, fatelf, script
from quire.image.content import copy_to_memory, opened
from quire.sources import FileSource, Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from quire.image.content import Content

__all__ = ["exec", "spawn"]


def exec(  # noqa: A001 - what it is called everywhere
    target: Content, argv: Sequence[str | bytes] | None = None, env: Mapping[str, str] | None = None
) -> NoReturn:
    """Replace this process's program by one from a file, an archive, a FatELF file, or memory.

    A plain file is executed as it is. Of anything else the program is copied to a sealed memfd, which
    ``execveat`` runs: nothing is written to disk, and no directory has to allow execution. Such a program
    has no path: ``/proc/self/exe`` reads ``/memfd:NAME (deleted)``, ``$ORIGIN`` is ``/``, and ps shows the
    number of the descriptor. The descriptor is closed by the call, except for a script and what a rule of
    ``binfmt_misc`` runs: their interpreter opens the program as ``/dev/fd/N``, so it stays open in the new
    program, and ``/proc`` must be mounted.

    As with ``os.execve``, buffered output is not flushed, and other threads end.

    Args:
        target: A path or url (``app.zip!/bin/tool`` too), a source, or bytes. Of a FatELF file, the ELF file
            for this machine is run.
        argv: Arguments, the program's name first; by default the name alone.
        env: The environment; by default this process's.

    Raises:
        OSError: It cannot be executed; the message says why, and what is missing. It has the errno of the
            system call.
        LookupError: A FatELF file has none for this machine.
        Malformed: It is a damaged FatELF file.
        PageError: Its bytes cannot be had.
        Unsupported: The machine allows no executable memfd.
        ValueError: The arguments are empty, or hold zero bytes.
    """
    variables = dict(os.environ if env is None else env)
    with _prepared(target) as program:
        try:
            if program.fd is None:
                os.execve(program.name, program.argv(argv), variables)  # noqa: S606 - that is what is asked for
            os.set_inheritable(program.fd, program.by_path)
            # With a descriptor this is execveat with an empty path.
            os.execve(program.fd, program.argv(argv), variables)  # noqa: S606
        except OSError as error:
            raise _explained(error, target, program) from error


def spawn(
    target: Content,
    argv: Sequence[str | bytes] | None = None,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[Any]:
    """Start a program as a child process, from all that `exec` takes.

    Args:
        target: See `exec`.
        argv: Arguments, the program's name first; by default the name alone.
        env: The environment; by default this process's.
        **options: For `subprocess.Popen`: ``stdin``, ``stdout``, ``cwd``, ``pass_fds``, ``text`` and so on;
            all but ``args``, ``executable``, ``env`` and ``shell``. With ``user`` the child must be allowed
            to look into this process, as root's children are.

    Returns:
        The child, as `subprocess.Popen` gives it. It has no descriptor of the program, except for a script
        and what a rule of ``binfmt_misc`` runs.

    Raises:
        OSError: It cannot be executed; the message says why, and what is missing.
        LookupError: A FatELF file has none for this machine.
        Malformed: It is a damaged FatELF file.
        PageError: Its bytes cannot be had.
        Unsupported: The machine allows no executable memfd.
        ValueError: The arguments are empty, or hold zero bytes.
    """
    with _prepared(target) as program:
        arguments = program.argv(argv)
        executable = program.name
        if program.fd is not None and program.by_path:
            executable = f"/dev/fd/{program.fd}"
            options["pass_fds"] = (*options.get("pass_fds", ()), program.fd)
        elif program.fd is not None:
            # The child has closed its own descriptor when it looks.
            executable = f"/proc/{os.getpid()}/fd/{program.fd}"
        try:
            return subprocess.Popen(arguments, executable=executable, env=env, **options)  # noqa: S603
        except OSError as error:
            # Another file than the program: the directory to change to.
            if error.filename not in (None, executable):
                raise
            raise _explained(error, target, program) from error


class _Program:
    """What is to be run: a path, or a descriptor."""

    def __init__(self, name: str, fd: int | None = None, *, by_path: bool = False) -> None:
        self.name = name
        self.fd = fd
        self.by_path = by_path

    def argv(self, given: Sequence[str | bytes] | None) -> list[str | bytes]:
        if given is None:
            return [self.name]
        if isinstance(given, str | bytes):
            raise TypeError("argv is a list of arguments, not one text")
        if not given:
            raise ValueError("argv is empty; its first item is the program's name")
        return list(given)


@contextlib.contextmanager
def _prepared(target: Content) -> Iterator[_Program]:
    """Find out what to run, and copy to memory what is no file of its own; for use in the block."""
    try:
        with opened(target) as source:
            program = _program(source)
    except PermissionError:
        # One may be allowed to run what one is not allowed to read.
        if not isinstance(target, str | os.PathLike):
            raise
        program = _Program(os.fspath(target))
    try:
        yield program
    finally:
        if program.fd is not None:
            os.close(program.fd)


def _program(source: Source) -> _Program:
    head = source.read(0, min(script.HEAD_BYTES, source.size))
    offset, size = 0, source.size
    if fatelf.is_fatelf(head):
        record = fatelf.record_to_execute(source)
        offset, size = record.offset, record.size
        head = source.read(offset, min(script.HEAD_BYTES, size))
    elif isinstance(source, FileSource):
        return _Program(source.path)
    by_path = script.is_script(head) or _has_rule(head)
    fd = copy_to_memory(source, offset, size, name=os.path.basename(source.name))
    return _Program(source.name, fd, by_path=by_path)


def _has_rule(head: bytes) -> bool:
    try:
        found = binfmt.rules()
    except Unsupported:
        # Rules that cannot be seen from here may still be there; execve then says ENOENT.
        return False
    return binfmt.match(found, head, "/dev/fd/0") is not None


def _explained(error: OSError, target: Content, program: _Program) -> OSError:
    """Add to what the kernel said what is missing, as far as that can be told."""
    from quire.image.verdict import why  # noqa: PLC0415 - only failures need it

    try:
        missing = why(target).missing
    except (QuireError, OSError) as failure:
        missing = [str(failure)]
    reason = "; ".join([error.strerror or "execve failed", *missing])
    return OSError(error.errno, reason, program.name)
