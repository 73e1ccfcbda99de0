"""The daemon: accepts clients, orders their requests, and goes on after a restart where it was."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import stat
import sys
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from quire.ancillary import discard
from quire.broker import events, guardian, protocol
from quire.broker.banks import UNLIMITED, Amount
from quire.broker.connection import Connection, Limits
from quire.broker.crashpoints import crash_point
from quire.broker.factory import Announcer
from quire.broker.guarding import Guarding
from quire.broker.journal import Journal
from quire.broker.keeper import Keeper, inherited
from quire.broker.metrics import Counters, exporting
from quire.broker.penalties import Penalties
from quire.broker.protocol import Rights
from quire.broker.recovery import restore
from quire.broker.requests import Requests
from quire.broker.revocation import Revoker
from quire.broker.sessions import digest
from quire.broker.turns import Turns
from quire.broker.world import World
from quire.errors import Malformed, NotImmutable, QuotaExceeded, Revoked, Unsupported

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from quire.broker.banks import Bank
    from quire.broker.config import Config
    from quire.broker.objects import Extent
    from quire.broker.requests import Answer
    from quire.broker.sessions import Session

__all__ = ["Server", "serve"]

_log = logging.getLogger("quire.broker")
_REPLIES = 2 * protocol.MAX_OUTSTANDING
_FOR_CONNECTIONS = 1024
_ACCEPT_AGAIN_SECONDS = 0.1
_ACCEPT_AT_ONCE = 2
_SWITCH_SECONDS = 0.00002

_FAULTS: list[tuple[type[BaseException], str]] = [
    (QuotaExceeded, "quota"),
    (NotImmutable, "notimmutable"),
    (Malformed, "malformed"),
    (Revoked, "revoked"),
    (Unsupported, "unsupported"),
    (FileExistsError, "exists"),
    (LookupError, "unknown"),
    (TypeError, "invalid"),
    (ValueError, "invalid"),
]


def fault_of(error: Exception) -> tuple[str, int] | None:
    """Say which fault an exception is, and its errno; None for one that is a bug."""
    if isinstance(error, PermissionError) and error.errno is None:
        return "denied", 0
    for kind, word in _FAULTS:
        if isinstance(error, kind):
            return word, 0
    if isinstance(error, OSError):
        return "kernel", error.errno or errno.EIO
    return None


class Server:
    """The broker, inside an event loop."""

    def __init__(
        self, listener: socket.socket, config: Config, keeper: Keeper, found: dict[str, int]
    ) -> None:
        """Restore what was, and prepare to serve; `start` begins.

        Args:
            listener: A listening Unix stream socket; belongs to the server from now on.
            config: The limits.
            keeper: Keeps descriptors.
            found: What it had kept.

        Raises:
            Malformed: The journal that was kept is damaged from its start.
            OSError: The kernel refused.
        """
        self._listener = listener
        self._config = config
        self.world = World(Journal(keeper, found), keeper)
        self._moving = restore(self.world, found)
        self._root = next((bank for bank in self.world.banks.values() if bank.parent is None), None) or (
            self.world.make_bank(None, UNLIMITED, "root")
        )
        self._clients = self._bank("clients", self._client_limit())
        reserve = self._bank("reserve", Amount(config.reserve_bytes, 0, 64))
        self.revoker = Revoker(self.world, reserve, move_ms=config.move_ms, policy=config.policy)
        self.announcer = Announcer(self.world)
        self._turns = Turns()
        self._requests = Requests(self.world, self.revoker, self.announcer, self._turns, config)
        self.world.reclaim = lambda memory: self._spawned(self.revoker.reclaim(memory))
        self.world.announce = self.announcer.announce
        self.world.commit()
        self._limits = Limits(
            rate=config.rate,
            handles=config.handles,
            leases=config.leases,
            names=config.names,
            connections=config.connections,
            frame_seconds=config.frame_seconds,
        )
        self.counters = Counters()
        self._connections: set[Connection] = set()
        self._by_user: Counter[int] = Counter()
        self._queues: dict[Connection, deque[tuple[protocol.Request, list[int]]]] = {}
        self._busy: set[Connection] = set()
        self._tasks: set[Awaitable[object]] = set()
        self._came_back = asyncio.Event()
        self._most = 2 * config.connections
        self._penalties = Penalties()

    def _bank(self, name: str, limit: Amount) -> Bank:
        """A bank of the broker's own, below the root; its limit is what the configuration says now."""
        for bank in self._root.children:
            if bank.name == name:
                bank.limit = limit
                self.world.put_bank(bank)
                return bank
        return self.world.make_bank(self._root, limit, name)

    def _client_limit(self) -> Amount:
        config = self._config
        descriptors = config.limit_descriptors or max(64, _descriptor_limit() - _FOR_CONNECTIONS)
        return Amount(config.total_bytes, config.limit_objects, descriptors)

    def _home_limit(self, uid: int) -> Amount:
        whole = self._client_limit()
        default = Amount(self._config.user_limit_bytes or whole.bytes, whole.objects, whole.descriptors)
        for bank in self._config.banks:
            if bank.uid == uid:
                given = (bank.limit_bytes, bank.limit_objects, bank.limit_descriptors)
                return Amount(*(a if a is not None else b for a, b in zip(given, default, strict=True)))
        return default

    def _may_publish(self, uid: int) -> bool:
        return all(bank.publish for bank in self._config.banks if bank.uid == uid)

    # Life

    def start(self) -> None:
        """Begin to accept clients."""
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        for session in list(self.world.sessions.values()):
            try:
                session.pidfd = os.pidfd_open(session.pid)
            except OSError:
                # It has ended while there was no broker, or its number means nothing here.
                self._ended(session)
            else:
                self._gone(session)
        for extent, (old, key) in self._moving.items():
            self._spawn(self._finish_move(extent, old, key))

    async def close(self) -> None:
        """Stop. Clients keep what they have mapped; leases are truncated only where they were revoked."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        self._listener.close()
        for connection in list(self._connections):
            connection.drop("the broker ends")
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self.world.readers.close()

    def _spawn(self, work: Awaitable[object]) -> None:
        self._spawned(asyncio.ensure_future(work))

    def _spawned(self, task: asyncio.Future[Any]) -> None:
        self._tasks.add(task)

        def done(task: asyncio.Future[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:
                _log.error("a task of the broker failed", exc_info=task.exception())

        task.add_done_callback(done)

    def _accept(self) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                # Out of descriptors: whoever waits is accepted when some are free again.
                _log.error("accept: %s", error)
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._listener)
                loop.call_later(_ACCEPT_AGAIN_SECONDS, loop.add_reader, self._listener, self._accept)
                return
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        try:
            connection = Connection(sock, self._limits, self._turns, self._serve, self._closed)
        except OSError:
            sock.close()
            return
        same_user = self._by_user[connection.uid]
        self._by_user[connection.uid] += 1
        self._connections.add(connection)
        self._queues[connection] = deque()
        if self._config.users is not None and connection.uid not in self._config.users:
            connection.drop("its user may not connect")
        elif same_user >= self._limits.connections:
            connection.drop(f"its user has {same_user} connections")
        elif (seconds := self._penalties.wait_seconds(connection.uid)) > 0:
            connection.hold_off(seconds)

    def _closed(self, connection: Connection) -> None:
        if connection.why:
            self.counters.dropped += 1
            fields = {"pid": connection.pid, "uid": connection.uid, "why": connection.why}
            if connection.session is not None:
                fields["client"] = connection.session.number
            _log.warning("connection closed by the broker", extra={"fields": fields})
        if connection.offended:
            self._penalties.offended(connection.uid)
        self._connections.discard(connection)
        self._by_user[connection.uid] -= 1
        if not self._by_user[connection.uid]:
            del self._by_user[connection.uid]
        for _, descriptors in self._queues.pop(connection, ()):
            discard(descriptors)
        session, connection.session = connection.session, None
        if session is None or session.port is not connection:
            if connection.pidfd >= 0:
                os.close(connection.pidfd)
            return
        session.port = None
        if not connection.why:
            _log.info("disconnected", extra={"fields": events.client_fields(session)})
        self.revoker.lost(session)
        self.announcer.lost(session)
        if len(session.grips) == 1 and not session.leases:
            # It has the bank of its user only, so there is nothing to come back for.
            for handle in list(session.grips):
                self.world.close_handle(session, handle)
        self._gone(session)

    # Sessions without a connection

    def _gone(self, session: Session) -> None:
        """A client is not connected. Its process may end, or come back, or do neither."""
        loop = asyncio.get_running_loop()
        if not (session.grips or session.leases or session.stuck):
            self._forget_pidfd(session)
            self.world.drop_session(session)
            self.world.commit()
            return
        if session.pidfd >= 0:
            loop.add_reader(session.pidfd, self._ended, session)
        loop.call_later(self._config.resume_seconds, self._expire, session)

    def _ended(self, session: Session) -> None:
        """The process of a client without a connection has ended: nothing is left of it."""
        self._forget_pidfd(session)
        if session.port is None and session.number in self.world.sessions:
            self._spawn(self._wind_up(session))

    def _expire(self, session: Session) -> None:
        """The time to come back is over. What a living process may still have mapped stays entered."""
        if session.port is not None or session.number not in self.world.sessions:
            return
        self.world.sessions_by_digest.pop(session.token_digest, None)
        if session.pidfd < 0 or not (session.leases or session.stuck):
            self._forget_pidfd(session)
            self._spawn(self._wind_up(session))
        else:
            self._spawn(self._give_up(session))

    async def _wind_up(self, session: Session) -> None:
        """Nothing is to be left of a session."""
        await self._turns.run(session.uid, self.world.wind_up(session))
        self._came_back.set()

    async def _give_up(self, session: Session) -> None:
        """A session loses its handles; what its process may have mapped stays entered."""
        await self._turns.run(session.uid, self.world.close_handles(session))
        self._came_back.set()

    @staticmethod
    def _forget_pidfd(session: Session) -> None:
        if session.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(session.pidfd)
            os.close(session.pidfd)
            session.pidfd = -1

    async def _finish_move(self, extent: Extent, old: int, key: str) -> None:
        """Go on with a move that a restart interrupted, when all concerned have come back or had time to."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._config.resume_seconds
        async with self.revoker.lock(extent.memory):
            while any(lease.session.port is None for lease in extent.leases) and loop.time() < end:
                self._came_back.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._came_back.wait(), max(0.0, end - loop.time()))
            if extent.memory.dead and extent.serial not in self.world.extents:
                os.ftruncate(old, 0)
                self.world.drop_move(extent, key, old)
                self.world.commit()
                return
            await self.revoker.finish_move(extent, old, key)
            del self._moving[extent]

    # Requests

    def _serve(self, connection: Connection, message: protocol.ClientMessage, descriptors: list[int]) -> None:
        """Carry a message out, or queue it behind the one before it."""
        session = connection.session
        if isinstance(message, protocol.Acknowledge):
            if session is not None:
                self.revoker.acknowledged(session, message.serial, message.done)
            return
        if (session is None) != (type(message) is protocol.Hello):
            discard(descriptors)
            connection.offend("a connection begins with one Hello")
            return
        connection.outstanding += 1
        if connection in self._busy:
            self._queues[connection].append((message, descriptors))
            return
        self._carry_out(connection, message, descriptors)

    def _carry_out(self, connection: Connection, message: protocol.Request, descriptors: list[int]) -> None:
        crash_point(f"{protocol.tag(message)}:received")
        session = connection.session
        if session is None:
            assert isinstance(message, protocol.Hello)
            self._hello(connection, message)
            return
        session.requests += 1
        number, payload, names = session.replies.get(message.id % _REPLIES, (-1, b"", []))
        if number == message.id:
            # The client did not get the reply before the broker was restarted.
            discard(descriptors)
            self._answer(connection, message.id, payload, names)
            return
        try:
            answer = self._requests(session, message, descriptors)
        except Exception as error:  # noqa: BLE001 - told to the client, and logged if it is a bug
            self._fault(connection, message, error)
            return
        if isinstance(answer, tuple):
            self._finish(connection, session, message, answer)
        else:
            self._busy.add(connection)
            self._spawn(self._carry_on(connection, session, message, answer))

    async def _carry_on(
        self, connection: Connection, session: Session, message: protocol.Request, answer: Awaitable[Answer]
    ) -> None:
        """Wait for what takes time; then the requests that came meanwhile get their turn."""
        try:
            done = await answer
        except Exception as error:  # noqa: BLE001 - told to the client, and logged if it is a bug
            self._fault(connection, message, error)
        else:
            self._finish(connection, session, message, done)
        self._busy.discard(connection)
        queue = self._queues.get(connection)
        while queue and connection not in self._busy:
            self._carry_out(connection, *queue.popleft())
        if queue is not None:
            connection.work()

    def _finish(
        self, connection: Connection, session: Session, message: protocol.Request, answer: Answer
    ) -> None:
        """Make what a request changed last, and answer it."""
        name = protocol.tag(message)
        reply, names = answer
        self._count(session, message, reply)
        frame = protocol.encode(reply, len(names))
        crash_point(f"{name}:applied")
        if self.world.journal.pending and session.number in self.world.sessions:
            slot = message.id % _REPLIES
            session.replies[slot] = message.id, frame, names
            self.world.journal.put(f"r{session.number}.{slot}", [message.id, frame, names])
        self.world.commit()
        crash_point(f"{name}:committed")
        self._answer(connection, message.id, frame, names)
        crash_point(f"{name}:replied")
        if isinstance(message, protocol.Bye):
            connection.drop("")

    def _count(self, session: Session, message: protocol.Request, reply: protocol.Reply) -> None:
        """Count and log what was carried out."""
        self.counters.requests[protocol.tag(message)] += 1
        if isinstance(reply, protocol.Revoked):
            self.counters.moved_bytes += reply.moved_bytes
            self.counters.outcomes.update(outcome.result for outcome in reply.outcomes)
        events.carried_out(session, message, reply)

    def _fault(self, connection: Connection, message: protocol.Request, error: Exception) -> None:
        self.world.commit()
        kind = fault_of(error)
        if kind is None:
            _log.error("a request failed: %r", message, exc_info=error)
            kind = "internal", 0
        self.counters.faults[kind[0]] += 1
        text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
        reply = protocol.Fault(message.id, kind[0], text[:1000], kind[1])
        self._answer(connection, message.id, protocol.encode(reply), [])

    def _answer(self, connection: Connection, number: int, frame: bytes, names: list[str]) -> None:
        """Send a reply with fresh copies of the descriptors that go with it."""
        connection.outstanding -= 1
        if connection.closed:
            return
        opened: list[int] = []
        try:
            for name in names:
                opened.append(self._open(name))  # noqa: PERF401 - what was opened is closed on failure
        except (OSError, LookupError) as error:
            for descriptor in opened:
                os.close(descriptor)
            if isinstance(error, LookupError):
                # It was carried out before a restart, and what it gave has ended since.
                connection.post(protocol.Fault(number, "unknown", "what was asked for has ended"), [])
            else:
                # The client comes back and asks again, and by then there may be room.
                connection.drop(f"a descriptor of its reply could not be opened: {error}")
            return
        connection.post_frame(frame, opened)

    def _open(self, name: str) -> int:
        world = self.world
        if name[0] == "x":
            extent = world.extents[int(name[1:-1])]
            return extent.open_for(True) if name[-1] == "w" else world.readers.open(extent)
        if name[0] == "y":
            return os.dup(world.layers[int(name[1:])].descriptor)
        return os.dup(world.tokens[int(name[1:])].descriptor)

    def _hello(self, connection: Connection, message: protocol.Hello) -> None:
        """Begin a session, or go on with one."""
        connection.outstanding -= 1
        if message.version != protocol.VERSION:
            text = f"this broker speaks version {protocol.VERSION}, not {message.version}"
            connection.post(protocol.Fault(message.id, "unsupported", text), [])
            return
        session = None
        token = message.session
        if token:
            session = self.world.sessions_by_digest.get(digest(token))
            if session is not None and (session.uid, session.pid) != (connection.uid, connection.pid):
                session = None
        resumed = session is not None
        if session is None:
            try:
                if (
                    sum(1 for each in self.world.sessions.values() if each.uid == connection.uid)
                    >= self._most
                ):
                    raise QuotaExceeded(
                        f"a user has {self._most} sessions at most, those that may come back too"
                    )
                home = self.world.home(connection.uid, self._home_limit(connection.uid), self._clients)
            except QuotaExceeded as error:
                connection.post(protocol.Fault(message.id, "quota", str(error)), [])
                return
            token = os.urandom(protocol.SESSION_BYTES)
            session = self.world.make_session(token, connection.pid, connection.uid, home)
            rights = Rights.READ | Rights.WRITE
            if self._may_publish(connection.uid):
                rights |= Rights.PUBLISH
            self.world.give(session, home, rights)
        elif session.port is not None:
            session.port.drop("it has connected again")
        self._forget_pidfd(session)
        session.pidfd = connection.pidfd
        if session.pidfd >= 0:
            # A child of it may have the socket, which is then not closed by its end.
            asyncio.get_running_loop().add_reader(session.pidfd, connection.drop, "")
        session.port = connection
        connection.session = session
        self.counters.requests["hello"] += 1
        _log.info("connected", extra={"fields": events.client_fields(session) | {"resumed": resumed}})
        crash_point("hello:applied")
        self.world.commit()
        crash_point("hello:committed")
        connection.post(protocol.Welcome(message.id, protocol.VERSION, token, session.number, 1, resumed), [])
        crash_point("hello:replied")
        if resumed:
            for lease in session.leases.values():
                for extent in lease.extents():
                    if lease.write and extent not in self._moving:
                        connection.post(protocol.UnholdEvent(extent.serial), [])
        self._came_back.set()


def _descriptor_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(soft, 1 << 20)


def serve(path: str | None, config: Config) -> int:
    """Run a broker until SIGTERM or SIGINT. Blocks.

    Args:
        path: Where to listen, if the process was not started with a listening socket.
        config: The limits.

    Returns:
        The exit status.

    Raises:
        OSError: The kernel refused, EADDRINUSE where a broker listens already.
    """
    found = inherited()
    listener = None
    for name in list(found):
        if _is_listener(found[name]):
            listener = socket.socket(fileno=found.pop(name))
            break
    if listener is None:
        if path is None:
            raise ValueError("no socket: give --socket PATH, or start it by socket activation")
        listener = listen(path)
    guardian_pid = int(os.environ.pop(guardian.GUARDIAN, "0"))
    keeper = Keeper(os.environ.pop("NOTIFY_SOCKET", None), found, replaceable=bool(guardian_pid))
    guarding = Guarding(keeper, listener, path or "", config.log_format) if guardian_pid else None
    # Threads look through /proc of clients and write the log. The loop must not wait for one of them for 5 ms
    # each time that it comes back from the kernel.
    sys.setswitchinterval(_SWITCH_SECONDS)
    writer = events.start(sys.stderr.fileno(), form=config.log_format, level=config.log_level)
    try:
        return asyncio.run(_main(listener, config, keeper, found, guarding, guardian_pid))
    finally:
        writer.stop()


def listen(path: str) -> socket.socket:
    """Listen on a path; a socket that a broker which has ended left there is replaced.

    The path appears when the socket listens, so whoever sees it can connect.

    Raises:
        OSError: EADDRINUSE where somebody listens, or the file is no socket.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            pass
        except ConnectionRefusedError as error:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.EADDRINUSE, f"bind: {path} is there and is no socket") from error
        else:
            raise OSError(errno.EADDRINUSE, f"bind: a broker listens on {path} already")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    unseen = f"{path}.{os.getpid()}"
    try:
        try:
            sock.bind(unseen)
        except OSError as error:
            raise OSError(error.errno, f"bind: {error.strerror}: {unseen}") from error
        # Who may connect is for the folder's permissions, and for `users` of the configuration.
        os.chmod(unseen, 0o666)  # noqa: S103
        sock.listen(1024)
        os.rename(unseen, path)
    except BaseException:
        sock.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unseen)
        raise
    return sock


def _is_listener(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


async def _main(
    listener: socket.socket,
    config: Config,
    keeper: Keeper,
    found: dict[str, int],
    guarding: Guarding | None,
    guardian_pid: int,
) -> int:
    server = Server(listener, config, keeper, found)
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    async with exporting(config.metrics, server.world, server.counters):
        server.start()
        keeper.ready()
        if guarding is not None:
            guarding.watch(guardian_pid)
        await end.wait()
        keeper.stopping()
        if guarding is not None:
            await guarding.close()
        await server.close()
    return 0
