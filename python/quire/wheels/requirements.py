"""Which wheels of a folder meet a list of requirements. No network."""

from __future__ import annotations

import os
import sys
import zipfile
from typing import TYPE_CHECKING, NamedTuple

import resolvelib
from packaging.metadata import parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from packaging.metadata import RawMetadata
    from packaging.tags import Tag
    from packaging.version import Version

__all__ = ["Unresolvable", "read_requirements", "resolve"]


class Unresolvable(LookupError):  # noqa: N818 - as in quire.errors
    """The wheels of the folder do not meet the requirements; the message says what is missing."""


def read_requirements(path: str, above: tuple[str, ...] = ()) -> list[str]:
    """Read a requirements file: one requirement a line, comments, ``-r`` of other files, continued lines.

    Args:
        path: Of the file.
        above: The files that include this one.

    Returns:
        The requirements as they are written.

    Raises:
        OSError: It cannot be read.
        ValueError: It has an option other than ``-r``, or includes itself; the message has the line's number.
    """
    if os.path.realpath(path) in above:
        raise ValueError(f"{path}: includes itself")
    found: list[str] = []
    pending = ""
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            text = pending + line.rstrip("\r\n")
            if text.endswith("\\"):
                pending = text[:-1]
                continue
            pending = ""
            # As for pip, a comment begins at a # after white space or at the start.
            text = next(iter(f" {text}".split(" #")), "").strip()
            option, _, rest = text.partition("=" if text.startswith("--requirement=") else " ")
            if option in {"-r", "--requirement"}:
                other = os.path.join(os.path.dirname(path), rest.strip())
                found += read_requirements(other, (*above, os.path.realpath(path)))
            elif text.startswith("-") or " --" in text:
                raise ValueError(f"{path}:{number}: {text!r}: no option is supported but -r")
            elif text:
                found.append(text)
    if pending.strip():
        found.append(pending.strip())
    return found


class _Wheel(NamedTuple):
    """A wheel that runs here."""

    path: str
    name: str
    version: Version
    order: tuple[object, ...]


class _Candidate(NamedTuple):
    """A wheel, and the extras of it that are wanted."""

    wheel: _Wheel
    extras: frozenset[str]


class _Folder:
    """The wheels of a folder."""

    def __init__(self, folder: str) -> None:

        self.path = folder
        self.wheels: dict[str, list[_Wheel]] = {}
        """By name, the best first: newest version, then the tag that this interpreter likes most."""
        self.refused: dict[str, list[str]] = {}
        """Wheels for something else, and names that are none, by the name of the project."""
        ranks: dict[Tag, int] = {tag: -rank for rank, tag in enumerate(sys_tags())}
        for base in sorted(os.listdir(folder)):
            if not base.endswith(".whl"):
                continue
            try:
                name, version, build, tags = parse_wheel_filename(base)
            except InvalidWheelFilename as error:
                raise ValueError(f"{os.path.join(folder, base)}: {error}") from error
            fitting = [ranks[tag] for tag in tags if tag in ranks]
            path = os.path.join(folder, base)
            if fitting:
                order = version, max(fitting), build
                self.wheels.setdefault(name, []).append(_Wheel(path, name, version, order))
            else:
                self.refused.setdefault(name, []).append(f"{base} is for another interpreter or system")
        for wheels in self.wheels.values():
            wheels.sort(key=lambda wheel: wheel.order, reverse=True)

    def explain(self, requirement: Requirement) -> str:
        """Say what there is of the name of a requirement that nothing meets."""
        name = canonicalize_name(requirement.name)
        there = [os.path.basename(wheel.path) for wheel in self.wheels.get(name, [])]
        return "; ".join(there + self.refused.get(name, [])) or "no wheel of this name"


def _metadata(path: str) -> RawMetadata:
    """Read what a wheel says of itself. Raises ValueError if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(
                name
                for name in archive.namelist()
                if name.endswith(".dist-info/METADATA") and name.count("/") == 1
            )
            return parse_email(archive.read(member))[0]
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        reason = str(error) or "it has no *.dist-info/METADATA"
        raise ValueError(f"{path} cannot be read as a wheel: {reason}") from error


_Identifier = tuple[str, frozenset[str]]


class _Provider(resolvelib.AbstractProvider[Requirement, _Candidate, _Identifier]):
    """Answers the questions of resolvelib about the wheels of a folder."""

    def __init__(self, folder: _Folder) -> None:
        self._folder = folder
        self._metadata: dict[str, RawMetadata] = {}

    def _metadata_of(self, wheel: _Wheel) -> RawMetadata:
        if wheel.path not in self._metadata:
            self._metadata[wheel.path] = _metadata(wheel.path)
        return self._metadata[wheel.path]

    def identify(self, requirement_or_candidate: Requirement | _Candidate) -> _Identifier:

        if isinstance(requirement_or_candidate, _Candidate):
            return requirement_or_candidate.wheel.name, requirement_or_candidate.extras
        extras = frozenset(map(canonicalize_name, requirement_or_candidate.extras))
        return canonicalize_name(requirement_or_candidate.name), extras

    def get_preference(
        self,
        identifier: _Identifier,
        resolutions: object,
        candidates: object,
        information: Mapping[_Identifier, Iterator[object]],
        backtrack_causes: object,
    ) -> tuple[int, str]:
        del resolutions, candidates, backtrack_causes
        return -sum(1 for _ in information[identifier]), identifier[0]

    def find_matches(
        self,
        identifier: _Identifier,
        requirements: Mapping[_Identifier, Iterator[Requirement]],
        incompatibilities: Mapping[_Identifier, Iterator[_Candidate]],
    ) -> list[_Candidate]:
        name, extras = identifier
        wanted = list(requirements[identifier])
        refused = {candidate.wheel.path for candidate in incompatibilities[identifier]}
        found = [
            _Candidate(wheel, extras)
            for wheel in self._folder.wheels.get(name, [])
            if wheel.path not in refused
            and all(requirement.specifier.contains(wheel.version, prereleases=True) for requirement in wanted)
            and self._runs_here(wheel)
        ]
        # Pre-releases only if somebody asks for one or there is nothing else, as everywhere.
        asked = any(requirement.specifier.prereleases for requirement in wanted)
        final = [candidate for candidate in found if not candidate.wheel.version.is_prerelease]
        return found if asked or not final else final

    def _runs_here(self, wheel: _Wheel) -> bool:

        python = ".".join(map(str, sys.version_info[:3]))
        return SpecifierSet(self._metadata_of(wheel).get("requires_python", "")).contains(python, True)

    def is_satisfied_by(self, requirement: Requirement, candidate: _Candidate) -> bool:
        return requirement.specifier.contains(candidate.wheel.version, prereleases=True)

    def get_dependencies(self, candidate: _Candidate) -> Iterable[Requirement]:

        wheel, extras = candidate
        metadata = self._metadata_of(wheel)
        if extras:
            known = set(map(canonicalize_name, metadata.get("provides_extra", [])))
            if unknown := sorted(extras - known):
                raise Unresolvable(f"{os.path.basename(wheel.path)} has no extra {', '.join(unknown)}")
            yield Requirement(f"{wheel.name}=={wheel.version}")
        for text in metadata.get("requires_dist", []):
            requirement = Requirement(text)
            if _applies(requirement, extras):
                yield requirement


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Tell whether a requirement's marker holds here, for no extra or one of these."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def resolve(requirements: Sequence[str], folder: str) -> list[str]:
    """Choose wheels of a folder that meet requirements, and the requirements of what is chosen.

    Markers, extras, versions and ``Requires-Python`` count; of several choices the newest version that all
    agree on is taken.

    Args:
        requirements: As in a requirements file, without URLs.
        folder: A folder of wheels.

    Returns:
        Paths of wheels, what is needed after what needs it.

    Raises:
        Unresolvable: Something is missing, or nothing suits everybody.
        ValueError: A requirement, or a wheel, cannot be understood.
        OSError: The folder cannot be read.
    """
    wanted = []
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise ValueError(f"{text!r} is no requirement: {error}") from error
        if requirement.url:
            raise ValueError(f"{text!r}: a URL; only wheels of the folder are used")
        if _applies(requirement, ()):
            wanted.append(requirement)
    wheels = _Folder(folder)
    reporter: resolvelib.BaseReporter[Requirement, _Candidate, _Identifier] = resolvelib.BaseReporter()
    resolver = resolvelib.Resolver(_Provider(wheels), reporter)
    try:
        result = resolver.resolve(wanted, max_rounds=10_000)
    except resolvelib.ResolutionImpossible as error:
        lines = []
        for cause in error.causes:
            by = (
                f"{cause.parent.wheel.name} {cause.parent.wheel.version}"
                if cause.parent
                else "the requirements"
            )
            lines.append(
                f"  {cause.requirement}, needed by {by}: there is {wheels.explain(cause.requirement)}"
            )
        text = "\n".join(dict.fromkeys(lines))
        raise Unresolvable(f"the wheels of {folder} do not meet all requirements:\n{text}") from error
    return list(dict.fromkeys(candidate.wheel.path for candidate in result.mapping.values()))
