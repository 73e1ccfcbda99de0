"""FatELF files: round trips, what is refused, the command."""

import os
import pathlib
import stat
import struct

import pytest
from elffiles import AARCH64, I386, MIPS, S390X, X86_64, head, real_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import nothing_left

import quire
from quire import cli
from quire.errors import Malformed
from quire.image import fatelf
from quire.image.machines import Ident, machine_name, native
from quire.sources import BytesSource

Folder = pathlib.Path

PARTS = [head(X86_64, b"first" * 900), head(S390X, b"second"), head(AARCH64)]


def glued(folder: Folder, parts: list[bytes] = PARTS) -> Folder:
    output = folder / "fat"
    fatelf.glue(parts, output, force=True)
    return output


def changed(data: bytes, offset: int, form: str, value: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(form, out, offset, value)
    return bytes(out)


def test_layout(tmp_path: Folder) -> None:
    data = glued(tmp_path).read_bytes()
    assert data[:8] == bytes.fromhex("fa700e1f 0100 03 00")
    assert struct.unpack_from("<HBBBBHQQ", data, 8) == (62, 0, 0, 2, 1, 0, 4096, len(PARTS[0]))
    assert struct.unpack_from("<HBBBBHQQ", data, 32) == (22, 0, 0, 2, 2, 0, 12288, len(PARTS[1]))
    # Pages of aarch64 can have 64 KiB.
    assert struct.unpack_from("<HBBBBHQQ", data, 56) == (183, 0, 0, 2, 1, 0, 65536, len(PARTS[2]))
    assert len(data) == 65536 + len(PARTS[2])
    assert not any(data[80:4096])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    idents=st.lists(
        st.builds(
            Ident,
            st.integers(0, 65535),
            st.integers(0, 255),
            st.integers(0, 255),
            st.sampled_from([32, 64]),
            st.sampled_from(["little", "big"]),
        ),
        min_size=1,
        max_size=12,
        unique=True,
    ),
    more=st.binary(max_size=9000),
)
def test_round_trip(tmp_path: Folder, idents: list[Ident], more: bytes) -> None:
    parts = [head(ident, more[number:]) for number, ident in enumerate(idents)]
    fat = glued(tmp_path, parts)
    found = fatelf.records(fat)
    assert [record.ident for record in found] == idents
    assert fatelf.problems(fat) == []
    names = fatelf.split(fat, tmp_path / "part", force=True)
    assert len({name for name, _ in names}) == len(idents)
    for (name, _), part, record in zip(names, parts, found, strict=True):
        assert pathlib.Path(name).read_bytes() == part
        assert fatelf.select(found, record.full_target) is record
        os.unlink(name)


def test_real_objects_of_several_machines(pytestconfig: pytest.Config, tmp_path: Folder) -> None:
    objects = real_objects(pytestconfig.cache)
    files = []
    for machine, content in objects.items():
        files.append(tmp_path / f"{machine}.so")
        files[-1].write_bytes(content)
        files[-1].chmod(0o750)
    fat = tmp_path / "fat.so"
    fatelf.glue(files, fat)
    assert stat.S_IMODE(fat.stat().st_mode) == 0o750
    assert [record.ident.machine for record in fatelf.records(fat)] == [*objects]
    for machine, content in objects.items():
        out = tmp_path / "out"
        fatelf.extract(fat, machine_name(machine), out, force=True)
        assert out.read_bytes() == content
        assert stat.S_IMODE(out.stat().st_mode) == 0o750
    offset, size = fatelf.record_for_this_machine(fat)
    assert fat.read_bytes()[offset : offset + size] == objects[native().machine]


def test_member_is_sealed_memory(tmp_path: Folder) -> None:
    fat = glued(tmp_path)
    with nothing_left():
        fd = fatelf.member(fat, "s390")
        try:
            assert os.pread(fd, 1 << 20, 0) == PARTS[1]
            assert not os.get_inheritable(fd)
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)
        finally:
            os.close(fd)
        with pytest.raises(LookupError, match="no record is for mips; there are x86_64:64:le:osabi0"):
            fatelf.member(fat, "mips")


def test_bytes_sources_and_regions_are_read_as_files_are(tmp_path: Folder) -> None:
    fat = glued(tmp_path)
    found = fatelf.records(fat)
    assert fatelf.records(fat.read_bytes()) == found
    assert fatelf.records(str(fat)) == found
    with BytesSource(fat.read_bytes()) as source:
        assert fatelf.records(source) == found
        assert not source.closed
    with quire.open(fat) as region:
        assert fatelf.records(region) == found


@pytest.mark.parametrize(
    ("offset", "form", "value", "problem"),
    [
        (0, "<I", 0x464C457F, r"begins with 7f 45 4c 46"),
        (4, "<H", 2, r"version 2, and only 1 is known"),
        (6, "<B", 0, r"number of records is 0"),
        (7, "<B", 9, r"reserved byte of the header is 9"),
        (8, "<H", 3, r"record 0: it says i386:64:le:osabi0:version0, the ELF file at byte 4096 says x86_64"),
        (10, "<B", 3, r"record 0: it says .*osabi3.*, the ELF file .*osabi0"),
        (12, "<B", 3, r"record 0: its word size is 3"),
        (13, "<B", 3, r"record 0: its byte order is 3"),
        (13, "<B", 2, r"record 0: it says x86_64:64:be"),
        (14, "<H", 1, r"record 0: its reserved bytes are 0x0001"),
        (16, "<Q", 4097, r"record 0: its offset 4097 is no multiple of 4096"),
        (16, "<Q", 0, r"record 0: its offset 0 lies within the 80 bytes"),
        (16, "<Q", 1 << 63, r"record 0: its range, \d+ bytes from 9223372036854775808, ends behind"),
        (24, "<Q", (1 << 64) - 1, r"record 0: its range"),
        (24, "<Q", 0, r"record 0: there is no ELF file at byte 4096"),
        (24, "<Q", 19, r"record 0: there is no ELF file at byte 4096"),
        (24, "<Q", 8193, r"records 0 and 1 overlap at byte 12288"),
        (40, "<Q", 4096, r"record 1: it says s390.*says x86_64"),
    ],
)
def test_broken_rules(tmp_path: Folder, offset: int, form: str, value: int, problem: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(changed(glued(tmp_path).read_bytes(), offset, form, value))
    with pytest.raises(Malformed, match=problem) as caught:
        fatelf.records(path)
    assert str(path) in str(caught.value)
    assert fatelf.problems(path)


def test_duplicates_and_overlap_across_others(tmp_path: Folder) -> None:
    data = glued(tmp_path).read_bytes()
    twice = data[:32] + data[8:32] + data[56:]
    assert fatelf.problems(twice) == [
        "record 1: a record before it is for x86_64:64:le:osabi0:version0 too",
        "records 0 and 1 overlap at byte 4096",
    ]
    # The first reaches over the second into the third.
    wide = changed(data, 24, "<Q", 65537 - 4096)
    assert fatelf.problems(wide) == [
        "records 0 and 1 overlap at byte 12288",
        "records 0 and 2 overlap at byte 65536",
    ]


@pytest.mark.parametrize("length", [0, 3, 7, 8, 79, 80, 4096, 4115])
def test_truncated(tmp_path: Folder, length: int) -> None:
    with pytest.raises(Malformed):
        fatelf.records(glued(tmp_path).read_bytes()[:length])


def test_zero_is_read_as_big_endian_and_never_written(tmp_path: Folder) -> None:
    data = glued(tmp_path, [head(MIPS), head(S390X)]).read_bytes()
    assert (data[13], data[37]) == (2, 2)
    old = changed(changed(data, 13, "<B", 0), 37, "<B", 0)
    assert [record.ident for record in fatelf.records(old)] == [MIPS, S390X]
    zero_and_two = old[:32] + bytes([*old[8:13], 2]) + old[38:]
    assert any("a record before it" in each for each in fatelf.problems(zero_and_two))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), max_size=6), cut=st.integers(0, 99)
)
def test_whatever_is_in_it_nothing_else_is_raised(
    tmp_path: Folder, changes: list[tuple[int, int]], cut: int
) -> None:
    path = tmp_path / "fat"
    data = bytearray(path.read_bytes() if path.exists() else glued(tmp_path).read_bytes())
    for offset, value in changes:
        data[offset] = value
    content = bytes(data[: len(data) - cut])
    try:
        found = fatelf.records(content)
    except Malformed:
        assert fatelf.problems(content)
        return
    assert fatelf.problems(content) == []
    for record in found:
        assert record.offset + record.size <= len(content)


def test_what_cannot_be_glued(tmp_path: Folder) -> None:
    output = tmp_path / "out"
    with nothing_left():
        with pytest.raises(ValueError, match="are both for x86_64:64:le:osabi0:version0"):
            fatelf.glue([head(X86_64), head(I386), head(X86_64)], output)
        with pytest.raises(Malformed, match="does not begin like an ELF file"):
            fatelf.glue([head(X86_64), b"#!/bin/sh\n"], output)
        with pytest.raises(ValueError, match="1 to 255 ELF files, not 0"):
            fatelf.glue([], output)
        with pytest.raises(ValueError, match="1 to 255 ELF files, not 256"):
            fatelf.glue([head(X86_64._replace(machine=n)) for n in range(256)], output)
        with pytest.raises(FileNotFoundError):
            fatelf.glue([tmp_path / "none"], output)
        assert os.listdir(tmp_path) == []
        fatelf.glue([head(X86_64._replace(machine=n)) for n in range(255)], output)
        assert len(fatelf.records(output)) == 255
        with pytest.raises(FileExistsError):
            fatelf.glue([head(X86_64)], output)
        assert os.listdir(tmp_path) == ["out"]


def test_targets(tmp_path: Folder) -> None:
    x32, gnu = X86_64._replace(bits=32), X86_64._replace(osabi=3)
    found = fatelf.records(glued(tmp_path, [head(i) for i in (X86_64, x32, AARCH64, S390X)]))
    assert [record.target for record in found] == ["x86_64", "x86_64:32:le", "aarch64", "s390"]
    for number, target in enumerate(["x86_64", "x86_64:32", "arm64", "machine-22:be"]):
        assert fatelf.select(found, target) is found[number]
        assert fatelf.select(found, f"record{number}") is found[number]
    for target, message in {
        "vax": "no machine is called 'vax'",
        "x86_64:middle": "'middle' is none of",
        "x86_64:osabi": "'osabi' is none of",
        "x86_64:le": "fits 2 records",
        "machine-70000": "no machine is called",
        "": "no machine is called ''",
    }.items():
        with pytest.raises(ValueError, match=message):
            fatelf.select(found, target)
    with pytest.raises(LookupError, match="records are 0 to 3"):
        fatelf.select(found, "record4")
    both = fatelf.records(glued(tmp_path, [head(X86_64), head(gnu)]))
    with pytest.raises(ValueError, match="fits 2"):
        fatelf.select(both, "x86_64")
    assert fatelf.select(both, "x86_64:osabi3").ident == gnu
    names = [name for name, _ in fatelf.split(glued(tmp_path, [head(X86_64), head(gnu)]), tmp_path / "s")]
    assert [os.path.basename(name) for name in names] == [
        "s-x86_64:64:le:osabi0:version0",
        "s-x86_64:64:le:osabi3:version0",
    ]


def test_this_machine(tmp_path: Folder) -> None:
    here = native()
    wrong_order = here._replace(byte_order="big" if here.byte_order == "little" else "little")
    fat = glued(tmp_path, [head(wrong_order), head(here._replace(osabi=9)), head(here)])
    assert fatelf.record_for_this_machine(fat) == (fatelf.records(fat)[2].offset, 20)
    with pytest.raises(LookupError, match=f"no record is for {here.name}; there are"):
        fatelf.record_for_this_machine(glued(tmp_path, [head(wrong_order)]))


def test_command(tmp_path: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    here = native()
    files = []
    for number, ident in enumerate([here, S390X]):
        files.append(str(tmp_path / f"elf{number}"))
        pathlib.Path(files[-1]).write_bytes(head(ident, b"more"))
    fat = str(tmp_path / "fat")
    assert cli.main(["fatelf", "glue", fat, *files]) == 0
    assert cli.main(["fatelf", "glue", fat, *files]) == 1
    assert "use force" in capsys.readouterr().err
    assert cli.main(["fatelf", "glue", "--force", fat, *files]) == 0
    assert cli.main(["fatelf", "info", fat]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 6, shown
    assert shown[-2].endswith("this machine")
    assert not shown[-1].endswith("this machine")
    assert cli.main(["fatelf", "validate", fat]) == 0
    assert cli.main(["fatelf", "verify", fat]) == 0
    assert cli.main(["fatelf", "verify", fat, "s390:64:be"]) == 0
    assert cli.main(["fatelf", "verify", fat, "mips"]) == 1
    assert "no record is for mips" in capsys.readouterr().err
    assert cli.main(["fatelf", "extract", fat, "s390", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == head(S390X, b"more")
    assert cli.main(["fatelf", "split", fat]) == 0
    assert (tmp_path / f"fat-{here.name}").read_bytes() == head(here, b"more")
    pathlib.Path(fat).write_bytes(changed(pathlib.Path(fat).read_bytes(), 7, "<B", 1))
    capsys.readouterr()
    assert cli.main(["fatelf", "validate", fat]) == 1
    assert "reserved byte of the header is 1" in capsys.readouterr().err
    assert cli.main(["fatelf", "info", str(tmp_path / "none")]) == 1
    with pytest.raises(SystemExit) as caught:
        cli.main(["fatelf"])
    assert caught.value.code == 2
