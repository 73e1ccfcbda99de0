"""The unit files as they are shipped, under a real systemd in namespaces of its own."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap

import pytest
from brokers import until

import quire

ROOT = pathlib.Path(__file__).resolve().parents[1]
UNITS = ROOT / "examples" / "systemd"
SYSTEMD = "/lib/systemd/systemd"
MODULES = "/run/test/quire:/run/test/modules"

# It ends with this process, however that ends.
ENTER = (
    "exec setpriv --pdeathsig KILL "
    'unshare --mount --pid --fork --kill-child --uts --ipc --cgroup bash -c "$0"'
)
# In a mount namespace: a system of its own as far as systemd looks at it.
BEGIN = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir /run/over /run/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/over,workdir=/run/work /etc
mount -t tmpfs tmpfs /etc/systemd/system
mount -t tmpfs tmpfs /usr/local/bin
# Wherever they lie: folders that the broker's user cannot enter, or that are covered below.
mkdir -p /run/test/python /run/test/quire /run/test/modules /etc/quire
mount --bind "$PREFIX" /run/test/python
mount --bind "$QUIRE" /run/test/quire
mount --bind "$SITE" /run/test/modules
if mountpoint -q /sys/fs/cgroup/unified; then
    mount -t tmpfs cgroups /sys/fs/cgroup
    mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
    mount -t cgroup -o none,name=systemd none /sys/fs/cgroup/systemd
    mount -t cgroup2 none /sys/fs/cgroup/unified
else
    mount -t cgroup2 none /sys/fs/cgroup
fi
cp "$UNITS"/* /etc/systemd/system
printf '[Unit]\\nDefaultDependencies=no\\nWants=quire-broker.socket\\n' > /etc/systemd/system/test.target
# Nothing of a boot but these units: what else there is would tidy up files of this machine.
for unit in socket service; do
    mkdir /etc/systemd/system/quire-broker.$unit.d
    printf '[Unit]\\nDefaultDependencies=no\\n' > /etc/systemd/system/quire-broker.$unit.d/test.conf
done
for unit in tmpfiles-setup tmpfiles-setup-dev tmpfiles-clean journald sysctl modules-load random-seed; do
    ln -s /dev/null /etc/systemd/system/systemd-$unit.service
done
mount -t tmpfs tmpfs /tmp
mount -o remount,bind,ro /
echo quire:x:64987:64987::/:/usr/sbin/nologin >> /etc/passwd
echo quire:x:64987: >> /etc/group
echo 'limit_bytes = 67_108_864' > /etc/quire/broker.toml
printf '#!/bin/sh\\nexport PYTHONPATH=%s\\nexec /run/test/python/bin/%s -m quire "$@"\\n' \\
    "$MODULES" "$PYTHON" > /usr/local/bin/quire
chmod 755 /usr/local/bin/quire
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
    /lib/systemd/systemd --system --unit=test.target --log-target=null --show-status=no
"""


def cgroup_roots() -> list[pathlib.Path]:
    """Where groups can be made."""
    found = []
    for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] in ("cgroup", "cgroup2"):
            found.append(pathlib.Path(fields[4]))
    return found


def own_groups() -> str:
    """A script that enters groups of its own, so that all that systemd makes is below them."""
    lines = []
    for root in cgroup_roots():
        group = root / f"quire-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if root.name == "cpuset":
                for name in ("cpuset.cpus", "cpuset.mems"):
                    (group / name).write_text((root / name).read_text())
            lines.append(f"echo $$ > {group}/cgroup.procs")
    return "\n".join(lines)


def remove_groups() -> None:
    for root in cgroup_roots():
        for folder, _, _ in os.walk(root / f"quire-test-{os.getpid()}", topdown=False):
            # What has just been killed may be in it for a moment.
            until(lambda folder=folder: removed(folder))


def removed(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


class Machine:
    """A running systemd."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def run(self, *words: str, check: bool = True) -> str:
        """Run a program in it; return what it printed."""
        command = ["nsenter", "--target", str(self.pid), "--mount", "--pid", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def python(self, script: str) -> str:
        """Run a Python script in it."""
        begin = ["env", f"PYTHONPATH={MODULES}", f"/run/test/python/bin/{interpreter()}", "-c"]
        return self.run(*begin, textwrap.dedent(script))


def interpreter() -> str:
    return f"python{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def machine(tmp_path: pathlib.Path):
    if os.getuid() != 0:
        pytest.skip("only root can start systemd in namespaces")
    if not os.path.exists(SYSTEMD) or not shutil.which("nsenter"):
        pytest.skip(f"needs {SYSTEMD} and nsenter: apt-get install systemd util-linux")
    tried = subprocess.run(
        [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--uts",
            "--ipc",
            "--cgroup",
            "mount",
            "-t",
            "tmpfs",
            "tmpfs",
            "/mnt",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode != 0:
        pytest.skip(f"this root may not make namespaces and mount in them: {tried.stderr}")
    environment = {
        "PATH": os.environ["PATH"],
        "PREFIX": sys.base_prefix,
        "PYTHON": interpreter(),
        "QUIRE": str(pathlib.Path(quire.__file__).parents[1]),
        "SITE": sysconfig.get_path("purelib"),
        "MODULES": MODULES,
        "UNITS": str(UNITS),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"{own_groups()}\n{ENTER}", BEGIN],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: children.read_text().split() and ready(int(children.read_text().split()[0])), process)
        yield Machine(int(children.read_text().split()[0]))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        remove_groups()
        # Shown where a test fails.
        sys.stderr.write((tmp_path / "log").read_text())


def ready(pid: int) -> bool:
    """Whether systemd listens for the broker."""
    return pathlib.Path(f"/proc/{pid}/root/run/quire/broker.sock").exists()


def test_the_broker_is_started_by_its_socket_and_goes_on_after_it_was_killed(machine) -> None:
    assert machine.run("systemctl", "is-active", "quire-broker.service", check=False).strip() == "inactive"
    printed = machine.python("""
        import subprocess, sys
        import numpy as np
        import quire
        from quire.broker.protocol import Rights
        def show(name):
            command = ["systemctl", "show", "--value", "-p", name, "quire-broker.service"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        with quire.connect("/run/quire/broker.sock", timeout=30) as c:
            handle, lease = c.memory(3 << 20, extent_bytes=1 << 20)
            with lease.writing() as rw:
                rw.array("u1")[:] = 7
            c.publish(handle, "memory")
            with quire.Segment.from_buffer(np.arange(1000)) as segment, segment.snapshot() as snapshot:
                deposited = c.deposit(snapshot)
            used = c.describe(c.bank).used
            print(show("ActiveState"), show("User"), int(show("NFileDescriptorStore")) >= used[2])
            for action in (["kill", "--signal=SIGKILL"], ["restart"]):
                before = show("MainPID")
                subprocess.run(["systemctl", *action, "quire-broker.service"], check=True)
                assert c.describe(c.bank).used == used
                assert show("MainPID") != before
                assert int(lease.array("u1").sum()) == 7 * (3 << 20)
                assert int(c.lease(c.open("memory")).array("u1").sum()) == 7 * (3 << 20)
                with c.fetch(deposited) as fetched, fetched.map() as mapping:
                    assert (mapping.array("i8") == np.arange(len(mapping.array("i8")))).sum() >= 1000
            c.destroy(handle)
            c.destroy(deposited)
            print(show("NFileDescriptorStore"), c.describe(c.bank).used)
        subprocess.run(["systemctl", "stop", "quire-broker.service"], check=True)
        print(show("ActiveState"), show("Result"))
    """)
    assert printed.splitlines() == ["active quire True", "1 [0, 0, 0]", "inactive success"]
