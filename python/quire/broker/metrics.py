"""What the broker counts, and how Prometheus reads it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from quire.broker.banks import Amount
from quire.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from prometheus_client.core import Metric

    from quire.broker.world import World

__all__ = ["Counters", "address", "exporting"]

_ANSWER_SECONDS = 5.0


class Counters:
    """Sums since the broker was started."""

    def __init__(self) -> None:
        """Start at zero."""
        self.requests: Counter[str] = Counter()
        """That were carried out, by type."""
        self.faults: Counter[str] = Counter()
        """By the word of the fault."""
        self.outcomes: Counter[str] = Counter()
        """What revocations and destructions did to clients."""
        self.dropped = 0
        """Connections that the broker closed."""
        self.moved_bytes = 0


def address(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT``; an IPv6 address is put in brackets.

    Raises:
        ValueError: It is none.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"metrics {text!r} is not HOST:PORT")
    return host, int(port)


def measured(world: World, counters: Counters) -> list[Metric]:
    """Tell of the present. Only for the event loop, which owns the world."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415 - an extra

    def count(name: str, text: str, label: str, values: Counter[str]) -> CounterMetricFamily:
        family = CounterMetricFamily(f"quire_broker_{name}", text, labels=[label])
        for value, number in sorted(values.items()):
            family.add_metric([value], number)
        return family

    used = GaugeMetricFamily("quire_broker_bank_used", "Charged to a bank.", labels=["bank", "what"])
    limit = GaugeMetricFamily("quire_broker_bank_limit", "The most it may pay for.", labels=["bank", "what"])
    for bank in world.banks.values():
        # Those of the broker and of users; banks below them come and go as clients please.
        if bank.name:
            for what, now, most in zip(Amount._fields, bank.used, bank.limit, strict=True):
                used.add_metric([bank.name, what], now)
                limit.add_metric([bank.name, what], most)
    clients = GaugeMetricFamily("quire_broker_clients", "Clients.", labels=["connected"])
    connected = sum(1 for session in world.sessions.values() if session.port is not None)
    clients.add_metric(["true"], connected)
    clients.add_metric(["false"], len(world.sessions) - connected)
    objects = GaugeMetricFamily("quire_broker_objects", "Objects.", labels=["kind"])
    for kind, number in sorted(Counter(held.kind for held in world.objects.values()).items()):
        objects.add_metric([kind], number)
    return [
        count("requests", "Requests that were carried out.", "type", counters.requests),
        count("faults", "Requests that were refused or failed.", "fault", counters.faults),
        count("outcomes", "What revocation did to clients.", "result", counters.outcomes),
        CounterMetricFamily("quire_broker_dropped", "Connections it closed.", value=counters.dropped),
        CounterMetricFamily(
            "quire_broker_moved_bytes", "Copied so that memory could be cut off.", value=counters.moved_bytes
        ),
        clients,
        objects,
        GaugeMetricFamily("quire_broker_leases", "Leases.", value=len(world.leases)),
        GaugeMetricFamily("quire_broker_names", "Published names.", value=len(world.names)),
        GaugeMetricFamily("quire_broker_bytes", "Allocated.", value=_bytes(world)),
        used,
        limit,
    ]


def _bytes(world: World) -> int:
    """What all banks pay for."""
    return sum(bank.used.bytes for bank in world.banks.values() if bank.parent is None)


class _Collector:
    """Asks the event loop from the threads that serve HTTP."""

    def __init__(self, loop: asyncio.AbstractEventLoop, world: World, counters: Counters) -> None:
        self._loop = loop
        self._world = world
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        """Wait for the loop; a scrape fails if it does not answer, the broker does not wait for anybody."""

        async def ask() -> list[Metric]:
            return measured(self._world, self._counters)

        yield from asyncio.run_coroutine_threadsafe(ask(), self._loop).result(_ANSWER_SECONDS)

    def describe(self) -> list[Metric]:
        """Nothing: what there is is found when it is asked for."""
        return []


@contextlib.asynccontextmanager
async def exporting(where: str, world: World, counters: Counters) -> AsyncIterator[None]:
    """Serve ``/metrics`` over HTTP while the block runs, inside an event loop.

    Args:
        where: ``HOST:PORT``; empty is nowhere.
        world: The state.
        counters: The sums.

    Raises:
        Unsupported: prometheus-client is not installed.
        OSError: The address cannot be listened on.
    """
    if not where:
        yield
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise Unsupported("metrics need prometheus-client: pip install 'quire[broker]'") from error
    host, port = address(where)
    registry = CollectorRegistry()
    registry.register(_Collector(asyncio.get_running_loop(), world, counters))
    try:
        server, _thread = start_http_server(port, host, registry)
    except OSError as error:
        raise OSError(error.errno, f"bind: {error.strerror}: metrics on {where}") from error
    try:
        yield
    finally:
        # Its thread looks every half second whether it is to end; the loop must not wait for it.
        await asyncio.to_thread(server.shutdown)
        server.server_close()
