"""The messages between clients and the broker, and the frames they travel in; no socket in here.

``docs/protocol.md`` is the contract. Decoding trusts nothing: what does not follow it raises Malformed.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec

from quire.broker.rows import BankRow, ClientRow, LeaseRow, ObjectRow
from quire.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "MAX_DESCRIPTORS",
    "MAX_PAYLOAD_BYTES",
    "VERSION",
    "FrameReader",
    "Rights",
    "decode_reply",
    "decode_request",
    "encode",
]

VERSION = 1
MAX_PAYLOAD_BYTES = 1 << 16
MAX_DESCRIPTORS = 64
"""Of one message, in either direction. The kernel's own limit is 253."""
MAX_EXTENTS = 64
"""Of one memory object, so that any lease fits into one message."""
MAX_OUTSTANDING = 16
"""Requests that a client may have sent without having their replies."""
SESSION_BYTES = 32
MAX_NAME_BYTES = 255

_MAGIC = b"QB"
_HEADER = struct.Struct("<2sBBI")
HEADER_BYTES = _HEADER.size


class Rights(enum.IntFlag):
    """What a handle allows. A handle that is passed on has these or fewer."""

    READ = 1
    """Lease for reading, fetch; of a bank: look at it."""
    WRITE = 2
    """Lease for writing, put a version into a factory; of a bank: have things charged to it."""
    SNAPSHOT = 4
    """Take a grant of a snapshot."""
    LEND = 8
    """See who holds leases, and take them back."""
    DESTROY = 16
    PUBLISH = 32
    """Give it a name that others may open."""


ALL_RIGHTS = Rights(63)

U32: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
U63: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 47)]
RightsBits: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=int(ALL_RIGHTS))]
Deadline: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=60_000)]
Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_BYTES, pattern="^[^\\0]*$")]
"""Its length in bytes is looked at as well."""

WHOLE = 2**63 - 1
"""As a length: up to the end."""


class Message(msgspec.Struct, tag_field="t", tag=str.lower, forbid_unknown_fields=True, frozen=True):
    """What every message is: a map whose ``t`` names its type."""


class Request(Message, frozen=True):
    """What a client asks; every one is answered once, by a reply or a Fault with the same ``id``."""

    id: U32


class Hello(Request, frozen=True):
    """The first message of a connection. With ``session`` it goes on with one whose connection broke."""

    version: U32
    session: bytes = b""


class Ping(Request, frozen=True):
    """Ask for nothing."""


class Bye(Request, frozen=True):
    """End the session: handles are given up at once, and leases with them. The reply is the last message."""


class MakeBank(Request, frozen=True):
    """Make a bank below another; needs WRITE on it."""

    bank: U32
    limit_bytes: U63
    limit_objects: U63
    limit_descriptors: U63


class Make(Request, frozen=True):
    """Make memory, zero-filled and allocated; needs WRITE on the bank, which pays."""

    bank: U32
    size_bytes: Size
    extent_bytes: Size = 0
    shared: bool = False
    """Let every holder of WRITE map it writable, for ever. Otherwise only its maker can, until Seal."""


class Seal(Request, frozen=True):
    """Let nobody map the memory writable any more; needs WRITE."""

    handle: U32


class Lease(Request, frozen=True):
    """Lend a range to the asking client; needs READ, or WRITE for a writable one."""

    handle: U32
    offset: U63
    length: U63
    write: bool = False


class Release(Request, frozen=True):
    """Give a range of a lease back; the whole by default. The client has unmapped it."""

    lease: U63
    offset: U63 = 0
    length: U63 = WHOLE


class Holders(Request, frozen=True):
    """Tell who holds leases of the memory; needs LEND."""

    handle: U32


class Revoke(Request, frozen=True):
    """Take a range back from one client, or from all but the asking one; needs LEND."""

    handle: U32
    offset: U63 = 0
    length: U63 = WHOLE
    client: U63 = 0
    deadline_ms: Deadline = 100
    certain: bool = False
    """Move the others and cut the old pages off even if the client says that it complied."""


class Deposit(Request, frozen=True):
    """Leave a snapshot; its layers are the descriptors, top layer first. Needs WRITE on the bank."""

    bank: U32


class Fetch(Request, frozen=True):
    """Ask for the layers of a snapshot; needs READ."""

    handle: U32


class Grant(Request, frozen=True):
    """Take a snapshot over: from now on the bank pays. Needs SNAPSHOT on it and WRITE on the bank."""

    handle: U32
    bank: U32


class MakeFactory(Request, frozen=True):
    """Make a snapshot factory; needs WRITE on the bank."""

    bank: U32


class Put(Request, frozen=True):
    """Make a deposited snapshot the current version; needs WRITE on the factory and READ on the snapshot."""

    handle: U32
    snapshot: U32


class Current(Request, frozen=True):
    """Ask for a handle of a factory's current snapshot, and its layers; needs READ."""

    handle: U32


class Subscribe(Request, frozen=True):
    """Be told of new versions by Version events, the newest only if they come fast; needs READ."""

    handle: U32
    on: bool = True


class Publish(Request, frozen=True):
    """Give a handle a name; needs PUBLISH and every right in ``rights``."""

    handle: U32
    name: Name
    rights: RightsBits
    users: list[int] | None = None
    """Who may open it, by user id; None is everybody."""


class Unpublish(Request, frozen=True):
    """Withdraw a name; needs PUBLISH on what it names."""

    handle: U32
    name: Name


class Open(Request, frozen=True):
    """Ask for a handle of what a name stands for."""

    name: Name


class Weaken(Request, frozen=True):
    """Make a second handle of the same object with fewer rights."""

    handle: U32
    rights: RightsBits


class Export(Request, frozen=True):
    """Ask for a descriptor that stands for the object, to be passed to another process."""

    handle: U32
    rights: RightsBits


class Import(Request, frozen=True):
    """Show such a descriptor, and be given a handle."""


class Describe(Request, frozen=True):
    """Ask what a handle stands for."""

    handle: U32


class Close(Request, frozen=True):
    """Give a handle up."""

    handle: U32


class Destroy(Request, frozen=True):
    """End an object, or a bank with all that it pays for; needs DESTROY."""

    handle: U32
    deadline_ms: Deadline = 100


class LimitBank(Request, frozen=True):
    """Change the limits of a bank; needs DESTROY on it."""

    handle: U32
    limit_bytes: U63
    limit_objects: U63
    limit_descriptors: U63


class List(Request, frozen=True):
    """Tell of everything that there is, in the order of the numbers; for administrators."""

    what: str
    """``clients``, ``banks``, ``objects`` or ``leases``."""
    after: U63 = 0


class Administer(Request, frozen=True):
    """Make a handle of what has a number in `List`, to end it or take it back; for administrators."""

    number: U63


class Acknowledge(Message, frozen=True):
    """Tell that what an event asked for is done, or that it cannot be. No reply."""

    serial: U63
    done: bool = True


ClientMessage: TypeAlias = (
    Hello
    | Ping
    | Bye
    | MakeBank
    | Make
    | Seal
    | Lease
    | Release
    | Holders
    | Revoke
    | Deposit
    | Fetch
    | Grant
    | MakeFactory
    | Put
    | Current
    | Subscribe
    | Publish
    | Unpublish
    | Open
    | Weaken
    | Export
    | Import
    | Describe
    | Close
    | Destroy
    | LimitBank
    | List
    | Administer
    | Acknowledge
)


WITH_DESCRIPTORS = (Deposit, Import)
"""Requests that descriptors may come with; with others they end the connection."""


class Reply(Message, frozen=True):
    """What answers a request."""

    id: int


class Welcome(Reply, frozen=True):
    """Answers Hello."""

    version: int
    session: bytes
    client: int
    bank: int
    resumed: bool


class Done(Reply, frozen=True):
    """Answers what has nothing to tell."""


class Handle(Reply, frozen=True):
    """Answers what makes a handle."""

    handle: int
    rights: int


class Leased(Reply, frozen=True):
    """Answers Lease; one descriptor for each extent, in order."""

    lease: int
    size_bytes: int
    extent_bytes: int
    first: int
    extents: list[int]
    sealed: bool


class Layers(Reply, frozen=True):
    """Answers Fetch and Current; the descriptors are the layers, top layer first."""

    handle: int
    version: int = 0


class Holder(msgspec.Struct, frozen=True):
    """One lease, as Holders tells of it."""

    client: int
    pid: int
    uid: int
    offset: int
    length: int
    write: bool
    connected: bool


class HolderList(Reply, frozen=True):
    """Answers Holders."""

    holders: list[Holder]
    more: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """What a revocation did to one client."""

    client: int
    result: str
    """``released``: it said so and ``/proc`` shows it; ``acknowledged``: it said so and that could not be
    looked at; ``cut``: it did not, and its pages were cut off; ``kept``: it did not, and there was no memory
    to move the others to."""
    offset: int
    length: int
    why: str = ""
    ended: str = ""
    """What was done to the client besides: ``disconnected``, ``killed`` or nothing."""


class Revoked(Reply, frozen=True):
    """Answers Revoke and Destroy."""

    outcomes: list[Outcome]
    freed_bytes: int = 0
    moved_bytes: int = 0


class Description(Reply, frozen=True):
    """Answers Describe; ``kind`` is the broker's own word, so a factory is one."""

    kind: str
    rights: int
    size_bytes: int = 0
    sealed: bool = False
    version: int = 0
    used: list[int] = []
    limit: list[int] = []


class Listed(Reply, frozen=True):
    """Answers List: rows of the kind that was asked for."""

    clients: list[ClientRow] = []
    banks: list[BankRow] = []
    objects: list[ObjectRow] = []
    leases: list[LeaseRow] = []
    more: bool = False


class Fault(Reply, frozen=True):
    """Answers a request that failed; nothing was changed unless the document says so."""

    fault: str
    message: str
    errno: int = 0


class RevokeEvent(Message, frozen=True, tag="revoke!"):
    """Unmap a range of a lease, close its descriptors and acknowledge, within the deadline."""

    serial: int
    lease: int
    offset: int
    length: int
    deadline_ms: int


class HoldEvent(Message, frozen=True, tag="hold!"):
    """Stop writing to an extent until it was moved, and acknowledge."""

    serial: int
    extent: int


class MoveEvent(Message, frozen=True, tag="move!"):
    """Map the one descriptor over every mapping of the extent, writable ones or the others; acknowledge.

    ``huge``: it consists of huge pages, as many as fit.
    """

    serial: int
    extent: int
    write: bool
    huge: bool = False


class UnholdEvent(Message, frozen=True, tag="unhold!"):
    """Go on writing to an extent; no acknowledgement."""

    extent: int


class VersionEvent(Message, frozen=True, tag="version!"):
    """A factory has a new version."""

    handle: int
    version: int


class CutEvent(Message, frozen=True, tag="cut!"):
    """A range of a lease was cut off; touching it is SIGBUS unless it is unmapped."""

    lease: int
    offset: int
    length: int


ServerMessage: TypeAlias = (
    Welcome
    | Done
    | Handle
    | Leased
    | Layers
    | HolderList
    | Revoked
    | Description
    | Listed
    | Fault
    | RevokeEvent
    | HoldEvent
    | MoveEvent
    | UnholdEvent
    | VersionEvent
    | CutEvent
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_replies: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)


def encode(message: Message, descriptors: int = 0) -> bytes:
    """Write a frame.

    Args:
        message: Any message.
        descriptors: How many go with the first byte of the frame.

    Raises:
        ValueError: The message is longer than a frame may be.
    """
    payload = _encoder.encode(message)
    if len(payload) > MAX_PAYLOAD_BYTES or descriptors > MAX_DESCRIPTORS:
        raise ValueError(f"a message of {len(payload)} bytes with {descriptors} descriptors is too long")
    return _HEADER.pack(_MAGIC, VERSION, descriptors, len(payload)) + payload


def tag(message: Message) -> str:
    """What a message is called on the wire."""
    return message.__struct_config__.tag  # type: ignore[return-value]


def decode_request(payload: bytes | bytearray) -> ClientMessage:
    """Read what a client sent.

    Raises:
        Malformed: It is no message, or a number in it is out of its range.
    """
    try:
        message = _requests.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"no message: {error}") from error
    name = getattr(message, "name", "")
    if len(name) * 4 > MAX_NAME_BYTES and len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise Malformed(f"a name has at most {MAX_NAME_BYTES} bytes")
    return message


def decode_reply(payload: bytes | bytearray) -> ServerMessage:
    """Read what the broker sent.

    Raises:
        Malformed: It is no message.
    """
    try:
        return _replies.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"no message of a broker: {error}") from error


class FrameReader:
    """Cuts a stream of bytes and descriptors into frames; it owns the descriptors until they are taken."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._data = bytearray()
        self.descriptors: deque[int] = deque()

    @property
    def partial(self) -> bool:
        """Whether a frame was begun and not finished."""
        return bool(self._data)

    @property
    def missing_bytes(self) -> int:
        """How many bytes the header, or the frame that it begins, is short of."""
        if len(self._data) < HEADER_BYTES:
            return HEADER_BYTES - len(self._data)
        length: int = _HEADER.unpack_from(self._data)[3]
        return HEADER_BYTES + length - len(self._data)

    def feed(self, data: bytes, descriptors: list[int]) -> None:
        """Add what one system call gave."""
        self._data += data
        self.descriptors.extend(descriptors)

    def take(self) -> tuple[bytearray, list[int]] | None:
        """Take the next frame that is complete; None if there is none yet.

        Returns:
            Its payload, and its descriptors, which are the caller's from then on.

        Raises:
            Malformed: The bytes are no frames, or descriptors and frames disagree. The stream is of no use
                any more.
        """
        data = self._data
        if len(data) >= HEADER_BYTES:
            magic, version, count, length = _HEADER.unpack_from(data)
            if magic != _MAGIC or version != VERSION:
                raise Malformed(
                    f"a frame starts with {_MAGIC!r} and version {VERSION}, not {magic!r}, {version}"
                )
            if length > MAX_PAYLOAD_BYTES or count > MAX_DESCRIPTORS:
                raise Malformed(f"a frame announces {length} bytes and {count} descriptors; that is too much")
            end = HEADER_BYTES + length
            if len(data) >= end:
                if len(self.descriptors) < count:
                    raise Malformed(f"a frame announces {count} descriptors, {len(self.descriptors)} came")
                payload = data[HEADER_BYTES:end]
                del data[:end]
                return payload, [self.descriptors.popleft() for _ in range(count)] if count else []
        if self.descriptors and (len(self.descriptors) > MAX_DESCRIPTORS or not data):
            raise Malformed(f"{len(self.descriptors)} descriptors came that no frame announces")
        return None

    def frames(self) -> Iterator[tuple[bytearray, list[int]]]:
        """Take all frames that are complete, as `take` does."""
        while (frame := self.take()) is not None:
            yield frame
