"""What a run found: collected from the events of its programs."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from quire import PAGE_SIZE

if TYPE_CHECKING:
    from quire.commands.demo.memory import Memory

__all__ = ["Figures", "Spread"]


class Spread(NamedTuple):
    """Durations, in nanoseconds."""

    median: float
    worst: float
    samples: int

    @classmethod
    def of(cls, durations: list[int]) -> Spread | None:
        """Summarize; None if there are none."""
        return cls(median(durations), max(durations), len(durations)) if durations else None


class Figures:
    """Everything measured in one run, and nothing else.

    Attributes:
        data: Title, size, columns and so on of the data.
        versions: The event of each version.
        handover_ns: Each reader's time from send to verified and mapped; the first versions apart.
        memory: Of all processes, while the last version was shared; and the largest seen.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.data: dict[str, Any] = {}
        self.versions: list[dict[str, Any]] = []
        self.agreed = 0
        self.first_handover_ns: list[int] = []
        self.handover_ns: list[int] = []
        self.aggregate_ns: list[int] = []
        self.copied_bytes = 0
        self.memory: list[Memory] = []
        self.base: Memory | None = None
        self.peak_bytes = 0
        self.compared: dict[str, dict[str, Any]] = {}
        self.elapsed_s = 0.0

    def take(self, event: dict[str, Any], memory: Memory | None) -> None:
        """Remember an event, and the memory that was measured at it."""
        if memory is not None:
            self.peak_bytes = max(self.peak_bytes, memory.total)
        match event["event"]:
            case "filled":
                self.data = event
            case "version":
                self.versions.append(event)
            case "agreed":
                self.agreed += len(event["handover_ns"])
                handover = self.first_handover_ns if event["version"] == 1 else self.handover_ns
                handover += event["handover_ns"]
                self.aggregate_ns += event["aggregate_ns"]
                copied = sum(event["copied_pages"]) * PAGE_SIZE
                self.copied_bytes = max(self.copied_bytes, copied)
            case "measure":
                assert memory is not None
                self.memory.append(memory)
            case "base":
                self.base = memory
            case "compared":
                assert memory is not None
                self.compared[event["name"]] = event | {"memory_bytes": memory.total}

    @property
    def size_bytes(self) -> int:
        """One copy of the data."""
        size: int = self.data["size_bytes"]
        return size

    @property
    def worst_memory(self) -> Memory:
        """The largest that was seen while readers had versions."""
        return max(self.memory, key=lambda memory: memory.total)

    def pages(self) -> list[int]:
        """Pages changed in each version but the first."""
        return [version["pages"] for version in self.versions[1:]]

    def extra_bytes(self, name: str) -> int | None:
        """Memory beyond one copy of the data while a means holds a version; None if unknown.

        For quire that of all processes together, readers and interpreters and all.
        """
        if name == "quire":
            return self.worst_memory.total - self.size_bytes
        if self.base is None or name not in self.compared:
            return None
        grown: int = self.compared[name]["memory_bytes"] - self.base.total
        return grown

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""

        def spread(durations: list[int]) -> dict[str, Any] | None:
            found = Spread.of(durations)
            return None if found is None else found._asdict()

        return {
            "data": {name: self.data[name] for name in ("title", "scale", "rows", "size_bytes", "fill_ns")},
            "versions": len(self.versions),
            "readers": self.readers,
            "verified": self.agreed,
            "pages_changed": self.pages(),
            "first_snapshot_ns": self.versions[0]["snapshot_ns"],
            "snapshot_ns": spread([version["snapshot_ns"] for version in self.versions[1:]]),
            "first_handover_ns": spread(self.first_handover_ns),
            "handover_ns": spread(self.handover_ns),
            "aggregate_ns": spread(self.aggregate_ns),
            "memory": {
                "last_bytes": self.memory[-1].total,
                "worst_bytes": self.worst_memory.total,
                "worst_pss_bytes": self.worst_memory.pss,
                "readers_copied_bytes": self.copied_bytes,
                "measurements": len(self.memory),
                "peak_with_comparison_bytes": self.peak_bytes,
            },
            "compared": {
                name: {
                    "version_ns": spread(event["version_ns"]),
                    "store_ns": spread(event["store_ns"]),
                    "extra_bytes": self.extra_bytes(name),
                }
                for name, event in self.compared.items()
            },
            "elapsed_s": self.elapsed_s,
        }
