"""Wheels made by hand, extension modules compiled for them, and processes that have nothing but wheels."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import quire

HOME = pathlib.Path(quire.__file__).parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: false\nTag: {tag}\n"

# quire is the only thing that is imported from elsewhere; -I -S leave the standard library and nothing more.
PREAMBLE = """
import sys
sys.path.insert(0, {home!r})
import quire.wheels
sys.path.remove({home!r})
quire.wheels.enable()
sys.path[:0] = {wheels!r}
"""

SINGLE_PHASE = """
#include <Python.h>
{declared}
static int calls;
static PyObject *value(PyObject *self, PyObject *none) {{ return PyLong_FromLong({value}); }}
static PyObject *count(PyObject *self, PyObject *none) {{ return PyLong_FromLong(++calls); }}
static PyMethodDef methods[] = {{
    {{"value", value, METH_NOARGS, ""}}, {{"count", count, METH_NOARGS, ""}}, {{0}}}};
static struct PyModuleDef def = {{PyModuleDef_HEAD_INIT, "{name}", "", -1, methods}};
PyMODINIT_FUNC PyInit_{name}(void) {{ return PyModule_Create(&def); }}
"""
MULTI_PHASE = SINGLE_PHASE.replace("-1, methods", "0, methods").replace("PyModule_Create", "PyModuleDef_Init")


def compiled_library(folder: pathlib.Path, name: str, source: str, *flags: str) -> bytes:
    """Compile C to a shared object, which is also left in the folder for others to be linked with."""
    code, library = folder / f"{name}.c", folder / name
    code.write_text(source, "ascii")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, code, f"-L{folder}", *flags], check=True)
    return library.read_bytes()


def extension(
    folder: pathlib.Path,
    name: str,
    value: str = "42",
    *flags: str,
    declared: str = "",
    template: str = MULTI_PHASE,
) -> bytes:
    """Compile an extension module whose ``value()`` is a C expression and whose ``count()`` counts calls."""
    include = sysconfig.get_path("include")
    if not pathlib.Path(include, "Python.h").exists():
        pytest.skip(f"no {include}/Python.h, so no extension module can be compiled")
    source = template.format(name=name, value=value, declared=declared)
    return compiled_library(folder, f"{name}.built", source, f"-I{include}", *flags)


def make_wheel(
    path: pathlib.Path,
    members: dict[str, str | bytes],
    tag: str = "py3-none-any",
    method: int = zipfile.ZIP_DEFLATED,
) -> pathlib.Path:
    """Write a wheel with these members, its metadata beside them."""
    info = "made-1.0.dist-info"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", METADATA.format(name="made"))
        archive.writestr(f"{info}/WHEEL", WHEEL.format(tag=tag))
        archive.writestr(f"{info}/RECORD", "")
    return path


def isolated(script: str, *wheels: pathlib.Path, code_cache: pathlib.Path | str = "off") -> str:
    """Run a script in a process that has the standard library, quire and these wheels; what it printed."""
    preamble = PREAMBLE.format(home=str(HOME), wheels=[str(wheel) for wheel in wheels])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "faulthandler", "-c", preamble + script],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env=os.environ | {"QUIRE_CODE_CACHE": str(code_cache)},
    )
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout
