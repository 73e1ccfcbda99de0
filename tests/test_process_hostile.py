"""quire.maps of processes that are strange, hostile, or not there."""

import contextlib
import itertools
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from leaks import no_new_descriptors
from processes import child, proc_maps
from support import run_forked

import quire
from quire.process import Kind

PAGE = quire.PAGE_SIZE


def test_names_with_newlines_and_lines_that_are_none() -> None:
    """A name may hold any byte but 0 and "/": it can neither end its line nor pretend to be others."""
    body = r"""
import tempfile
folder = tempfile.mkdtemp()
fake = "x\n00400000-00401000 rwxp 00000000 00:00 0 [fake]\nRss: 99 kB\n (deleted)"
plain = "a\\012b"
for name in (fake, plain, " two  blanks ", "\\"):
    path = os.path.join(folder, name)
    with open(path, "wb+") as file:
        file.truncate(PAGE)
        address = map_memory(PAGE, prot=1, flags=1, fd=file.fileno())
        ready(address, os.fsencode(path).hex())
        os.unlink(path) if name == "\\" else None
os.rename(folder, folder + "-moved")
ready("done", folder)
"""
    lines: list[list[str]] = []
    with child(body) as (process, words):
        lines.append(words)
        assert process.stdout
        while lines[-1][0] != "done":
            lines.append(process.stdout.readline().decode().split())
        found = quire.maps(process.pid)
        assert found.partial == ()
        assert len(found) == len(proc_maps(process.pid))
        folder = lines.pop()[1]
        for number, (address, name) in enumerate(lines):
            vma = found.at(int(address))
            assert vma is not None
            exact = bytes.fromhex(name).replace(folder.encode(), folder.encode() + b"-moved")
            deleted = b" (deleted)" if number == 3 else b""
            assert vma.name == exact + deleted
            assert vma.is_deleted == vma.name.endswith(b" (deleted)")
            assert vma.label.isprintable()
            assert vma.resident == 0
        assert not any(vma.name == b"[fake]" for vma in found)
        subprocess.run(["rm", "-rf", folder + "-moved"], check=True)


def test_a_process_that_changes_while_it_is_read() -> None:
    """What is there all the time is never missing, and nothing overlaps."""
    body = """
kept = [map_memory(PAGE, prot=1 + 2 * (i % 2)) for i in range(3000)]
ready(*kept)
arena = map_memory(4000 * PAGE)
while True:
    for start in range(0, 4000, 7):
        libc.mprotect(arena + start * PAGE, 3 * PAGE, 1)
    libc.mprotect(arena, 4000 * PAGE, 3)
"""
    with child(body, wait=False) as (process, words):
        for _ in range(15):
            found = quire.maps(process.pid)
            assert all(one.end <= other.start for one, other in itertools.pairwise(found))
            assert all(found.at(int(word)) for word in words)
            assert all(vma.size > 0 for vma in found)
            assert all("changed while" in why for why in found.partial)


def test_as_many_vmas_as_there_may_be() -> None:
    most = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text("ascii"))
    if most > 200_000:
        pytest.skip(f"vm.max_map_count is {most} here: too many to make in a test")
    body = f"""
base = map_memory({most} * 2 * PAGE, prot=0, flags=0x4022)
count = 0
while libc.mprotect(base + 2 * count * PAGE, PAGE, 3) == 0:
    count += 1
ready(count)
"""
    with child(body) as (process, words):
        found = quire.maps(process.pid)
        assert len(found) >= most - 2
        assert found.partial == ()
        assert found.totals()[Kind.RESERVED].vmas >= int(words[0]) - 1
        size = found.column("Size")
        assert size.sum() == sum(vma.size for vma in found)


def test_addresses_of_all_64_bits() -> None:
    found = quire.maps()
    vsyscall = [vma for vma in found if vma.name == b"[vsyscall]"]
    if not vsyscall:
        pytest.skip("this machine has no vsyscall page")
    assert vsyscall[0].start == 0xFFFF_FFFF_FF60_0000
    assert found.at(vsyscall[0].start) == vsyscall[0]
    assert len(found.pages(vsyscall[0]).numbers) == 0
    assert "vsyscall" in str(found.find(vsyscall[0].start))


def test_a_reservation_of_terabytes() -> None:
    body = "a = map_memory(1 << 44, prot=3, flags=0x4022); touch(a + (1 << 43)); ready(a)"
    with child(body) as (process, words):
        found = quire.maps(process.pid)
        vma = found.at(int(words[0]))
        assert vma is not None
        pages = found.pages(vma)
        there = (1 << 43) + int(words[0]) - vma.start
        assert there // PAGE in pages.numbers
        assert pages.counts(pages.present, 16).sum() == len(pages.numbers)


def test_zombie() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        found = quire.maps(process.pid)
        assert len(found) == 0
        assert "zombie" in found.partial[0]
    finally:
        assert process.stdin
        process.stdin.close()
        process.wait()


def test_kernel_thread() -> None:
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            flags = int(pathlib.Path(f"/proc/{name}/stat").read_bytes().rpartition(b") ")[2].split()[6])
            if flags & 0x0020_0000:
                break
    else:
        pytest.skip("no kernel thread can be seen from here")
    try:
        found = quire.maps(int(name))
    except PermissionError:
        assert os.geteuid(), "root may look at it"
        return
    assert len(found) == 0
    assert "kernel thread" in found.partial[0]


def test_a_process_that_ends_at_any_moment() -> None:
    """The answer is whole, partial and says so, or a ProcessLookupError; never anything else."""
    outcomes = set()
    for delay in range(40):
        with child("[map_memory(PAGE, prot=1 + 2 * (i % 2)) for i in range(2000)]; ready('x')") as (
            process,
            _,
        ):
            killer = subprocess.Popen(
                ["sh", "-c", f"for i in $(seq {delay * 40}); do :; done; kill -9 {process.pid}"]
            )
            try:
                found = quire.maps(process.pid)
                whole = len(found) >= 2000
                assert whole or found.partial
                outcomes.add("whole" if whole else "partial")
            except ProcessLookupError:
                outcomes.add("gone")
            killer.wait()
    assert outcomes


def test_gone_before_its_pages_are_asked_for() -> None:
    with child("ready('x')") as (process, _):
        found = quire.maps(process.pid)
    with pytest.raises(ProcessLookupError):
        found.pages(found[0])
    with pytest.raises(ProcessLookupError):
        found.find(found[0].start)


def test_a_number_that_is_used_again() -> None:
    with child("ready('x')") as (process, _):
        found = quire.maps(process.pid)
        other = quire.process.Maps(
            found.process._replace(start_ticks=found.process.start_ticks - 1), found.detail, found
        )
        with pytest.raises(ProcessLookupError, match="another process's"):
            other.pages(other[0])


def test_execve_meanwhile_is_told_or_another_reading_made() -> None:
    """A program that replaces itself for ever: no reading mixes two programs."""
    script = (
        "import os, sys; os.execv(sys.executable, [sys.executable, '-S', '-c', sys.argv[1], sys.argv[1]])"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", script, script])
    try:
        for _ in range(30):
            found = quire.maps(process.pid)
            names = [vma.name for vma in found]
            assert all(names.count(name) <= 1 for name in (b"[stack]", b"[heap]", b"[vdso]"))
            assert names or found.partial
    finally:
        process.kill()
        process.wait()


def test_processes_of_others() -> None:
    if os.geteuid() != 0:
        with pytest.raises(PermissionError, match="CAP_SYS_PTRACE"):
            quire.maps(1)
        return

    def as_nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(PermissionError, match="CAP_SYS_PTRACE"):
            quire.maps(parent)

    parent = os.getpid()
    run_forked(as_nobody)


def test_without_privileges_frames_are_not_told_and_the_rest_is() -> None:
    if os.geteuid() != 0:
        pytest.skip("it takes root to give up being root")
    # Readable by nobody: the interpreter of the tests may lie in root's home.
    code = """
import ctypes, os, sys
import quire
quire.maps().find(0)  # imports what this user may not read afterwards
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
with quire.Segment(1 << 20) as segment:
    memoryview(segment)[:8192] = bytes([1]) * 8192
    found = quire.maps()
    vma = found.at(segment.address)
    pages = found.pages(vma)
    assert pages.frames is None
    assert list(pages.numbers) == [0, 1], pages
    assert pages.exclusive.all()
    text = str(found.find(segment.address))
    assert "quire.Segment" in text
    assert "frame" not in text
    assert "no other page table has it" in text
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_stays_open() -> None:
    with child("ready('x')") as (process, _), no_new_descriptors():
        found = quire.maps(process.pid)
        found.pages(found[0])
        found.find(found[0].start)
        with pytest.raises(ProcessLookupError):
            quire.maps(2**22 + 1)
        with pytest.raises(ValueError, match="whole pages"):
            found.pages((1, 2))
