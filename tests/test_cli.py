"""What all subcommands share."""

import subprocess
import sys


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    quire = subprocess.Popen(
        [sys.executable, "-m", "quire", "space", "lessons"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert quire.stdout is not None
    assert quire.stderr is not None
    quire.stdout.close()
    assert quire.stderr.read() == b""
    assert quire.wait(60) == 1
    quire.stderr.close()
