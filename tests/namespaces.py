"""Scripts in a mount namespace of their own, where they may mount what the machine must not have."""

import subprocess
import sys

import pytest
from support import TESTS

NO_MOUNT = 77


def with_mounts(mounts: str, script: str, *arguments: str, unshare: str = "-Urm") -> str:
    """Run a Python script after shell commands that mount something; what it printed.

    Skips the test where such namespaces, or these mounts, are not allowed.
    """
    command = f'{{ {mounts}; }} || exit {NO_MOUNT}; exec "$@"'
    done = subprocess.run(
        ["unshare", unshare, "sh", "-c", command, "sh", sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=TESTS,
    )
    if done.returncode == NO_MOUNT or done.stderr.startswith("unshare: "):
        pytest.skip(f"{mounts!r} is not possible in a namespace of its own: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
