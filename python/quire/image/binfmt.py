"""The rules of ``binfmt_misc``: which program the kernel starts for files of further formats."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

from quire.errors import Malformed, Unsupported

__all__ = ["DIRECTORY", "Rule", "match", "parse", "rules"]

DIRECTORY = "/proc/sys/fs/binfmt_misc"
"""Where the kernel shows the rules of this process's user namespace, or of the nearest one above with any."""

_HEAD_BYTES = 256


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: what it matches, and what it starts."""

    name: str
    interpreter: str
    """Path of the program."""
    enabled: bool
    flags: frozenset[str]
    """P: argv[0] is kept, as an argument of its own. O: the file is handed over open. C: the file's owner
    and capabilities count, not the interpreter's. F: the interpreter was opened when the rule was made, so
    it works where its path leads nowhere."""
    extension: str | None
    """What follows the last dot of the path; None for a rule by content."""
    offset: int
    """Where the content is looked at, in bytes."""
    magic: bytes
    mask: bytes
    """As long as the magic: bits that count."""

    def matches(self, head: bytes, path: str) -> bool:
        """Tell whether the rule is for a file, enabled or not, as the kernel does.

        Args:
            head: Its first 256 bytes, or all of it.
            path: As it was given to ``execve``; all behind its last dot is the extension.
        """
        if self.extension is not None:
            _, dot, extension = path.rpartition(".")
            return bool(dot) and extension == self.extension
        part = head[:_HEAD_BYTES].ljust(_HEAD_BYTES, b"\0")[self.offset : self.offset + len(self.magic)]
        return len(part) == len(self.magic) and all(
            not (have ^ want) & bits for have, want, bits in zip(part, self.magic, self.mask, strict=True)
        )


def rules(directory: str = DIRECTORY) -> list[Rule]:
    """Read the rules of the running system, those that are not enabled too.

    Returns:
        In the order in which the kernel tries them, the newest first. The kernel does not tell the order; it
        is that of the times of their files. Empty if ``binfmt_misc`` as a whole is not enabled.

    Raises:
        Unsupported: They cannot be seen: ``binfmt_misc`` is not in the kernel, not mounted here, or may not
            be read. There may be rules all the same.
        Malformed: A rule is not in the form that is known.
        OSError: Reading failed.
    """
    try:
        with open(os.path.join(directory, "status"), "rb") as file:
            enabled = file.read().strip() == b"enabled"
    except FileNotFoundError as error:
        raise Unsupported(
            f"binfmt_misc is not mounted at {directory}, so its rules cannot be seen; "
            f"mount -t binfmt_misc binfmt_misc {directory} shows them"
        ) from error
    except PermissionError as error:
        raise Unsupported(f"the rules in {directory} may not be read by this user") from error
    if not enabled:
        return []
    found = []
    for name in os.listdir(directory):
        if name in ("register", "status"):
            continue
        path = os.path.join(directory, name)
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                found.append(((status.st_mtime_ns, status.st_ino), parse(name, file.read())))
        except OSError as error:
            # Removed between the listing and now.
            if error.errno != errno.ENOENT:
                raise
    found.sort(key=lambda item: item[0], reverse=True)
    return [rule for _, rule in found]


def match(found: list[Rule], head: bytes, path: str) -> Rule | None:
    """Find the rule that the kernel takes: the first that is enabled and matches; None if there is none.

    Args:
        found: What `rules` returned.
        head: The first 256 bytes of the file, or all of it.
        path: As it was given to ``execve``.
    """
    return next((rule for rule in found if rule.enabled and rule.matches(head, path)), None)


def parse(name: str, text: bytes) -> Rule:
    """Read a rule as the kernel shows it.

    Args:
        name: Of the rule.
        text: What its file holds.

    Raises:
        Malformed: It is not in that form.
    """
    first, *lines = text.decode("utf-8", "surrogateescape").rstrip("\n").split("\n")
    fields = {}
    for line in lines:
        key, blank, value = line.partition(" ")
        if not blank:
            raise Malformed(f"the rule {name} of binfmt_misc has the line {line!r}, which is not known")
        fields[key.removesuffix(":")] = value
    try:
        interpreter, flags = fields["interpreter"], fields["flags"]
        extension = fields["extension"].removeprefix(".") if "extension" in fields else None
        offset = int(fields.get("offset", "0")) if extension is None else 0
        magic = _hex(fields["magic"]) if extension is None else b""
        mask = _hex(fields["mask"]) if "mask" in fields else b"\xff" * len(magic)
    except (KeyError, ValueError) as error:
        raise Malformed(f"the rule {name} of binfmt_misc is not in the known form: {error}") from error
    if first not in ("enabled", "disabled") or len(mask) != len(magic) or offset < 0:
        raise Malformed(f"the rule {name} of binfmt_misc is not in the known form: {text[:80]!r}")
    return Rule(name, interpreter, first == "enabled", frozenset(flags), extension, offset, magic, mask)


def _hex(text: str) -> bytes:
    if not re.fullmatch(r"([0-9a-f]{2})+", text):
        raise ValueError(f"{text[:40]!r} is not hexadecimal")
    return bytes.fromhex(text)
