"""ELF files of wheels for other machines: 32 and 64 bits, both byte orders."""

import itertools
import pathlib
import shutil
import zipfile

import pytest
from elfpeers import against_pyelftools, against_readelf
from foreignwheels import downloaded

import quire.image
from quire.image.elf import ElfImage

# Platform to project, and what its shared objects are.
WHEELS = {
    "manylinux_2_17_aarch64": ("markupsafe", "aarch64", 64, "little"),
    "manylinux_2_17_armv7l": ("charset-normalizer", "arm", 32, "little"),
    "manylinux_2_17_s390x": ("charset-normalizer", "s390", 64, "big"),
    "manylinux_2_17_ppc64le": ("charset-normalizer", "ppc64", 64, "little"),
    "manylinux_2_17_i686": ("markupsafe", "i386", 32, "little"),
}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf")
@pytest.mark.parametrize("platform", WHEELS)
def test_other_machines(platform: str, pytestconfig: pytest.Config, tmp_path: pathlib.Path) -> None:
    project, machine, bits, byte_order = WHEELS[platform]
    wheels = downloaded(
        pytestconfig,
        (platform, platform.replace("2_17", "2_28"), platform.replace("_2_17_", "2014_")),
        (project,),
    )
    with zipfile.ZipFile(wheels[0]) as archive:
        names = [name for name in archive.namelist() if ".so" in name]
        assert names
        for name in names:
            path = tmp_path / pathlib.Path(name).name
            path.write_bytes(archive.read(name))
            # From the archive, as it is.
            with quire.image.read(f"{wheels[0]}!/{name}") as image:
                assert isinstance(image, ElfImage)
                assert (image.machine, image.bits, image.byte_order) == (machine, bits, byte_order)
                assert image.kind == "shared object"
                assert against_readelf(image, path) == []
                assert against_pyelftools(image, path, symbols=True) == []
                slots = [slot for slot in image.slots() if slot.kind in ("function", "data")]
                assert slots
                if image.machine_number in (3, 62, 183):
                    assert all(slot.stub for slot in slots if slot.kind == "function")
                    stubs = [slot.stub for slot in slots if slot.kind == "function" and slot.stub]
                    # Linkers write them in the order of their slots.
                    assert stubs == sorted(stubs)
                    assert len({after - before for before, after in itertools.pairwise(stubs)}) <= 1
                else:
                    assert not any(slot.stub for slot in slots)
                image.check()
