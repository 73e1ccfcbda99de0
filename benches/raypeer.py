"""The peer that keeps objects for processes: Ray's object store. Optional."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from benches.common import MIB, Words


class Got(NamedTuple):
    """What one ``get`` cost, in seconds.

    Attributes:
        call: ``ray.get`` in the actor, and reading a byte.
        whole: From the driver's call of the actor to its answer.
    """

    call: float
    whole: float


class RayGetter:
    """An object in Ray's store, and an actor that gets it."""

    def __init__(self, ray: Any, words: Words) -> None:
        class Actor:
            def get(self, references: list[Any]) -> float:
                start = time.perf_counter()
                value = ray.get(references[0])
                assert value[0] >= 0
                return time.perf_counter() - start

            def nothing(self) -> None:
                pass

        self._ray = ray
        # Within a list a reference stays a reference.
        self._references = [ray.put(words)]
        self._actor: Any = ray.remote(Actor).remote()

    def empty(self) -> float:
        """Call the actor for nothing; return the seconds until its answer."""
        start = time.perf_counter()
        self._ray.get(self._actor.nothing.remote())
        return time.perf_counter() - start

    def get(self) -> Got:
        """Get the object once, in the actor."""
        start = time.perf_counter()
        call = self._ray.get(self._actor.get.remote(self._references))
        return Got(call, time.perf_counter() - start)


@contextlib.contextmanager
def started(size_bytes: int) -> Iterator[RayGetter | str]:
    """Start Ray with an object of so many bytes in its store; yield why not, if it cannot be."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        yield f"Ray is not installed ({error}), so its row was not measured: it is in the extra `bench`."
        return
    try:
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=size_bytes + size_bytes // 4 + 256 * MIB,
        )
        try:
            words = np.ones(size_bytes // 8, "u8")
            getter = RayGetter(ray, words)
            del words
            getter.get()
        except BaseException:
            ray.shutdown()
            raise
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        yield f"Ray {ray.__version__} did not start here ({error}), so its row was not measured."
        return
    try:
        yield getter
    finally:
        ray.shutdown()
