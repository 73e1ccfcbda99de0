"""Lend an array to a script that is not trusted, and take it back.

The script sees the array while it is lent, at no copy. It cannot write to it, and it cannot keep it.

    quire broker --socket /run/user/1000/quire.sock &
    python examples/lending.py /run/user/1000/quire.sock
"""

from __future__ import annotations

import subprocess
import sys

import quire

SCRIPT = """
import sys, quire
lent = quire.connect(sys.argv[1]); x = lent.lease(lent.open("prices"))
print("the script sees", x.array("f8").sum(), flush=True)
sys.stdin.readline()
try: x[0]
except quire.Revoked: print("the script has it no more", flush=True)
"""


def main(path: str) -> None:
    """Do it with the broker that listens on a path."""
    with quire.connect(path) as owner:
        handle, lease = owner.memory(1 << 20)
        with lease.writing() as rw:
            rw.array("f8")[:] = 0.5
        owner.publish(handle, "prices")
        script = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, path], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert script.stdin is not None
        assert script.stdout is not None
        print(script.stdout.readline(), end="")
        for outcome in owner.revoke(handle).outcomes:
            print(f"client {outcome.client}: {outcome.result}")
        print(script.communicate("go on\n")[0], end="")
        print("the owner still sees", lease.array("f8").sum())


if __name__ == "__main__":
    main(sys.argv[1])
