"""ELF files: ours against readelf and pyelftools, on what this machine has installed."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from elfpeers import against_pyelftools, against_readelf, elf_files, is_sampled

import quire.image
from quire.image.elf import ElfImage

# All of them take some minutes: QUIRE_ALL_IMAGES=1.
ONE_IN = 1 if os.environ.get("QUIRE_ALL_IMAGES") else 40
LARGEST = (1 << 40) if ONE_IN == 1 else 8 << 20


def sampled() -> list[pathlib.Path]:
    return [path for path in elf_files() if is_sampled(path, ONE_IN) and path.stat().st_size <= LARGEST]


@pytest.fixture(scope="module")
def files() -> list[pathlib.Path]:
    found = sampled()
    assert found, "no ELF file is installed"
    return found


def opened(path: pathlib.Path) -> ElfImage:
    image = quire.image.read(path)
    assert isinstance(image, ElfImage)
    return image


@pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf")
@pytest.mark.timeout(3600)
def test_as_readelf_has_it(files: list[pathlib.Path]) -> None:
    differing = {}
    for path in files:
        with opened(path) as image:
            if found := against_readelf(image, path):
                differing[str(path)] = found
    assert not differing


@pytest.mark.timeout(3600)
def test_as_pyelftools_has_it(files: list[pathlib.Path]) -> None:
    differing = {}
    for path in files:
        with opened(path) as image:
            if found := against_pyelftools(image, path, symbols=path.stat().st_size < 1 << 20):
                differing[str(path)] = found
    assert not differing


@pytest.mark.timeout(3600)
def test_what_is_installed_would_be_loaded(files: list[pathlib.Path]) -> None:
    for path in files:
        with opened(path) as image:
            image.check()


def test_the_package_is_there_without_an_import_of_its_own() -> None:
    script = "import quire, sys; print('quire.image' in sys.modules, quire.image.read(sys.executable).kind)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False executable\n"
