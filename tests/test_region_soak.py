"""The soak of fuzz/regions.py, for a few seconds: no wrong byte, no leak."""

import re
import subprocess
import sys

from support import TESTS


def test_many_faults_leak_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(TESTS.parent / "fuzz" / "regions.py"), "--faults", "50000", "--seed", "5"],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^(\d+) faults .*nothing leaked$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    assert int(found[1]) >= 50_000
