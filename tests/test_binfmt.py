"""Rules of ``binfmt_misc``: read from a real kernel, in a namespace of its own; matched as it matches."""

import json
import os
import pathlib

import pytest
from elffiles import PRINTER, compiled_program
from namespaces import with_mounts

from quire.errors import Malformed, Unsupported
from quire.image import binfmt

Folder = pathlib.Path

INSIDE = """
import errno, json, os, subprocess, sys
from quire.image import binfmt
DIRECTORY = binfmt.DIRECTORY
def register(rule):
    with open(f"{DIRECTORY}/register", "wb", buffering=0) as file:
        file.write(rule.encode("latin-1").replace(b"@", sys.argv[1].encode()))
def put(name, value):
    with open(f"{DIRECTORY}/{name}", "w") as file:
        file.write(value)
def started(path):
    try:
        done = subprocess.run(["argv0", "a"], executable=path, capture_output=True, check=True)
    except OSError as error:
        return errno.errorcode[error.errno]
    return [each.decode() for each in done.stdout.split(b"\\0")[:-1]]
def taken(path):
    with open(path, "rb") as file:
        rule = binfmt.match(binfmt.rules(), file.read(256), path)
    return rule and rule.name
"""


def in_namespace(script: str, *arguments: str) -> list[object]:
    """Run a script with a ``binfmt_misc`` of its own; what it printed as JSON, a value for each line."""
    printed = with_mounts(f"mount -t binfmt_misc binfmt_misc {binfmt.DIRECTORY}", INSIDE + script, *arguments)
    return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture(scope="module")
def printer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program that prints its arguments, each with a zero behind it."""
    return str(compiled_program(tmp_path_factory.mktemp("p"), PRINTER, "i", "-static"))


def test_rules_are_read_as_they_were_made(printer: str) -> None:
    [found] = in_namespace(
        r"""
register(r":ext:E::foo::@:")
register(r":magic:M:2:A\x00B:\xff\x00\x0f:@:PF")
register(r":plain:M::xyz::@:OC")
put("ext", "0")
print(json.dumps([[r.name, r.interpreter, r.enabled, sorted(r.flags), r.extension, r.offset, r.magic.hex(),
    r.mask.hex()] for r in binfmt.rules()]))
""",
        printer,
    )
    assert sorted(found) == [
        ["ext", printer, False, [], "foo", 0, "", ""],
        ["magic", printer, True, ["F", "P"], None, 2, "410042", "ff000f"],
        ["plain", printer, True, ["C", "O"], None, 0, "78797a", "ffffff"],
    ]


CONTENTS = {
    "a.foo": b"text",
    "foo": b"text",
    "dir.foo/x": b"text",
    "b.foo.bar": b"text",
    ".foo": b"",
    "c.FOO": b"text",
    "m1": b"..AxB",
    "m2": b"..A\0\x52 and more",
    "m3": b"..A\0\x53",
    "m4": b"..A\0",
    "m5": b"AxB",
    "end": b"." * 253 + b"end",
    "past": b"." * 254 + b"end",
    "script": b"#!/bin/false\n",
    "both.foo": b"..AxB",
    "off.bar": b"",
}


def test_matching_is_the_kernels(tmp_path: Folder, printer: str) -> None:
    for name, content in CONTENTS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755)
    # Which rule was taken shows in the interpreter's name.
    for rule in ("ext", "magic", "end", "sh", "off"):
        os.link(printer, tmp_path / f"i-{rule}")
    results = in_namespace(
        r"""
folder = sys.argv[1]
register(r":ext:E::foo::@/i-ext:")
register(r":magic:M:2:A\x00B:\xff\x00\x0f:@/i-magic:")
register(r":end:M:253:end::@/i-end:")
register(r":sh:M::#!/bin/false::@/i-sh:")
register(r":off:E::bar::@/i-off:")
put("off", "0")
for name in json.loads(sys.argv[2]):
    path = f"{folder}/{name}"
    print(json.dumps([name, taken(path), started(path)]))
put("status", "0")
print(json.dumps([None, taken(f"{folder}/a.foo"), started(f"{folder}/a.foo")]))
""",
        str(tmp_path),
        json.dumps([*CONTENTS]),
    )
    taken = {}
    for name, rule, started in results:
        if rule is None:
            assert started == "ENOEXEC", name
        else:
            assert started == [str(tmp_path / f"i-{rule}"), str(tmp_path / name), "a"], name
        taken[name] = rule
    assert taken == dict.fromkeys(CONTENTS) | {
        "a.foo": "ext",
        ".foo": "ext",
        "m1": "magic",
        "m2": "magic",
        "end": "end",
        "script": "sh",
        "both.foo": "magic",
        None: None,
    }


def test_the_newest_rule_is_tried_first(tmp_path: Folder, printer: str) -> None:
    path = tmp_path / "a.foo"
    path.write_bytes(b"..AxB")
    path.chmod(0o755)
    for number in range(30):
        os.link(printer, tmp_path / f"i-{number}")
    for rule, started in in_namespace(
        r"""
for number in range(30):
    register(f":{number}:E::foo::@/i-{number}:")
    print(json.dumps([taken(f"{sys.argv[1]}/a.foo"), started(f"{sys.argv[1]}/a.foo")]))
for number in (29, 3, 28):
    put(str(number), "-1")
    print(json.dumps([taken(f"{sys.argv[1]}/a.foo"), started(f"{sys.argv[1]}/a.foo")]))
""",
        str(tmp_path),
    ):
        assert started[0] == str(tmp_path / f"i-{rule}")


def test_what_cannot_be_seen_is_said(tmp_path: Folder) -> None:
    with pytest.raises(Unsupported, match="is not mounted at"):
        binfmt.rules(str(tmp_path))


def test_rules_that_are_removed_meanwhile_are_left_out(tmp_path: Folder) -> None:
    (tmp_path / "status").write_bytes(b"enabled\n")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "there").write_bytes(b"enabled\ninterpreter /i\nflags: \nextension .x\n")
    assert [rule.name for rule in binfmt.rules(str(tmp_path))] == ["there"]
    (tmp_path / "status").write_bytes(b"disabled\n")
    assert binfmt.rules(str(tmp_path)) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"perhaps\ninterpreter /i\nflags: \nextension .x\n",
        b"enabled\nflags: \nextension .x\n",
        b"enabled\ninterpreter /i\nflags: \n",
        b"enabled\ninterpreter /i\nflags: \noffset 0\nmagic 7\n",
        b"enabled\ninterpreter /i\nflags: \noffset 0\nmagic xx\n",
        b"enabled\ninterpreter /i\nflags: \noffset -1\nmagic 7f\n",
        b"enabled\ninterpreter /i\nflags: \noffset x\nmagic 7f\n",
        b"enabled\ninterpreter /i\nflags: \noffset 0\nmagic 7f45\nmask ff\n",
        b"enabled\nwhatever\n",
        b"\xff\xfe",
    ],
)
def test_unknown_forms(text: bytes) -> None:
    with pytest.raises(Malformed, match="the rule r of binfmt_misc"):
        binfmt.parse("r", text)


def test_offsets_past_the_buffer_match_nothing() -> None:
    rule = binfmt.parse("r", b"enabled\ninterpreter /i\nflags: \noffset 255\nmagic 0000\n")
    assert not rule.matches(bytes(300), "/x")
