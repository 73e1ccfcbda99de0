"""Stubs of procedure linkage tables: ours against objdump."""

import itertools
import pathlib
import platform
import shutil
import subprocess

import pytest
from elfpeers import against_objdump, elf_files, is_sampled
from libraries import compiled

import quire.image
from quire.image.elf import ElfImage

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")

CALLS = """
int one(void); int two(void); extern int (*kept)(void);
int call(void) { return one() + two(); }
int (*address(void))(void) { return one; }
static int first(void) { return 1; }
static int (*pick(void))(void) { return first; }
static int chosen(void) __attribute__((ifunc("pick")));
int through(void) { return chosen(); }
"""


def opened(path: pathlib.Path) -> ElfImage:
    image = quire.image.read(path)
    assert isinstance(image, ElfImage)
    return image


def test_what_is_installed() -> None:
    differing, count = {}, 0
    for path in elf_files():
        if is_sampled(path, 40) and path.stat().st_size <= 8 << 20:
            with opened(path) as image:
                count += sum(slot.stub is not None for slot in image.slots())
                if found := against_objdump(image, path):
                    differing[str(path)] = found
    assert not differing
    assert count > 500


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of compilers for x86-64")
@pytest.mark.parametrize(
    ("bits", "bound", "protected"), [*itertools.product(("64", "32"), ("lazy", "now"), ("none", "full"))]
)
def test_shapes(tmp_path: pathlib.Path, bits: str, bound: str, protected: str) -> None:
    flags = (f"-m{bits}", "-nostdlib", f"-Wl,-z,{bound}", f"-fcf-protection={protected}")
    try:
        path = compiled(tmp_path, "libx.so", CALLS, *flags)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cc {' '.join(flags)}: {error.stderr.strip()[-200:]}")
    with opened(path) as image:
        assert against_objdump(image, path) == []
        found = {slot.symbol.name: slot for slot in image.slots() if slot.symbol and slot.stub}
        assert found.keys() == {"one", "two"}
        code = next(section for section in image.sections if section.name == ".text")
        assert all(slot.stub and slot.stub < code.address for slot in found.values())
        assert [slot.stub for slot in image.slots() if slot.kind == "ifunc"] != [None]
