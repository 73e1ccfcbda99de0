"""What would run a file here, and what is missing: the kernel's decisions, told without running anything.

The order is the kernel's: permissions, then rules of ``binfmt_misc``, then ``#!``, then ELF. The only thing
that is executed is a header that cannot start (see `quire.image.machines.kernel_runs`).
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.errors import Malformed, Unsupported
from quire.image import binfmt, fatelf, foreign, script
from quire.image.content import opened
from quire.image.elf import ElfImage
from quire.image.libraries import Library, resolve
from quire.image.machines import IDENT_BYTES, Ident, identify, kernel_runs
from quire.image.reading import read
from quire.sources import FileSource

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quire.image.content import Content
    from quire.sources import Source

__all__ = ["Verdict", "why"]

_ELIBBAD = getattr(errno, "ELIBBAD", 80)
_MUSL = "ld-musl-"
_ENV_ASSIGNMENT = "="


@dataclass(slots=True)
class Verdict:
    """What would happen if a file were executed here.

    Attributes:
        name: Of the file.
        runs: Whether a program starts and finds what it needs; None if that cannot be told.
        errno: What ``execve`` would fail with; 0 if it succeeds, also where what it starts then fails.
        steps: What the kernel does, in order, one sentence each.
        missing: What would have to be otherwise for it to run.
        hints: What else runs such files, whether it is installed, and what could not be looked at.
        libraries: What a dynamically linked program needs, and where it is.
    """

    name: str
    runs: bool | None = True
    errno: int = 0
    steps: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    libraries: list[Library] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Return all of it as plain data, for JSON."""
        return {
            "name": self.name,
            "runs": self.runs,
            "errno": errno.errorcode.get(self.errno) if self.errno else None,
            "steps": self.steps,
            "missing": self.missing,
            "hints": self.hints,
            "libraries": [library._asdict() for library in self.libraries],
        }


def why(target: Content, environ: Mapping[str, str] | None = None) -> Verdict:
    """Say what would run a file here, and what is missing.

    A path is judged as ``execve`` would judge it. A member of an archive, other sources and bytes are judged
    as what `quire.image.exec` runs from memory: permissions and the file system do not count.

    Args:
        target: A path, ``archive.zip!/member``, a source, or bytes.
        environ: The environment it would run with; by default this process's. ``PATH`` and
            ``LD_LIBRARY_PATH`` are looked at.

    Raises:
        OSError: An archive cannot be opened. A plain file that is not there is a verdict.
        PageError: Its bytes cannot be had.
    """
    judge = _Judge(os.environ if environ is None else environ)
    if isinstance(target, str | os.PathLike):
        path = os.fspath(target)
        if ("!/" not in path and "://" not in path) or os.path.exists(path):
            verdict = Verdict(path)
            judge.executed(verdict, path, 0)
            return verdict
    with opened(target) as source:
        verdict = Verdict(source.name)
        judge.from_memory(verdict, source)
    return verdict


class _Judge:
    """Follows what the kernel does with a file and with the interpreters that it names."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._by_env: set[str] = set()
        try:
            self._rules = binfmt.rules()
            self._unseen = ""
        except (Unsupported, Malformed) as error:
            self._rules = []
            self._unseen = str(error)

    def executed(self, verdict: Verdict, path: str, level: int) -> None:
        """Judge a path that is given to ``execve``, or that a script or a rule names.

        Args:
            verdict: Is added to.
            path: Relative to the current directory.
            level: How many interpreters it is the interpreter of.
        """
        problem = (errno.ENOENT, "the path is empty") if not (path or level) else _not_executable(path)
        if problem is not None:
            _fails(verdict, *problem)
            # What else there is to say of a file that only lacks permission is worth saying.
            if level or not os.path.isfile(path):
                return
        if level > script.LEVELS_MAX:
            _fails(
                verdict, errno.ELOOP, f"more than {script.LEVELS_MAX} levels of interpreters are not followed"
            )
            return
        try:
            source = FileSource(path)
        except PermissionError:
            _unsure(verdict, f"{path} may not be read by this user, so what it is cannot be told")
            return
        with source:
            self._content(verdict, source, path, level)

    def from_memory(self, verdict: Verdict, source: Source) -> None:
        """Judge bytes that are executed from a memfd."""
        head = source.read(0, min(script.HEAD_BYTES, source.size))
        if not fatelf.is_fatelf(head):
            self._content(verdict, source, None, 0)
            return
        try:
            record = fatelf.record_to_execute(source)
            verdict.steps.append(f"quire takes the program for {record.target} out of {source.name}")
            image = ElfImage(source, source.name, record.offset, record.size)
            self._elf_image(verdict, image, source.name, None)
        except (Malformed, LookupError) as error:
            _fails(verdict, errno.ENOEXEC, str(error))

    def _content(self, verdict: Verdict, source: Source, path: str | None, level: int) -> None:
        name = source.name if path is None else path
        head = source.read(0, min(script.HEAD_BYTES, source.size))
        rule = binfmt.match(self._rules, head, "/dev/fd/3" if path is None else path)
        if rule is not None:
            self._by_rule(verdict, rule, name, level)
        elif script.is_script(head):
            self._script(verdict, head, name, level)
        elif head[:4] == b"\x7fELF":
            self._elf(verdict, source, name, path)
        else:
            found = foreign.recognise(head, source)
            _fails(verdict, errno.ENOEXEC, f"{name} is {found.what}, which the kernel does not run")
            self._foreign(verdict, found, name)

    def _foreign(self, verdict: Verdict, found: foreign.Foreign, name: str) -> None:
        verdict.hints += found.hints(name, self._environ)
        if self._unseen:
            verdict.hints.append(self._unseen)

    def _by_rule(self, verdict: Verdict, rule: binfmt.Rule, name: str, level: int) -> None:
        verdict.steps.append(f"the rule {rule.name} of binfmt_misc starts {rule.interpreter} for {name}")
        if "F" in rule.flags:
            verdict.steps.append(f"{rule.interpreter} was opened when the rule was made")
            # What it was may be out of sight, and then counts as a program.
            if not os.path.isfile(rule.interpreter):
                return
        self.executed(verdict, rule.interpreter, level + 1)

    def _script(self, verdict: Verdict, head: bytes, name: str, level: int) -> None:
        try:
            found = script.parse(head, name)
        except Malformed as error:
            _fails(verdict, errno.ENOEXEC, str(error))
            return
        interpreter = os.fsdecode(found.interpreter)
        argument = "" if found.argument is None else f" with the argument {os.fsdecode(found.argument)!r}"
        verdict.steps.append(f"the first line of {name} starts {interpreter}{argument}")
        self.executed(verdict, interpreter, level + 1)
        if verdict.runs and os.path.basename(interpreter) == "env" and found.argument is not None:
            self._env(verdict, os.fsdecode(found.argument))

    def _env(self, verdict: Verdict, argument: str) -> None:
        """Judge what ``env`` starts; it is a program like others and executes anew."""
        if argument.startswith("-S"):
            try:
                words = shlex.split(argument.removeprefix("-S"))
            except ValueError as error:
                _unsure(verdict, f"what env makes of {argument!r} cannot be told: {error}")
                return
        else:
            words = [argument]
        program = next((word for word in words if word[:1] != "-" and _ENV_ASSIGNMENT not in word), None)
        if program is None:
            return
        place = shutil.which(program, path=self._environ.get("PATH", os.defpath))
        if place is None:
            _fails(verdict, 0, f"env does not find {program} on PATH")
            return
        verdict.steps.append(f"env finds {program} at {place}")
        if place in self._by_env:
            _fails(verdict, 0, f"env starts {place} again, without end")
            return
        self._by_env.add(place)
        below = Verdict(place)
        self.executed(below, place, 0)
        verdict.runs = below.runs
        for name in ("steps", "missing", "hints", "libraries"):
            getattr(verdict, name).extend(getattr(below, name))

    def _elf(self, verdict: Verdict, source: Source, name: str, path: str | None) -> None:
        try:
            image = read(source)
            if not isinstance(image, ElfImage):
                raise Malformed(f"{name}: no ELF file")
            self._elf_image(verdict, image, name, path)
        except Malformed as error:
            _fails(verdict, errno.ENOEXEC, str(error))

    def _elf_image(self, verdict: Verdict, image: ElfImage, name: str, path: str | None) -> None:
        if image.kind in ("relocatable", "core", "other"):
            _fails(verdict, errno.ENOEXEC, f"{name} is an ELF file of kind {image.kind!r}, not a program")
            return
        ident = Ident(image.machine_number, image.os_abi, image.abi_version, image.bits, image.byte_order)
        try:
            how = kernel_runs(ident, image.flags)
        except Unsupported as error:
            _unsure(verdict, f"whether the kernel runs such programs cannot be tried: {error}")
            return
        machine = f"{image.machine} ({image.bits} bits, {image.byte_order}-endian)"
        if how is None:
            _fails(verdict, errno.ENOEXEC, f"this kernel does not run programs for {machine}, as {name} is")
            self._foreign(verdict, foreign.machine(ident, machine), name)
            return
        if how == "rule":
            verdict.steps.append("a rule of binfmt_misc that cannot be seen from here starts an emulator")
            return
        verdict.steps.append(f"the kernel maps {name}, an ELF {image.kind} for {machine}")
        # What the kernel would refuse to map.
        image.load_plan()
        interpreter = image.interpreter
        if interpreter is not None:
            self._linker(verdict, image, path, interpreter)
        elif image.kind == "executable":
            verdict.steps.append("it is statically linked: no dynamic linker is started")
        elif _is_glibc(image.soname or ""):
            verdict.steps.append("it is a dynamic linker, which runs the program that is its argument")
        elif image.entry:
            _unsure(
                verdict,
                f"{name} is a shared object; whether what is at its entry is a program cannot be told",
            )
        else:
            # The kernel starts it at its first byte, where no code is.
            _fails(verdict, 0, f"{name} is a library: it has no entry, and names no dynamic linker")

    def _linker(self, verdict: Verdict, image: ElfImage, path: str | None, interpreter: str) -> None:
        verdict.steps.append(f"the kernel starts its dynamic linker, {interpreter}")
        problem = _not_executable(interpreter)
        if problem is not None:
            _fails(verdict, *problem)
            if problem[0] == errno.ENOENT:
                verdict.hints.append(
                    f"{interpreter} comes with the C library for {image.machine}, {image.bits} bits"
                )
            return
        try:
            with FileSource(interpreter) as source:
                ident = identify(source.read(0, min(IDENT_BYTES, source.size)))
        except PermissionError:
            _unsure(verdict, f"{interpreter} may not be read by this user, so what it is cannot be told")
            return
        if ident is None or (ident.machine, ident.bits) != (image.machine_number, image.bits):
            _fails(verdict, _ELIBBAD, f"{interpreter} is no ELF file for {image.machine}")
            return
        if not _is_glibc(interpreter):
            verdict.hints.append(
                f"libraries are looked for by glibc's rules only, and {interpreter} has others"
            )
            return
        try:
            verdict.libraries = resolve(image, path, self._environ)
        except Malformed as error:
            # The kernel starts it; the linker then stops.
            _fails(verdict, 0, str(error))
            return
        for library in verdict.libraries:
            if library.path is None:
                _fails(
                    verdict, 0, f"the library {library.name}, which {library.needed_by} needs, is not found"
                )
            elif library.lacks:
                versions = ", ".join(library.lacks)
                _fails(verdict, 0, f"{library.path} has no symbols of version {versions}, which are needed")
        if path is None and any("$" in (text or "") for text in (image.rpath, image.runpath)):
            verdict.hints.append("$ORIGIN is / for a program in memory")


def _is_glibc(interpreter: str) -> bool:
    name = os.path.basename(interpreter)
    return name.startswith(("ld-linux", "ld64.so.", "ld.so.", "ld-2."))


def _fails(verdict: Verdict, number: int, reason: str) -> None:
    """Note what keeps the file from running; 0 if ``execve`` succeeds and what is started fails."""
    verdict.runs = False
    verdict.errno = verdict.errno or number
    verdict.missing.append(reason)


def _unsure(verdict: Verdict, reason: str) -> None:
    verdict.runs = None if verdict.runs else verdict.runs
    verdict.missing.append(reason)


def _not_executable(path: str) -> tuple[int, str] | None:
    """Find what keeps the kernel from opening a file to execute it: errno and reason."""
    if not path:
        return errno.EACCES, "the path is empty, which is the current directory"
    try:
        status = os.stat(path)
    except OSError as error:
        return error.errno or errno.ENOENT, f"{path}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return errno.EACCES, f"{path} is no regular file"
    if os.access(path, os.X_OK, effective_ids=True):
        return None
    # On a file system mounted noexec the answer is no, whatever the mode is.
    if os.statvfs(path).f_flag & os.ST_NOEXEC:
        return errno.EACCES, f"{path} is on a file system that is mounted noexec ({_mount_point(path)})"
    mode = stat.filemode(status.st_mode)
    return errno.EACCES, f"{path} may not be executed by this user: its mode is {mode}"


def _mount_point(path: str) -> str:
    place = os.path.realpath(path)
    while not os.path.ismount(place):
        place = os.path.dirname(place)
    return place
