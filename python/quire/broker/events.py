"""The broker's log: one event a line, as JSON or as text, written by a thread that nobody has to wait for."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import os
import queue
import select
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from quire.broker import protocol
from quire.broker.banks import Bank

if TYPE_CHECKING:
    from quire.broker.sessions import Session

__all__ = ["JsonFormatter", "TextFormatter", "carried_out", "client_fields", "start", "tell"]

_log = logging.getLogger("quire.broker")
_CAPACITY = 4096
_END_SECONDS = 2.0
_TOGETHER_SECONDS = 0.005
_NOT_LOGGED = {"id", "session", "rights", "users"}
_ROUTINE = {
    protocol.Ping,
    protocol.Bye,
    protocol.Describe,
    protocol.Lease,
    protocol.Release,
    protocol.Fetch,
    protocol.Current,
    protocol.Holders,
    protocol.Subscribe,
    protocol.Weaken,
    protocol.Close,
    protocol.List,
}
"""Requests that are told of at the level debug: they come by thousands and change little."""


def client_fields(session: Session) -> dict[str, Any]:
    """What a line says of who asked."""
    return {"client": session.number, "pid": session.pid, "uid": session.uid}


def carried_out(session: Session, message: protocol.Request, reply: protocol.Reply) -> None:
    """Log a request that was carried out, with the client, the object and its bank."""
    level = logging.DEBUG if type(message) in _ROUTINE else logging.INFO
    if not _log.isEnabledFor(level):
        return
    fields = client_fields(session)
    handle = reply.handle if isinstance(reply, protocol.Handle) else getattr(message, "handle", 0)
    grip = session.grips.get(handle)
    if grip is not None:
        if isinstance(grip.target, Bank):
            fields["bank"] = grip.target.number
        else:
            fields["object"] = grip.target.number
            fields["kind"] = grip.target.kind
            fields["bank"] = grip.target.bank.number
    for name in message.__struct_fields__:
        if name not in _NOT_LOGGED and name not in ("handle", "bank"):
            # Named apart from what the broker knows itself: it is what the client said.
            fields[f"asked_{name}"] = getattr(message, name)
    if isinstance(reply, protocol.Revoked):
        fields["freed_bytes"] = reply.freed_bytes
        fields["moved_bytes"] = reply.moved_bytes
        fields["outcomes"] = [
            {"client": each.client, "result": each.result, "why": each.why, "ended": each.ended}
            for each in reply.outcomes
        ]
    # Without `log`, which looks for the line that called it.
    record = logging.LogRecord(_log.name, level, __file__, 0, protocol.tag(message), None, None)
    record.fields = fields
    _log.handle(record)


# `json.dumps` with arguments makes one each time.
_ENCODER = json.JSONEncoder(default=repr)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``event``, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a line; text of clients is escaped, so it cannot make lines of its own."""
        time = dt.datetime.fromtimestamp(record.created, dt.UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _ENCODER.encode(line)


class TextFormatter(logging.Formatter):
    """The same for people: the event, then its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a line."""
        fields = getattr(record, "fields", {})
        words = [f"{name}={json.dumps(value, default=repr)}" for name, value in fields.items()]
        line = " ".join([f"quire broker: {record.levelname} {record.getMessage()}", *words])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Handler(logging.Handler):
    """Hands records to the thread that writes them. What does not fit is counted, never waited for.

    A client that makes events faster than they can be written must not stop the broker, nor fill its memory.
    In an event loop the thread is woken a few milliseconds later, for all that has come until then: to be
    woken for each would keep the loop waiting for the interpreter's lock.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.waiting: deque[logging.LogRecord] = deque()
        # True is to look at what waits, False to do so once more and end.
        self.wakes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._capacity = capacity
        self._lost = 0
        self._told = False

    def emit(self, record: logging.LogRecord) -> None:
        """Let a record wait, or count it."""
        if len(self.waiting) >= self._capacity:
            self._lost += 1
            return
        if self._lost:
            text = f"{self._lost} events were lost: they came faster than they could be written"
            self.waiting.append(
                logging.LogRecord(record.name, logging.WARNING, __file__, 0, text, None, None, "emit")
            )
            self._lost = 0
        self.waiting.append(record)
        if not self._told:
            self._told = True
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                self._wake()
            else:
                loop.call_later(_TOGETHER_SECONDS, self._wake)

    def _wake(self) -> None:
        self._told = False
        self.wakes.put(True)


class _Stream:
    """A descriptor to write to, without a buffer: one would be waited for when the interpreter ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> None:
        """Write all of it; blocks as long as nobody reads."""
        rest = text.encode("utf-8", "backslashreplace")
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                poller = select.poll()
                poller.register(self._descriptor, select.POLLOUT)
                poller.poll()

    def flush(self) -> None:
        """Nothing is held back."""


class Writer:
    """The thread that writes the log."""

    def __init__(self, source: _Handler, handler: logging.Handler) -> None:
        """Begin."""
        self._source = source
        self._handler = handler
        self._thread = threading.Thread(target=self._run, name="quire-log", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        more = True
        while more:
            more = self._source.wakes.get()
            while self._source.waiting:
                self._handler.handle(self._source.waiting.popleft())

    def stop(self) -> None:
        """Wait until everything is written, or until nobody has read for 2 seconds."""
        self._source.wakes.put(False)
        self._thread.join(_END_SECONDS)


def start(descriptor: int, *, form: str, level: str, capacity: int = _CAPACITY) -> Writer:
    """Begin to write the log.

    Args:
        descriptor: Where to; stays the caller's, and must stay open.
        form: ``json`` or ``text``.
        level: The least level that is written: ``debug``, ``info``, ``warning`` or ``error``.
        capacity: How many events may wait to be written; those that come then are counted and lost.

    Returns:
        The thread that writes, to be stopped at the end.
    """
    handler = logging.StreamHandler(_Stream(descriptor))
    handler.setFormatter(_formatter(form))
    # One thread uses it. The end of the interpreter would wait for a lock that it holds while nobody reads.
    handler.lock = None
    source = _Handler(capacity)
    _log.handlers = [source]
    _log.setLevel(level.upper())
    _log.propagate = False
    return Writer(source, handler)


def tell(descriptor: int, form: str, event: str) -> None:
    """Write one event at once, at the level error; if that would block, it is lost."""
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)
    if any(ready & select.POLLOUT for _, ready in poller.poll(0)):
        record = logging.LogRecord(_log.name, logging.ERROR, __file__, 0, event, None, None, "tell")
        # A pipe that is ready takes a line without blocking.
        os.write(descriptor, f"{_formatter(form).format(record)}\n".encode())


def _formatter(form: str) -> logging.Formatter:
    return JsonFormatter() if form == "json" else TextFormatter()
