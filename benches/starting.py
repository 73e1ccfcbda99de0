"""What ``import quire`` adds to the start of Python."""

import subprocess
import sys

from benches.common import Peer, Plan, Row, timed

GOAL_SECONDS = 0.05


def _start(statement: str) -> float:
    command = [sys.executable, "-c", statement]
    return timed(lambda: subprocess.run(command, check=True))


def measure(plan: Plan) -> Row:
    """Measure new interpreters, with and without the import."""
    row = Row(
        "Start of Python with `import quire`",
        "From the start of a new interpreter to its end, in turn with `import quire` and with `pass`. The"
        " files are in the page cache.",
    )
    bare = Peer("python -c pass", [])
    for number in range(plan.rounds // 2 + 1):
        ours, theirs = _start("import quire"), _start("pass")
        if number:
            row.ours.append([ours])
            bare.seconds.append(theirs)
            row.part("the import: the difference", ours - theirs)
    row.peers = [bare]
    return row
