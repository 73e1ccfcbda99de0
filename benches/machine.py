"""What the figures were measured on."""

import os
import platform

import numpy as np

import quire
from benches.common import GIB


def _line(path: str, key: str) -> str:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return "unknown"


def _setting(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return "absent"


def load() -> str:
    """Return the load averages of the last 1, 5 and 15 minutes."""
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def busy() -> bool:
    """Whether other programs keep a processor busy, by the load average of the last minute."""
    return os.getloadavg()[0] > 0.5


def describe() -> list[tuple[str, str]]:
    """Return names and values."""
    able = quire.capabilities()
    memory = int(_line("/proc/meminfo", "MemTotal").split()[0]) * 1024
    failing = [name for name, check in able.checks.items() if not check]
    huge = "/sys/kernel/mm/transparent_hugepage/"
    return [
        ("kernel", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("processor", f"{_line('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores"),
        ("memory", f"{memory / GIB:.1f} GiB, swap {_line('/proc/meminfo', 'SwapTotal')}"),
        ("huge pages, anonymous", _setting(huge + "enabled")),
        ("huge pages, shared memory", _setting(huge + "shmem_enabled")),
        ("Python, numpy, quire", f"{platform.python_version()}, {np.__version__}, {quire.__version__}"),
        ("changed pages are found by", able.uses.tracking),
        ("writers are held by", able.uses.holding),
        ("checks of `quire doctor` that fail", ", ".join(failing) or "none"),
    ]
