"""What it costs to run code in a sandbox."""

import subprocess
import sys

import numpy as np

import quire
import quire.sandbox
from benches.common import Peer, Plan, Row, timed

SCRIPT = "result = x[::4096].sum()"
BARE = "python -c 'import numpy' in a process of its own, without a sandbox"


def measure(plan: Plan) -> list[Row]:
    """Measure the shortest of scripts on a snapshot, in turns with a bare interpreter."""
    row = Row(
        f"a script in a sandbox, on {plan.size_bytes >> 20} MiB",
        "From the call of quire.sandbox.run to its return; the script reads a byte of every page.",
        bounds="The start of an interpreter and the import of numpy, once for each sandbox.",
    )
    try:
        quire.sandbox.run("").close()
    except quire.Unsupported as error:
        print(f"sandbox: left out, {error}", file=sys.stderr)
        return []
    peer = Peer(BARE, [])
    with quire.Segment(plan.size_bytes) as segment:
        segment.array("u1", plan.size_bytes)[:: quire.PAGE_SIZE] = 1
        with segment.snapshot() as snapshot:
            for number in range(plan.handovers + 1):
                seconds, code = _run(snapshot)
                bare = timed(lambda: subprocess.run([sys.executable, "-I", "-c", "import numpy"], check=True))
                if number:  # the first compiles the filter
                    row.ours.append([seconds])
                    peer.seconds.append(bare)
                    row.part("of that, the script, from shut doors to the end", code)
    row.peers.append(peer)
    return [row]


def _run(snapshot: quire.Snapshot) -> tuple[float, float]:
    results: list[quire.sandbox.Result] = []
    seconds = timed(lambda: results.append(quire.sandbox.run(SCRIPT, {"x": snapshot})))
    with results[0] as result:
        if result.array() != np.uint64(snapshot.size // quire.PAGE_SIZE):
            raise RuntimeError("the script in the sandbox saw other bytes")
        return seconds, result.usage.seconds
