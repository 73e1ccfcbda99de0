"""``#!`` lines, by the kernel's rules (``fs/binfmt_script.c``). docs/images.md tells them; tests run them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quire.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HEAD_BYTES", "LEVELS_MAX", "Script", "is_script", "parse"]

HEAD_BYTES = 256
"""Of a file's start the kernel looks at so many bytes; a line may use all but the last."""
LEVELS_MAX = 5
"""Interpreters of interpreters: so many are followed to a program; one more is ELOOP."""

_BLANKS = b" \t"


class Script(NamedTuple):
    """What a ``#!`` line says. Bytes, because that is what paths are."""

    interpreter: bytes
    """Path of the program that is run, from the current directory if it is relative. It may be empty, which
    is that directory."""
    argument: bytes | None
    """The one argument, blanks inside of it included; None if there is none."""

    def argv(self, path: bytes, arguments: Sequence[bytes] = ()) -> list[bytes]:
        """List the interpreter's arguments when the script is started.

        Args:
            path: As it was given to ``execve``.
            arguments: Those of the script, without its ``argv[0]``, which is lost.
        """
        own = [] if self.argument is None else [self.argument]
        return [self.interpreter, *own, path, *arguments]


def is_script(head: bytes) -> bool:
    """Tell by a file's first bytes whether the kernel takes it for a script."""
    return head[:2] == b"#!"


def parse(head: bytes, name: str = "the script") -> Script:
    """Read a ``#!`` line.

    Args:
        head: The first 256 bytes of the file, or all of a shorter one. What is behind them is ignored.
        name: For messages.

    Raises:
        Malformed: The kernel would refuse it (ENOEXEC): there is no interpreter in the line, or its path is
            cut off by the end of the 256 bytes.
    """
    if not is_script(head):
        raise Malformed(f"{name}: it does not begin with #!")
    # As the kernel's buffer: zeros behind a short file, and the last byte is never part of the line.
    buffer = head[:HEAD_BYTES].ljust(HEAD_BYTES, b"\0")
    end = buffer.find(b"\n")
    if end < 0:
        rest = buffer[2:].lstrip(_BLANKS)
        if not rest:
            raise Malformed(f"{name}: there is no interpreter in the first {HEAD_BYTES} bytes of the #! line")
        if not any(blank in rest for blank in b" \t\0"):
            raise Malformed(f"{name}: the path of the interpreter is cut off after {HEAD_BYTES - 1} bytes")
        end = HEAD_BYTES - 1
    # Blanks before a newline go; those before the end of a file without one stay, as zeros are behind them.
    line = buffer[2:end].rstrip(_BLANKS).lstrip(_BLANKS)
    if not line:
        raise Malformed(f"{name}: there is no interpreter in the #! line")
    length = next((at for at, byte in enumerate(line) if byte in b" \t\0"), len(line))
    interpreter, rest = line[:length], line[length:]
    # A zero ends the name, and then there is no argument.
    if rest[:1] in (b"", b"\0"):
        return Script(interpreter, None)
    return Script(interpreter, rest.lstrip(_BLANKS).partition(b"\0")[0])
