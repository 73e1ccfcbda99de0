"""Programs of calls that are run in the model and by real processes, and compared after every call.

A program is bytes, eight for each call, so that hypothesis can make and shrink it; zeros are a call that does
nothing. What it means depends on the model's state (the third VMA, its last page), so that most calls hit
something.
"""

import errno
import os
import re
import resource
import struct
from dataclasses import dataclass, field, replace

import spacesmaps
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from quire._native import PAGE_SIZE as PAGE
from quire.space import VMA, AddressSpace, CallError, FaultKind, File, Machine, Rules
from quire.space import constants as c
from quire.space.native import FD_MAPS, FD_PAGEMAP, FD_SMAPS, FD_ZERO, LIST_AT, LIST_BYTES, CallList

ARENA = 0x1000_0000_0000
ARENA_PAGES = 64
STEP_BYTES = 8
STEPS = 100
FILE_PAGES = 24
PROCESSES = 4
WORD = 1 << 64
# No new ones are mapped beyond that: the texts of maps are what takes the time.
MOST_VMAS = 24
MAP_CHUNKS = 3
REGIONS = 256

PAGEMAP_SCAN = 0xC060_6610
IS_FILE, IS_PRESENT, IS_ZERO, IS_GUARD = 1 << 2, 1 << 3, 1 << 5, 1 << 8
KINDS = {
    "anonymous": IS_PRESENT,
    "file": IS_PRESENT | IS_FILE,
    "zero": IS_PRESENT | IS_ZERO,
    "guard": IS_GUARD,
}

R, W, X = c.PROT_READ, c.PROT_WRITE, c.PROT_EXEC
PROTECTIONS = (R | W, R | W, R | W, R, R, 0, R | X, R | W | X, W)
PRIVATE = c.MAP_PRIVATE | c.MAP_ANONYMOUS
SHARED = c.MAP_SHARED | c.MAP_ANONYMOUS
FIXING = (c.MAP_FIXED, c.MAP_FIXED, c.MAP_FIXED, 0, 0, c.MAP_FIXED_NOREPLACE)
REMAPPING = (0, 1, 1, 3, 3, 3, 5, 7, 2, 4, 8)
ADVICE = (4, 4, 8, 10, 11, 18, 19, 102, 103)

_DEVICE = re.compile(rb"00:01 \d+ +/dev/zero")
_HUGE = 1 << 45


@dataclass
class Step:
    """One call: what the model says of it, and where the real result lies."""

    text: str
    process: int
    record: int
    expected: int
    maps: bytes
    pages: list[tuple[int, int, int]]
    real_maps: tuple[int, list[int]]
    scan: int
    regions: int
    heard: str = ""


class DisagreementError(AssertionError):
    """The model and the kernel differ."""


def normal(maps: bytes) -> bytes:
    """Leave the inode of shared anonymous memory out, which nobody can know."""
    return _DEVICE.sub(b"00:01 /dev/zero", maps) if b"/dev/zero" in maps else maps


@dataclass
class Process:
    """One process of a program."""

    space: AddressSpace
    parent: int
    children: int = 0


@dataclass
class Furniture:
    """What is mapped in a real process from the start: the list of calls and its code."""

    vmas: list[tuple[int, int, int, int, File]] = field(default_factory=list)
    tail: bytes = b""

    @classmethod
    def of(cls, calls: CallList) -> "Furniture":
        """Read it from the map of a process that does nothing else."""
        calls.begin(1, [])
        address, records = calls.read_all(FD_MAPS, MAP_CHUNKS)
        calls.run()
        found = cls()
        for line in calls.text(address, records).splitlines(keepends=True):
            if b"[vsyscall]" in line:
                found.tail = line
                continue
            ends, protection, offset, device, inode, *name = line.decode().rstrip("\n").split(maxsplit=5)
            start, end = (int(part, 16) for part in ends.split("-"))
            major, minor = (int(part, 16) for part in device.split(":"))
            file = File(name[0].strip(), end - start, device=(major, minor), inode=int(inode))
            flags = c.VM_MAYACCESS | (R | W | c.VM_SHARED | c.VM_MAYSHARE if protection == "rw-s" else R | X)
            found.vmas.append((start, end, flags, int(offset, 16) >> c.PAGE_SHIFT, file))
        assert [vma[:2] for vma in found.vmas] == sorted(
            [(LIST_AT, LIST_AT + LIST_BYTES), (calls.code, calls.code + PAGE)]
        )
        return found


class Comparison:
    """Runs programs both ways. Use it in a ``with`` block.

    Attributes:
        rules: Of the running kernel, for an emptied child of this process.
        operations: Calls compared so far.
    """

    def __init__(self, rules: Rules) -> None:
        self.calls = CallList()
        self.furniture = Furniture.of(self.calls)
        limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
        self.rules = replace(
            rules,
            brk_start=self.calls.brk_start,
            mmap_base=self._mmap_base(),
            stack_limit_bytes=None if limit == resource.RLIM_INFINITY else limit,
        )
        self.operations = 0
        self.programs = 0
        self.failures: dict[str, int] = {}

    def __enter__(self) -> "Comparison":
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.__exit__()

    def _mmap_base(self) -> int:
        self.calls.begin(1, [])
        record = self.calls.call("mmap", 0, PAGE, 3, PRIVATE, WORD - 1, 0)
        self.calls.run()
        return self.calls.result(record) + PAGE

    def run(self, program: bytes) -> None:
        """Run a program both ways; DisagreementError with the whole story if they differ."""
        run = Run(self, program)
        try:
            run.build()
            self.calls.run()
            run.compare()
        finally:
            for fd in run.fds:
                os.close(fd)
        self.operations += len(run.steps)
        self.programs += 1

    def run_random(self, number: int, programs: int) -> None:
        """Run random programs, always the same for a number; a disagreement is shrunk before it is raised."""

        @seed(number)
        @settings(
            max_examples=programs,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.binary(min_size=STEPS * STEP_BYTES, max_size=STEPS * STEP_BYTES))
        def agree(program: bytes) -> None:
            self.run(program)

        agree()


class Run:
    """One run of one program."""

    def __init__(self, tester: Comparison, program: bytes) -> None:
        self.tester = tester
        self.calls = tester.calls
        self.program = program
        self.steps: list[Step] = []
        self.fds: list[int] = []
        self.files: list[tuple[int, File]] = []
        self.at = 0
        self.running = 0
        self.processes: dict[int, Process] = {}
        self.made = 1
        self.text = ""

    def build(self) -> None:
        """Run the program in the model and make the list of calls of it."""
        self._open_files()
        space = AddressSpace(self.tester.rules, machine=Machine(self.tester.rules))
        for start, end, flags, pgoff, file in self.tester.furniture.vmas:
            space.insert(VMA(start, end, flags, pgoff, file))
        self.processes[0] = Process(space, -1)
        for number in range(0, len(self.program) - STEP_BYTES + 1, STEP_BYTES):
            self._step(self.program[number : number + STEP_BYTES])
        self._finish()

    def _open_files(self) -> None:
        first = os.memfd_create("one")
        second = os.memfd_create("two")
        self.fds += [first, second]
        for fd in (first, second):
            os.ftruncate(fd, FILE_PAGES * PAGE)
        again = os.open(f"/proc/self/fd/{first}", os.O_RDONLY)
        self.fds.append(again)
        kept = self.calls.begin(PROCESSES, self.fds)
        files = []
        for fd, name in ((first, "one"), (second, "two")):
            stat = os.fstat(fd)
            device = (os.major(stat.st_dev), os.minor(stat.st_dev))
            files.append(
                File(
                    f"/memfd:{name} (deleted)",
                    FILE_PAGES * PAGE,
                    in_memory=True,
                    device=device,
                    inode=stat.st_ino,
                )
            )
        files.append(files[0].reopen(writable=False))
        self.files = list(zip(kept, files, strict=True))

    @property
    def space(self) -> AddressSpace:
        return self.processes[self.running].space

    def _step(self, choice: bytes) -> None:
        kind = choice[0]
        if not kind:
            return
        size = len(self.space)
        if kind < 70 and size < MOST_VMAS:
            self._mmap(choice)
        elif kind < 100:
            self._munmap(choice)
        elif kind < 135:
            self._mprotect(choice)
        elif kind < 165:
            self._mremap(choice)
        elif kind < 187:
            self._madvise(choice)
        elif kind < 232:
            self._touch(choice)
        elif kind < 240:
            self._brk(choice)
        elif kind < 246:
            self._fork(choice)
        elif kind < 252:
            self._switch(choice)
        else:
            self._end(choice)

    # What is chosen.

    def _address(self, how: int, fine: int) -> int:
        """An address in the arena, or at something that is mapped."""
        way = how & 15
        if way < 6:
            address = ARENA + fine % ARENA_PAGES * PAGE
        elif way < 13:
            vmas = list(self.space)
            vma = vmas[fine % len(vmas)]
            if vma.start in (LIST_AT, self.calls.code):
                vma = vmas[(fine + 1) % len(vmas)]
            if vma.start in (LIST_AT, self.calls.code):
                address = ARENA
            elif way < 9:
                address = vma.start
            elif way < 11:
                address = vma.end
            elif way == 11:
                address = vma.start + (how >> 4) * PAGE
            else:
                address = max(PAGE * 16, vma.start - ((how >> 4) + 1) * PAGE)
        elif way == 13:
            address = ARENA + (fine + 200) * PAGE
        elif way == 14:
            address = self.tester.rules.mmap_base - (fine % 64) * PAGE
        else:
            address = ARENA + fine % ARENA_PAGES * PAGE + (1 if how & 0xF0 == 0xF0 else 0)
        return address

    @staticmethod
    def _length(value: int) -> int:
        if value < 200:
            return (1 + value % 10) * PAGE
        if value < 230:
            return (1 + value % 48) * PAGE
        if value < 240:
            return (value - 229) * PAGE - (value % 3)
        return {
            240: 0,
            241: 512 * PAGE,
            242: 513 * PAGE,
            243: 1024 * PAGE,
            244: _HUGE,
            245: WORD - 1,
            246: 1,
            247: WORD - 2 * PAGE,
        }.get(value, 2 * PAGE)

    def _safe(self, start: int, length: int) -> bool:
        """Whether a range leaves the list and its code alone."""
        end = start + length + PAGE
        return end <= WORD and not any(
            start < high + PAGE and low < end
            for low, high in (
                (LIST_AT, LIST_AT + LIST_BYTES),
                (self.calls.code, self.calls.code + PAGE),
            )
        )

    # The calls.

    def _record(self, text: str, call: str, arguments: tuple[int, ...], work) -> None:
        """Make a call both ways."""
        self.text = text
        try:
            expected = work()
        except CallError as error:
            expected = -error.errno
            text += f" [{error}]"
        self._observe(text, self.calls.call(call, *arguments), expected)

    def _observe(self, text: str, record: int, expected: int) -> None:
        calls = self.calls
        pages = self._pages()
        regions = calls.room(REGIONS * 24)
        asked = calls.data(
            struct.pack(
                "<12Q",
                96,
                0,
                LIST_AT + LIST_BYTES,
                self.tester.rules.task_size,
                0,
                regions,
                REGIONS,
                0,
                0,
                0,
                IS_PRESENT | IS_GUARD,
                IS_FILE | IS_PRESENT | IS_ZERO | IS_GUARD,
            )
        )
        real_maps = calls.read_all(FD_MAPS, MAP_CHUNKS)
        scan = calls.call("ioctl", FD_PAGEMAP, PAGEMAP_SCAN, asked)
        maps = normal(self.space.maps_text().encode()) + self.tester.furniture.tail
        self.steps.append(Step(text, self.running, record, expected, maps, pages, real_maps, scan, regions))

    def _pages(self) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        for address, kind, _ in self.space.pages():
            category = KINDS[kind]
            if found and found[-1][1] == address and found[-1][2] == category:
                found[-1] = (found[-1][0], address + PAGE, category)
            else:
                found.append((address, address + PAGE, category))
        return found

    def _mmap(self, choice: bytes) -> None:
        _, what, how, fine, size, prot, fix, extra = choice
        address = self._address(how, fine)
        length = self._length(size)
        protection = PROTECTIONS[prot % len(PROTECTIONS)]
        flags = FIXING[fix % len(FIXING)]
        fd, file, offset = WORD - 1, None, 0
        if what < 150:
            flags |= PRIVATE
        elif what < 175:
            flags |= SHARED
        elif what < 250:
            fd, file = self.files[what % 3]
            flags |= c.MAP_PRIVATE if extra & 1 else c.MAP_SHARED
            offset = (fine + extra // 2) % (FILE_PAGES + 2) * PAGE
            if extra & 2:
                # So that pieces of a file are often neighbours in it too.
                offset = max(0, (address - ARENA) // PAGE % 32) * PAGE
            if extra == 255:
                offset += 1
        else:
            flags |= c.MAP_ANONYMOUS if what & 1 else 0
        if extra & 0xF0 == 0x20:
            flags |= c.MAP_NORESERVE
        elif extra & 0xF0 == 0x30:
            flags |= c.MAP_GROWSDOWN
        if not flags & (c.MAP_FIXED | c.MAP_FIXED_NOREPLACE) and extra & 0xC0:
            address = 0
        safe = self._safe(address, min(length, WORD - address) if address else 0)
        if not safe and (flags & c.MAP_FIXED or address + length < WORD):
            return
        name = file.name if file else -1
        self._record(
            f"mmap({address:#x}, {length:#x}, {protection}, {flags:#x}, {name}, {offset:#x})",
            "mmap",
            (address, length, protection, flags, fd, offset),
            lambda: self.space.mmap(address, length, protection, flags, file, offset).value,
        )

    def _munmap(self, choice: bytes) -> None:
        _, how, fine, size, *_ = choice
        address, length = self._address(how, fine), self._length(size)
        if not self._safe(address, min(length, _HUGE)):
            return
        self._record(
            f"munmap({address:#x}, {length:#x})",
            "munmap",
            (address, length),
            lambda: self.space.munmap(address, length).value,
        )

    def _mprotect(self, choice: bytes) -> None:
        _, how, fine, size, prot, *_ = choice
        address, length = self._address(how, fine), self._length(size)
        protection = PROTECTIONS[prot % len(PROTECTIONS)]
        if not self._safe(address, min(length, _HUGE)):
            return
        self._record(
            f"mprotect({address:#x}, {length:#x}, {protection})",
            "mprotect",
            (address, length, protection),
            lambda: self.space.mprotect(address, length, protection).value,
        )

    def _mremap(self, choice: bytes) -> None:
        _, how, fine, size, new, to, where, flag = choice
        address, old = self._address(how, fine), self._length(size)
        if flag & 0xF0 < 0x60:
            # Mostly what is one whole VMA from here on.
            vma = self.space.at(address)
            if vma is not None:
                old = vma.end - address
        length = old if new & 3 == 3 else self._length(new)
        flags = REMAPPING[(flag & 15) % len(REMAPPING)]
        target = self._address(to, where)
        if not self._safe(address, min(max(old, length), _HUGE)) or not self._safe(
            target, min(length, _HUGE)
        ):
            return
        self._record(
            f"mremap({address:#x}, {old:#x}, {length:#x}, {flags}, {target:#x})",
            "mremap",
            (address, old, length, flags, target),
            lambda: self.space.mremap(address, old, length, flags, target).value,
        )

    def _madvise(self, choice: bytes) -> None:
        _, how, fine, size, advice, *_ = choice
        address, length = self._address(how, fine), self._length(size)
        what = ADVICE[advice % len(ADVICE)]
        if what >= 102 and length > ARENA_PAGES * PAGE:
            return
        if not self._safe(address, min(length, _HUGE)):
            return
        self._record(
            f"madvise({address:#x}, {length:#x}, {what})",
            "madvise",
            (address, length, what),
            lambda: self.space.madvise(address, length, what).value,
        )

    def _touch(self, choice: bytes) -> None:
        _, how, fine, more, *_ = choice
        address = self._address(how, fine) + more % 8 * (PAGE // 2)
        write = more < 170
        if not self._safe(address, 0):
            return
        fault = self.space.touch(address, write)
        expected = 1 if fault.kind not in (FaultKind.SIGSEGV, FaultKind.SIGBUS) else -errno.EFAULT
        # A system call that stores or loads one byte takes the same faults as an instruction.
        if write:
            record = self.calls.call("read", FD_ZERO, address, 1)
        else:
            record = self.calls.call("pwrite64", self.calls.scratch, address, 1, 0)
        self._observe(f"{'write' if write else 'read'} {address:#x}: {fault.kind.value}", record, expected)

    def _brk(self, choice: bytes) -> None:
        _, how, fine, *_ = choice
        start = self.tester.rules.brk_start
        address = start + fine % 16 * PAGE // 2 if how < 200 else 0 if how < 220 else self._address(how, fine)
        self._record(f"brk({address:#x})", "brk", (address,), lambda: self.space.brk(address).value)

    # Processes.

    def _fork(self, _choice: bytes) -> None:
        if self.made >= PROCESSES:
            return
        child = self.made
        self.made += 1
        space = self.space.fork()
        self.processes[child] = Process(space, self.running)
        self.processes[self.running].children += 1
        record = self.calls.fork(child)
        self._observe(f"fork of {child}", record, 0)
        self.steps[-1].heard = "pid"

    def _switch(self, choice: bytes) -> None:
        alive = sorted(self.processes)
        to = alive[choice[1] % len(alive)]
        if to == self.running:
            return
        self.calls.switch(to)
        self.running = to
        self._observe_again(f"turn of {to}")

    def _end(self, choice: bytes) -> None:
        mine = [
            number
            for number, process in self.processes.items()
            if process.parent == self.running and not process.children
        ]
        if not mine:
            return
        self._end_child(mine[choice[1] % len(mine)])
        self._observe_again("end of a child")

    def _end_child(self, child: int) -> None:
        self.calls.end(child)
        self.processes.pop(child).space.clear()
        self.processes[self.running].children -= 1

    def _observe_again(self, text: str) -> None:
        """Look at the map and the pages without a call: lseek to the start of a file does nothing."""
        self._observe(text, self.calls.call("lseek", FD_MAPS, 0, 0), 0)

    def _finish(self) -> None:
        """Read flags and sizes of all VMAs of all processes, end them, children first."""
        self.smaps: list[tuple[int, tuple[int, list[int]], list[spacesmaps.Shown]]] = []
        for number in sorted(self.processes, reverse=True):
            process = self.processes[number]
            self.calls.switch(number)
            self.running = number
            seen = [
                spacesmaps.of(process.space, vma)
                for vma in process.space
                if vma.start not in (LIST_AT, self.calls.code)
            ]
            self.smaps.append((number, self.calls.read_all(FD_SMAPS, 24), seen))
        while len(self.processes) > 1:
            last = max(self.processes)
            parent = self.processes[last].parent
            self.calls.switch(parent)
            self.running = parent
            self._end_child(last)
        self.calls.switch(0)
        self.processes[0].space.check()
        self.processes[0].space.clear()
        machine = self.processes[0].space.machine
        left = machine.committed_pages - machine.leaked_pages
        if left:
            raise DisagreementError(f"{left} pages are charged to nobody\n{self.story(len(self.steps))}")

    # The comparison.

    def compare(self) -> None:
        """Compare every step; DisagreementError at the first that differs."""
        calls = self.calls
        failures = self.tester.failures
        for number, step in enumerate(self.steps):
            got = calls.result(step.record)
            if step.heard == "pid" and got > 0:
                got = 0
            if got != step.expected:
                self._differ(number, f"the kernel returned {_shown(got)}, the model {_shown(step.expected)}")
            if got < 0 and got > -200:
                name = f"{step.text.partition('(')[0].split()[0]} {errno.errorcode[-got]}"
                failures[name] = failures.get(name, 0) + 1
            maps = normal(calls.text(*step.real_maps))
            if maps != step.maps:
                self._differ(
                    number, f"the kernel's map\n{maps.decode()}the model's map\n{step.maps.decode()}"
                )
            count = calls.result(step.scan)
            assert 0 <= count < REGIONS, f"PAGEMAP_SCAN returned {count}"
            pages = _joined(calls.bytes_at(step.regions, 24 * count), calls.code)
            if pages != step.pages:
                self._differ(number, f"the kernel's pages {_pages(pages)}\nthe model's {_pages(step.pages)}")
        for number, text, seen in self.smaps:
            found = spacesmaps.read(calls.text(*text), (LIST_AT, self.calls.code))
            if found != seen:
                self._differ(
                    len(self.steps) - 1,
                    f"smaps of process {number}:\n"
                    f"the kernel's {spacesmaps.described(found)}\nthe model's {spacesmaps.described(seen)}",
                )

    def _differ(self, number: int, what: str) -> None:
        raise DisagreementError(f"{self.story(number + 1)}\n{what}")

    def story(self, count: int) -> str:
        """The steps so far, for people."""
        base = self.tester.rules.mmap_base
        lines = [f"arena {ARENA:#x}, mmap_base {base:#x}, brk {self.tester.rules.brk_start:#x}"]
        lines += [
            f"{number} [{step.process}] {step.text} = {_shown(step.expected)}"
            for number, step in enumerate(self.steps[:count])
        ]
        return "\n".join(lines)


def _joined(data: bytes, without: int) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    for start, end, category in struct.iter_unpack("<3Q", data):
        if start == without:
            continue
        if found and found[-1][1] == start and found[-1][2] == category:
            found[-1] = (found[-1][0], end, category)
        else:
            found.append((start, end, category))
    return found


def _pages(pages: list[tuple[int, int, int]]) -> str:
    names = {value: key for key, value in KINDS.items()}
    return " ".join(f"{start:#x}-{end:#x}:{names.get(category, category)}" for start, end, category in pages)


def _shown(value: int) -> str:
    return errno.errorcode.get(-value, str(value)) if -4096 < value < 0 else hex(value)
