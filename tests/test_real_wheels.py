"""Wheels from the package index, in processes that have nothing else."""

import pathlib
import subprocess
import sys
import zipfile
from typing import Literal

import pytest
from wheelfiles import isolated

import quire

# With what they need to be imported or, for pytest, to run the others' tests.
PROJECTS = {
    "numpy": (),
    "pandas": ("numpy", "python-dateutil", "six"),
    "lxml": (),
    "orjson": (),
    "pillow": (),
    "pydantic-core": ("typing-extensions",),
    "pytest": ("iniconfig", "packaging", "pluggy", "pygments"),
}


ROOT = pathlib.Path(__file__).resolve().parents[1]
# Compiling takes most of the time of these tests.
CODE_CACHE = ROOT / "target" / "code-cache"


@pytest.fixture(scope="session")
def wheels() -> dict[str, list[pathlib.Path]]:
    """The wheels of each project for this interpreter, kept with what is built."""
    names = sorted({*PROJECTS, *(need for needs in PROJECTS.values() for need in needs)})
    folder = ROOT / "target" / f"wheels-{sys.implementation.cache_tag}"
    command = [sys.executable, ROOT / "tools" / "wheelhouse.py", folder, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    if done.returncode:
        pytest.skip(done.stderr.strip()[-300:])
    paths = dict(zip(names, map(pathlib.Path, done.stdout.splitlines()), strict=True))
    return {name: [paths[each] for each in (name, *needs)] for name, needs in PROJECTS.items()}


Wheels = dict[str, list[pathlib.Path]]


@pytest.mark.parametrize("project", ["numpy", "pandas"])
@pytest.mark.parametrize("faults", ["thread", "signal", "sigsegv"])
def test_members_as_regions(
    wheels: Wheels, project: str, faults: Literal["thread", "signal", "sigsegv"]
) -> None:
    wheel = wheels[project][0]
    with zipfile.ZipFile(wheel) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
        by_size = sorted(files, key=lambda info: info.file_size)
        for info in [*by_size[:: len(by_size) // 20], by_size[-1]]:
            with quire.open(f"{wheel}!/{info.filename}", faults=faults) as region:
                assert bytes(region) == archive.read(info)


def test_numpy(wheels: Wheels) -> None:
    isolated(
        """
import importlib.metadata, pickle
import numpy as np
assert ".whl/numpy/" in np.__file__ and ".whl/numpy/_core/" in np._core._multiarray_umath.__file__
matrix = np.random.default_rng(1).random((200, 200)) + np.eye(200) * 200
assert np.allclose(np.linalg.inv(matrix) @ matrix, np.eye(200))
assert np.allclose(np.fft.ifft(np.fft.fft(matrix)), matrix)
assert (pickle.loads(pickle.dumps(matrix)) == matrix).all()
assert pickle.loads(pickle.dumps(np.add)) is np.add
assert importlib.metadata.version("numpy") == np.__version__
""",
        *wheels["numpy"],
        code_cache=CODE_CACHE,
    )


def test_libraries_that_need_each_other(wheels: Wheels) -> None:
    isolated(
        """
import quire.wheels
from PIL import ImageFont
assert ImageFont.load_default(12).getlength("quire") > 10
known = quire.wheels.stats().items()
whole = {name.rpartition("/")[2].partition("-")[0]: stats.whole for name, stats in known}
assert whole["libfreetype"] == whole["libharfbuzz"] == "", whole
""",
        *wheels["pillow"],
        code_cache=CODE_CACHE,
    )


def test_a_part_of_the_tests_of_numpy(wheels: Wheels) -> None:
    out = isolated(
        """
import importlib, inspect
ran = 0
for name in ("linalg.tests.test_regression", "fft.tests.test_helper", "_core.tests.test_abc"):
    module = importlib.import_module(f"numpy.{name}")
    assert ".whl/numpy/" in module.__file__
    for case in vars(module).values():
        if not (inspect.isclass(case) and case.__name__.startswith("Test")):
            continue
        for method, code in vars(case).items():
            if method.startswith("test") and list(inspect.signature(code).parameters) == ["self"]:
                getattr(case(), method)()
                ran += 1
print(ran)
""",
        *wheels["numpy"],
        *wheels["pytest"],
        code_cache=CODE_CACHE,
    )
    assert int(out) >= 20


def test_pandas(wheels: Wheels) -> None:
    isolated(
        """
import io
import pandas as pd
frame = pd.read_csv(io.StringIO("a,b\\n1,x\\n2,y\\n3,x\\n"), parse_dates=False)
assert frame.groupby("b")["a"].sum().to_dict() == {"x": 4, "y": 2}
assert pd.Timestamp("2024-02-28") + pd.Timedelta("1D") == pd.Timestamp(2024, 2, 29)
assert ".whl/pandas/_libs/" in pd._libs.lib.__file__
""",
        *wheels["pandas"],
        code_cache=CODE_CACHE,
    )


def test_lxml(wheels: Wheels) -> None:
    isolated(
        """
from lxml import etree, html, objectify
root = etree.fromstring("<a><b c='1'/><b c='2'/></a>")
assert root.xpath("//b[@c='2']/@c") == ["2"]
try:
    etree.fromstring("<a>")
except etree.XMLSyntaxError as error:
    assert error.lineno == 1
else:
    raise AssertionError
assert html.fromstring("<p>x<p>y").text_content() == "xy"
assert objectify.fromstring("<a><b>1</b></a>").b == 1
sheet = etree.XSLT(etree.XML('<x:stylesheet version="1.0" xmlns:x="http://www.w3.org/1999/XSL/Transform">'
    '<x:template match="/"><r><x:value-of select="count(//b)"/></r></x:template></x:stylesheet>'))
assert sheet(root).getroot().text == "2"
""",
        *wheels["lxml"],
        code_cache=CODE_CACHE,
    )


def test_modules_in_rust(wheels: Wheels) -> None:
    isolated(
        """
import orjson
from pydantic_core import SchemaValidator, ValidationError, core_schema
assert orjson.loads(orjson.dumps({"a": [1, 2.5, None]})) == {"a": [1, 2.5, None]}
validator = SchemaValidator(core_schema.list_schema(core_schema.int_schema()))
assert validator.validate_python(["1", 2]) == [1, 2]
try:
    validator.validate_python(["x"])
except ValidationError as error:
    assert error.error_count() == 1
else:
    raise AssertionError
""",
        *wheels["orjson"],
        *wheels["pydantic-core"],
        code_cache=CODE_CACHE,
    )
