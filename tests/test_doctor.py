"""capabilities() and quire doctor."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quire
from quire import cli
from quire.advice import Advice, advise
from quire.capabilities import REQUIRED, Cgroup, find_cgroup
from quire.commands import doctor


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quire", "doctor", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )


# --- capabilities ---


def test_every_check_is_explained_and_every_explanation_checked() -> None:
    explained = [name for names in doctor.SECTIONS.values() for name in names]
    assert sorted(explained) == sorted(quire.capabilities().checks)


def test_documentation_names_every_check() -> None:
    text = (Path(__file__).parents[1] / "docs" / "kernel.md").read_text("utf-8")
    assert [name for name in quire.capabilities().checks if f"`{name}`" not in text] == []


def test_failed_checks_say_why() -> None:
    for name, check in quire.capabilities().checks.items():
        assert bool(check) is check.works
        assert check.works == (check.message == ""), name
        assert check.errno == 0 or not check.works, name


def test_what_a_segment_needs_works_here() -> None:
    found = quire.capabilities()
    assert found.usable()
    assert all(found.checks[name] for name in REQUIRED)


def test_limits_are_the_kernels() -> None:
    limits = quire.capabilities().limits
    assert limits.max_map_count == int(Path("/proc/sys/vm/max_map_count").read_text())
    assert limits.overcommit_memory in {0, 1, 2}
    soft, hard = limits.open_files
    assert soft is None or hard is None or 0 < soft <= hard


def test_probing_leaves_nothing_behind() -> None:
    quire.capabilities()  # the first opens the process's page tracker
    before = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(20):
        quire.capabilities()
    descriptors, vmas = (
        len(os.listdir("/proc/self/fd")),
        len(Path("/proc/self/maps").read_text().splitlines()),
    )
    assert descriptors == before[0]
    assert vmas < before[1] + 20
    assert "quire-probe" not in Path("/proc/self/maps").read_text()


# --- the command ---


def test_json_is_the_same_data() -> None:
    printed = json.loads(run_doctor("--json").stdout)
    here = json.loads(json.dumps(quire.capabilities().as_dict()))
    assert printed["checks"] == here["checks"]
    assert printed["kernel"] == here["kernel"]


def test_text_says_what_is_used() -> None:
    done = run_doctor()
    uses = json.loads(run_doctor("--json").stdout)["uses"]
    assert doctor.TRACKING[uses["tracking"]] in done.stdout
    assert doctor.HOLDING[uses["holding"]] in done.stdout
    assert done.stderr == ""


def test_forced_fallback_is_reported() -> None:
    uses = json.loads(run_doctor("--json", QUIRE_TRACKING="compare").stdout)["uses"]
    assert uses == {"tracking": "compare", "holding": "sigsegv", "forced": "compare", "faults": "thread"}
    text = run_doctor(QUIRE_TRACKING="compare").stdout
    assert "QUIRE_TRACKING=compare is set" in text
    assert "unset QUIRE_TRACKING" in text


def test_needs_only_the_standard_library() -> None:
    code = """
import sys
sys.modules.update(rich=None, numpy=None)
import quire.cli
sys.exit(quire.cli.main(["doctor"]))
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"quire {quire.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["doctor", "--nonsense"]])
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: quire" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


# --- advice: what other machines would be told ---

WORKING: dict[str, int | None] = {name: None for names in doctor.SECTIONS.values() for name in names}


def advice_for(
    *,
    forced: str | None = None,
    max_map_count: int = 65530,
    overcommit_memory: int = 0,
    open_files: tuple[int | None, int | None] = (None, None),
    **failed: int,
) -> list[Advice]:
    errnos = WORKING | {name.replace("__", "."): number for name, number in failed.items()}
    return list(
        advise(
            errnos,
            forced=forced,
            max_map_count=max_map_count,
            overcommit_memory=overcommit_memory,
            open_files=open_files,
        )
    )


def test_nothing_to_say_where_all_works() -> None:
    assert advice_for() == []


def test_container_that_blocks_userfaultfd() -> None:
    (advice,) = advice_for(
        userfaultfd__device=errno.ENOENT,
        userfaultfd__call=errno.EPERM,
        userfaultfd__user_mode_call=errno.EPERM,
        pagemap__scan=errno.EPERM,
    )
    assert "seccomp" in advice.setting
    assert "--device /dev/userfaultfd" in advice.setting


def test_kernel_without_userfaultfd() -> None:
    (advice,) = advice_for(
        userfaultfd__device=errno.ENOENT,
        userfaultfd__call=errno.ENOSYS,
        userfaultfd__user_mode_call=errno.ENOSYS,
        pagemap__scan=errno.ENOSYS,
    )
    assert "CONFIG_USERFAULTFD" in advice.setting


def test_unprivileged_user() -> None:
    (advice,) = advice_for(userfaultfd__device=errno.EACCES, userfaultfd__call=errno.EPERM)
    assert "vm.unprivileged_userfaultfd=1" in advice.setting
    assert "/dev/userfaultfd" in advice.setting


def test_kernel_too_old_for_asynchronous_write_protection() -> None:
    (advice,) = advice_for(
        **{
            "userfaultfd__feature.WP_ASYNC": errno.EINVAL,
            "userfaultfd__feature.WP_UNPOPULATED": errno.EINVAL,
        },
        pagemap__scan=errno.EINVAL,
    )
    assert "WP_UNPOPULATED, WP_ASYNC" in advice.setting


def test_kernel_without_the_scan() -> None:
    (advice,) = advice_for(pagemap__scan=errno.ENOTTY)
    assert "PAGEMAP_SCAN" in advice.setting


def test_tight_limits() -> None:
    lines = advice_for(max_map_count=1000, overcommit_memory=2, open_files=(256, 1024))
    assert [line.setting for line in lines] == [
        "sysctl vm.max_map_count=65530",
        "sysctl vm.overcommit_memory=0",
        "ulimit -n 1024",
    ]


def test_no_memfd_means_no_quire() -> None:
    first, *_ = advice_for(memfd__create=errno.EPERM, memfd__seal_write=errno.EPERM)
    assert "no snapshot" in first.lacks
    assert "seccomp" in first.setting


# --- cgroups: folders laid out like the kernel's ---


def lay_out(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return str(root / "proc")


def test_cgroup_2_takes_the_tightest_of_its_ancestors(tmp_path: Path) -> None:
    proc = lay_out(
        tmp_path,
        {
            "proc/cgroup": "0::/a/b",
            "proc/mountinfo": f"30 24 0:26 / {tmp_path}/cg rw,nosuid - cgroup2 cgroup2 rw",
            "cg/a/memory.max": "1000",
            "cg/a/memory.current": "10",
            "cg/a/b/memory.max": "max",
            "cg/a/b/memory.current": "7",
        },
    )
    assert find_cgroup(proc) == Cgroup(2, f"{tmp_path}/cg/a", 1000, 10)


def test_cgroup_1_beside_an_empty_2(tmp_path: Path) -> None:
    proc = lay_out(
        tmp_path,
        {
            "proc/cgroup": "5:cpu:/\n4:memory:/jobs/x\n0::/",
            "proc/mountinfo": f"33 24 0:28 / {tmp_path}/memory rw - cgroup cgroup rw,memory\n"
            f"34 24 0:29 / {tmp_path}/unified rw - cgroup2 cgroup2 rw",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": "50",
            "memory/jobs/x/memory.limit_in_bytes": "9223372036854771712",
            "memory/jobs/x/memory.usage_in_bytes": "20",
            "unified/cgroup.procs": "",
        },
    )
    assert find_cgroup(proc) == Cgroup(1, f"{tmp_path}/memory/jobs/x", None, 20)


def test_container_that_mounts_only_its_own_cgroup(tmp_path: Path) -> None:
    proc = lay_out(
        tmp_path,
        {
            "proc/cgroup": "4:memory:/docker/abc",
            "proc/mountinfo": f"33 24 0:28 /docker/abc {tmp_path}/memory ro - cgroup cgroup rw,memory",
            "memory/memory.limit_in_bytes": "4096",
            "memory/memory.usage_in_bytes": "512",
        },
    )
    assert find_cgroup(proc) == Cgroup(1, f"{tmp_path}/memory", 4096, 512)


def test_no_memory_controller(tmp_path: Path) -> None:
    assert find_cgroup(lay_out(tmp_path, {"proc/cgroup": "", "proc/mountinfo": ""})) is None
