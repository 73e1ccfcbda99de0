"""Scripts of operations on model address spaces: the language of ``quire space play``.

docs/address-spaces.md describes the language. A script is parsed as it runs, line by line, because addresses
may be those that earlier lines returned.
"""

from __future__ import annotations

import dataclasses
import errno
import shlex
from typing import TYPE_CHECKING, Any, NamedTuple

from quire._native import PAGE_SIZE
from quire.errors import Malformed
from quire.pictures.model import Sample, Step
from quire.pictures.text import printable
from quire.space import constants, windows_script
from quire.space.address_space import AddressSpace, CallError
from quire.space.faults import FaultKind
from quire.space.language import NAME, Result, Words, number
from quire.space.picture import Frames, sample, windows_sample
from quire.space.rules import Rules
from quire.space.vma import File
from quire.space.windows import ERRORS, WindowsSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from quire.space.outcome import Change

__all__ = ["Lesson", "play"]

_LINES_AT_MOST = 10_000
_PAGES_AT_MOST = 1 << 16
_ROWS_AT_MOST = 100_000
_MMAP_FLAGS = {
    "fixed": constants.MAP_FIXED,
    "noreplace": constants.MAP_FIXED_NOREPLACE,
    "noreserve": constants.MAP_NORESERVE,
    "growsdown": constants.MAP_GROWSDOWN,
}
_ADVICE = {
    name.removeprefix("MADV_").lower(): value
    for name, value in vars(constants).items()
    if name.startswith("MADV_")
}
_FAULTS = {kind: kind.value.lower().replace(" ", "-") for kind in FaultKind}


class Lesson(NamedTuple):
    """What a script says about itself, and its steps."""

    title: str
    about: str
    steps: list[Step]


def play(text: str, rules: Rules | None = None) -> Lesson:
    """Run a script.

    Calls that fail as the kernel makes them fail are steps like others, whose notes tell the errno.

    Args:
        text: The script.
        rules: Of the kernel; by default those of Linux 6.18 on x86-64, so that a lesson looks the same
            everywhere.

    Raises:
        Malformed: A line is not of the language, names what is not there, or what it expects did not happen;
            the message begins with the line's number.
    """
    player = _Player(rules or Rules())
    lines = text.splitlines()
    if len(lines) > _LINES_AT_MOST:
        raise Malformed(f"a script has at most {_LINES_AT_MOST} lines")
    for count, line in enumerate(lines, 1):
        try:
            player.line(line)
        except (ValueError, KeyError, Malformed) as error:
            said = f"unknown name {error}" if isinstance(error, KeyError) else str(error)
            raise Malformed(f"line {count}: {printable(said)}") from error
    return Lesson(player.title, " ".join(player.about), player.steps)


class _Player:
    """The state of a script that runs."""

    def __init__(self, rules: Rules) -> None:
        self.title = "An address space"
        self.about: list[str] = []
        self.steps: list[Step] = []
        self._rules = rules
        self._spaces: dict[str, AddressSpace | WindowsSpace] = {}
        self._names: dict[str, int] = {}
        self._labels: list[tuple[int, int, str]] = []
        self._files: dict[str, File] = {}
        self._frames = Frames()
        self._said: list[str] = []
        self._last = Result([], [])
        self._setup = False
        self._drawn = 0
        self._operations: dict[str, Callable[[AddressSpace, Words], Result]] = {
            "mmap": self._mmap,
            "munmap": self._munmap,
            "mprotect": self._mprotect,
            "mremap": self._mremap,
            "brk": self._brk,
            "madvise": self._madvise,
            "touch": self._touch,
        }

    def line(self, line: str) -> None:
        """Do one line; ValueError, KeyError or Malformed if that cannot be."""
        words = shlex.split(line, comments=True)
        if not words:
            return
        text = line.strip()
        process = next(iter(self._spaces), "process")
        if words[0].endswith(":"):
            process = words.pop(0)[:-1]
            if process not in self._spaces:
                raise KeyError(process)
        given = Words(words, self._names)
        verb = given.next("an operation")
        if process not in self._spaces and verb in (*self._operations, *windows_script.OPERATIONS):
            is_windows = verb not in self._operations
            self._spaces[process] = WindowsSpace() if is_windows else AddressSpace(self._rules)
        space = self._spaces.get(process)
        if isinstance(space, WindowsSpace) and verb in windows_script.OPERATIONS:
            self._show(text, windows_script.run(verb, space, given, self._name), process)
        elif verb in self._operations:
            self._show(text, self._run(verb, self._linux(process, verb), given), process)
        elif verb == "fork":
            self._fork(process, given, text)
        elif verb == "exit":
            given.end()
            self._linux(process, verb).clear()
            del self._spaces[process]
            self._show(text, Result([f"{process} is gone, and what it mapped"], []), process)
        else:
            self._direct(verb, given)

    def _direct(self, verb: str, words: Words) -> None:
        """Do what is no operation on memory."""
        if verb == "title":
            self.title = " ".join(words.rest())
        elif verb == "about":
            self.about += words.rest()
        elif verb == "say":
            self._said.append(" ".join(words.rest()))
        elif verb == "rule":
            self._rule(words.next("a rule"), words.next("a value"))
        elif verb == "file":
            name, size = words.next("a name"), words.number("a size")
            self._files[name] = File(name, size)
        elif verb == "setup":
            self._setup = True
        elif verb == "begin":
            self._setup = False
            self._show("At the beginning", Result([], []), "")
        elif verb == "expect":
            self._expect(words.next("what is expected"))
        else:
            raise ValueError(f"{verb!r} is no operation")
        words.end()

    def _run(self, verb: str, space: AddressSpace, words: Words) -> Result:
        with space.explaining():
            try:
                return self._operations[verb](space, words)
            except CallError as error:
                code = errno.errorcode[error.errno or 0]
                notes = [str(error.strerror), *self._told(error.changes, error.why_not)]
                return Result(notes, _marks(error.changes), code)

    def _show(self, title: str, result: Result, process: str) -> None:
        self._last = result
        if self._setup:
            return
        panels = tuple(
            self._sample(space, name)._replace(marks=tuple(result.marks) if name == process else ())
            for name, space in self._spaces.items()
        )
        self._drawn += sum(len(panel.rows) for panel in panels)
        if self._drawn > _ROWS_AT_MOST:
            raise Malformed(f"all steps together draw more than {_ROWS_AT_MOST} VMAs")
        self.steps.append(Step(title, tuple(self._said), tuple(result.notes), bool(result.failure), panels))
        self._said = []

    def _linux(self, process: str, verb: str) -> AddressSpace:
        space = self._spaces[process]
        if not isinstance(space, AddressSpace):
            raise ValueError(f"{verb} is no operation on a process of Windows")
        return space

    def _name(self, name: str, address: int, length: int) -> None:
        """Let a name stand for an address, and for VMAs that begin in the range."""
        self._names[name] = address
        self._labels.append((address, address + max(length, 1), name))

    def _rule(self, name: str, value: str) -> None:
        if self._spaces:
            raise ValueError("rules come before the first operation")
        old = getattr(self._rules, name, None)
        if name not in {field.name for field in dataclasses.fields(Rules)}:
            raise KeyError(name)
        if name == "overcommit" and value not in ("heuristic", "always", "never"):
            raise ValueError(f"{value!r} is no way to overcommit")
        new: Any = value if isinstance(old, str) else number(value)
        self._rules = dataclasses.replace(self._rules, **{name: new})

    def _expect(self, wanted: str) -> None:
        faults = {*_FAULTS.values(), *windows_script.FAULTS.values()}
        if wanted in faults:
            if self._last.faults != {wanted}:
                seen = ", ".join(sorted(self._last.faults)) or "no touch"
                raise Malformed(f"expected {wanted}, there was {seen}")
            return
        if wanted != "success" and wanted not in (*errno.errorcode.values(), *ERRORS.values()):
            raise ValueError(f"{wanted!r} is no error and no fault ({', '.join(sorted(faults))})")
        if (self._last.failure or "success") != wanted:
            raise Malformed(f"expected {wanted}, there was {self._last.failure or 'success'}")

    # Operations

    def _mmap(self, space: AddressSpace, words: Words) -> Result:
        length = words.number("a length")
        prot = _protection(words.next("a protection"))
        address, flags, file, offset, name = 0, constants.MAP_ANONYMOUS, None, 0, ""
        sharing = constants.MAP_PRIVATE
        for word in words.rest():
            if word == "at":
                address = words.address()
            elif word in _MMAP_FLAGS:
                flags |= _MMAP_FLAGS[word]
            elif word in ("shared", "private"):
                sharing = constants.MAP_SHARED if word == "shared" else constants.MAP_PRIVATE
            elif word == "file":
                file = self._files[words.next("a file")]
                flags &= ~constants.MAP_ANONYMOUS
            elif word == "offset":
                offset = words.number("an offset")
            elif word == "name":
                name = words.name()
            else:
                raise ValueError(f"{word!r} says nothing to mmap")
        outcome = space.mmap(address, length, prot, flags | sharing, file, offset)
        if name:
            self._name(name, outcome.value, length)
        return self._done(f"= {outcome.value:#x}", outcome.changes, outcome.why_not)

    def _munmap(self, space: AddressSpace, words: Words) -> Result:
        address, length = words.range()
        words.end()
        outcome = space.munmap(address, length)
        return self._done("", outcome.changes, outcome.why_not)

    def _mprotect(self, space: AddressSpace, words: Words) -> Result:
        address, length = words.range()
        prot = _protection(words.next("a protection"))
        words.end()
        outcome = space.mprotect(address, length, prot)
        return self._done("", outcome.changes, outcome.why_not)

    def _mremap(self, space: AddressSpace, words: Words) -> Result:
        address, old = words.range()
        new = words.number("the new length")
        flags = target = 0
        for word in words.rest():
            if word == "maymove":
                flags |= constants.MREMAP_MAYMOVE
            elif word == "dontunmap":
                flags |= constants.MREMAP_DONTUNMAP
            elif word == "fixed":
                flags |= constants.MREMAP_FIXED
                target = words.address()
            else:
                raise ValueError(f"{word!r} says nothing to mremap")
        outcome = space.mremap(address, old, new, flags, target)
        return self._done(f"= {outcome.value:#x}", outcome.changes, outcome.why_not)

    def _brk(self, space: AddressSpace, words: Words) -> Result:
        word = words.next("an address, +length or -length")
        words.end()
        now = space.brk(0).value
        sign = {"+": 1, "-": -1}.get(word[0], 0)
        wanted = now + sign * number(word[1:]) if sign else Words([word], self._names).address()
        outcome = space.brk(wanted)
        result = self._done(f"= {outcome.value:#x}", outcome.changes, outcome.why_not)
        if wanted not in (0, outcome.value):  # 0 asks where the break is
            return result._replace(
                notes=[*result.notes, "ENOMEM: the break stays where it was"], failure="ENOMEM"
            )
        return result

    def _madvise(self, space: AddressSpace, words: Words) -> Result:
        address, length = words.range()
        advice = words.next("an advice")
        words.end()
        if advice not in _ADVICE:
            raise ValueError(f"{advice!r} is no advice of {', '.join(_ADVICE)}")
        outcome = space.madvise(address, length, _ADVICE[advice])
        done = self._done("", outcome.changes, outcome.why_not)
        return done if done.marks else done._replace(marks=[(address, address + length)])

    def _touch(self, space: AddressSpace, words: Words) -> Result:
        address, length, write = words.address(), 1, False
        for word in words.rest():
            if word in ("read", "write"):
                write = word == "write"
            else:
                length = max(1, number(word))
        if length > _PAGES_AT_MOST * PAGE_SIZE:
            raise ValueError(f"a touch is of {_PAGES_AT_MOST} pages at most")
        first = address & ~constants.PAGE_MASK
        counts: dict[tuple[FaultKind, str], int] = {}
        changed: list[Change] = []
        last = address
        for page in range(first, address + length, PAGE_SIZE):
            last = max(page, address)
            fault = space.touch(last, write)
            counts[fault.kind, fault.why] = counts.get((fault.kind, fault.why), 0) + 1
            changed += fault.changes
            if fault.errno:
                break
        notes = [
            f"{kind.value}{f' ({count} pages)' if count > 1 else ''}: {why}"
            for (kind, why), count in counts.items()
        ]
        failure = next(
            (kind.value for kind, _ in counts if kind in (FaultKind.SIGSEGV, FaultKind.SIGBUS)), ""
        )
        end = (last & ~constants.PAGE_MASK) + PAGE_SIZE
        return Result(notes, [(first, end)], failure, frozenset(_FAULTS[kind] for kind, _ in counts))

    def _fork(self, process: str, words: Words, text: str) -> None:
        name = words.next("the child's name")
        words.end()
        if name in self._spaces or not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a new process")
        parent = self._linux(process, "fork")
        try:
            self._spaces[name] = parent.fork()
            result = Result([f"{name} has the same VMAs, and private pages until one of the two writes"], [])
        except CallError as error:
            result = Result([str(error.strerror)], [], errno.errorcode[error.errno or 0])
        self._show(text, result, process)

    def _sample(self, space: AddressSpace | WindowsSpace, name: str) -> Sample:
        if isinstance(space, AddressSpace):
            return sample(space, name, self._frames, self._label)
        return windows_sample(space, name, self._label)

    def _label(self, address: int) -> str:
        return next((name for start, end, name in reversed(self._labels) if start <= address < end), "")

    def _done(self, value: str, changed: Iterable[Change], why_not: Iterable[str]) -> Result:
        changed = list(changed)
        told = self._told(changed, why_not)
        notes = [value, *told] if value else told
        return Result(notes or ["no VMA changed"], _marks(changed))

    def _told(self, changed: Iterable[Change], why_not: Iterable[str]) -> list[str]:
        """Write what happened to VMAs and what did not, as few lines."""
        happened = "; ".join(str(change) for change in changed)
        return [line for line in (happened, "; ".join(why_not)) if line]


def _marks(changed: Iterable[Change]) -> list[tuple[int, int]]:
    return [(change.start, change.end) for change in changed if change.end > change.start]


def _protection(word: str) -> int:
    """Read ``rwx``, ``r--``, ``none``."""
    if word == "none":
        return 0
    letters = {"r": constants.PROT_READ, "w": constants.PROT_WRITE, "x": constants.PROT_EXEC, "-": 0}
    if not word or len(word) > 3 or any(letter not in letters for letter in word):
        raise ValueError(f"{word!r} is no protection (r, rw, rx, rwx, none)")
    value = 0
    for letter in word:
        value |= letters[letter]
    return value
