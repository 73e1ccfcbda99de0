"""How much of the broker a client may take in a second, whether or not anybody else wants it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Rate"]

# So with 20,000 requests a second a client has half of a processor.
_REQUEST_NS = 25_000
_BURST_SECONDS = 0.1


class Rate:
    """What is left to a client. A request costs one, or one for each 25 µs of the processor that it takes."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with as much as may be saved: a tenth of a second's.

        Args:
            per_second: Requests.
            clock: In seconds.
        """
        self._per_second = per_second
        self._clock = clock
        self._left = self._most = per_second * _BURST_SECONDS
        self._since = clock()

    def take(self, requests: int, processor_ns: int) -> float:
        """Count requests, and what they have cost together.

        Returns:
            For how many seconds nothing more is to be served.
        """
        now = self._clock()
        left = min(self._most, self._left + (now - self._since) * self._per_second)
        left -= max(requests, processor_ns / _REQUEST_NS)
        self._left, self._since = left, now
        return 0.0 if left >= 0 else -left / self._per_second
