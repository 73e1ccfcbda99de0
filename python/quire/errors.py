"""Every exception of quire, sorted by whose fault it is.

::

    Exception
    └── QuireError
        ├── the other side's fault: it sent, saved or withdrew something
        │   ├── NotImmutable    the kernel does not guarantee that the bytes stay as they are
        │   ├── Malformed       bytes or descriptors that do not follow the written formats
        │   ├── Stalled         a peer stopped in the middle of a message (also a TimeoutError)
        │   ├── PageError       a page could not be filled by its source
        │   ├── Revoked         the lender took the memory back
        │   └── SandboxError    code in a sandbox did not return
        ├── nobody's fault: two sides were right and cannot both win
        │   ├── Conflict        both changed the same bytes
        │   └── QuotaExceeded   the account that would pay has too little left
        ├── the caller's fault: an object used where it cannot work
        │   └── ForkedError     a forked child called what only the maker of the object can do
        └── the machine's fault
            └── Unsupported     the kernel or its settings lack something; the message says which

Plain misuse is a ``ValueError`` or ``TypeError``. A system call that fails for a reason of its own stays
an ``OSError`` whose message names the call. Closing memory that still has views is a ``BufferError``, as
``mmap`` has it.

The native core imports these classes from here, so this module imports nothing of quire.
"""

# A name says what happened; that it is an error shows where it is raised.
# ruff: noqa: N818

__all__ = [
    "Conflict",
    "ForkedError",
    "Malformed",
    "NotImmutable",
    "PageError",
    "QuireError",
    "QuotaExceeded",
    "Revoked",
    "SandboxError",
    "Stalled",
    "Unsupported",
]


class QuireError(Exception):
    """What every exception of quire's own is."""


class NotImmutable(QuireError):
    """The kernel does not guarantee that these bytes stay as they are.

    A descriptor lacks a seal, is no memfd, or the object is one that is meant to change. The content may be
    right at this moment; nothing may be concluded from that.
    """


class Malformed(QuireError):
    """Bytes or descriptors from outside do not follow the formats of ``docs/formats.md``.

    After it was raised by a receive, the stream is out of step: close the socket.
    """


class Stalled(QuireError, TimeoutError):
    """A peer stopped in the middle of a message.

    The stream is out of step: close the socket. Waiting for a message to *begin* never raises this.
    """


class PageError(QuireError):
    """A page could not be filled: its source failed, gave too little, or gave what does not verify."""


class Revoked(QuireError):
    """The memory was lent and has been taken back."""


class Conflict(QuireError):
    """Both sides changed the same bytes, so neither may win silently."""


class QuotaExceeded(QuireError):
    """The account that would pay for this memory has too little left."""


class ForkedError(QuireError):
    """A forked child called what only the process that made the object can do.

    The child has its data as a private copy and can read and write it.
    """


class Unsupported(QuireError):
    """The kernel or its settings lack something that this call needs; the message says which."""


class SandboxError(QuireError):
    """Code in a sandbox did not return: it raised, ran out of time or memory, died, or answered with garbage.

    All that it had is gone; what it used is accounted for.

    Attributes:
        reason: "raised", "timeout", "memory", "cpu", "killed" (it died or left without an answer), "answer"
            (what it answered is refused) or "start" (an import, an input or the function failed before its
            doors were shut).
        usage: What it used, a ``quire.sandbox.Usage``; None if it never began.
        stdout: What it printed, cut.
        stderr: The same of its standard error; for "raised" with the traceback.
    """

    reason: str
    usage: object
    stdout: str
    stderr: str

    def __init__(
        self,
        message: str,
        *,
        reason: str = "killed",
        usage: object = None,
        stdout: str = "",
        stderr: str = "",
    ) -> None:
        """Keep what is known of the end."""
        super().__init__(message)
        self.reason = reason
        self.usage = usage
        self.stdout = stdout
        self.stderr = stderr
