"""ELF files: small ones that are made here, and real ones for other machines."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

from quire.image.machines import Ident

X86_64 = Ident(62, 0, 0, 64, "little")
I386 = Ident(3, 0, 0, 32, "little")
AARCH64 = Ident(183, 0, 0, 64, "little")
S390X = Ident(22, 0, 0, 64, "big")
MIPS = Ident(8, 0, 0, 32, "big")

# What wheels call machines, by e_machine.
PLATFORMS = {62: "x86_64", 183: "aarch64", 22: "s390x", 21: "ppc64le"}

PRINTER = """
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv) {
    for (int i = 0; i < argc; i++) { write(1, argv[i], strlen(argv[i]) + 1); }
    return 0;
}
"""


def head(ident: Ident, more: bytes = b"") -> bytes:
    """The first bytes of an ELF file for a machine, and what follows."""
    order = "little" if ident.byte_order == "little" else "big"
    start = bytes([ident.bits // 32, 1 if order == "little" else 2, 1, ident.osabi, ident.osabi_version])
    return b"\x7fELF" + start + bytes(7) + (2).to_bytes(2, order) + ident.machine.to_bytes(2, order) + more


def compiled_program(folder: pathlib.Path, source: str, name: str = "program", *flags: str) -> pathlib.Path:
    """Compile a C program."""
    code, program = folder / f"{name}.c", folder / name
    code.write_text(source, "ascii")
    subprocess.run(["cc", "-O1", "-o", program, code, *flags], check=True)
    return program


def real_objects(cache: pytest.Cache | None) -> dict[int, bytes]:
    """The shared object of a small package from the index, for several machines, by ``e_machine``."""
    if cache is None:
        pytest.skip("pytest has no cache (-p no:cacheprovider), so there is no place for wheels")
    folder = cache.mkdir("wheels-foreign")
    missing = [name for name in PLATFORMS.values() if not [*folder.glob(f"*{name}.whl")]]
    for name in missing:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--retries=1", "--timeout=10", f"--dest={folder}"]
        command += ["--implementation=cp", "--python-version=3.11", f"--platform=manylinux2014_{name}"]
        done = subprocess.run(
            [*command, f"--platform=manylinux_2_28_{name}", "charset-normalizer"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode:
            pytest.skip(f"pip cannot download a wheel for {name}: {done.stderr.strip()[-300:]}")
    found = {}
    for machine, name in PLATFORMS.items():
        with zipfile.ZipFile(next(folder.glob(f"*{name}.whl"))) as wheel:
            member = min(each for each in wheel.namelist() if each.endswith(".so"))
            found[machine] = wheel.read(member)
    return found
