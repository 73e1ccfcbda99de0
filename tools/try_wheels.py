"""Try real wheels of the package index, with programs and with their projects' own tests.

Usage: python tools/try_wheels.py [--wheel-dir DIR] [--docs FILE] [NAME...]

Downloads what is missing; torch needs 4 GB. Each project runs in a process of its own, started by ``quire
run``, that has wheels and nothing else. Writes the table of docs/wheels.md if all were tried. Ends with 1 if
something ended otherwise than is known.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from wheelhouse import fetch, find

from quire.wheels.requirements import Unresolvable, resolve

ROOT = Path(__file__).resolve().parent.parent
WHEELHOUSE = ROOT / "target" / f"wheels-{sys.implementation.cache_tag}"
BEGIN, END = "<!-- tried: begin -->\n", "<!-- tried: end -->\n"


class Trial(NamedTuple):
    """What is tried with a project.

    Attributes:
        project: Its name.
        title: What the program does, for the table.
        program: Arguments of ``quire run``.
        more: Other projects whose wheels are needed, beside what the wheels say themselves.
        sources: Unpack the source distribution, and run in its folder.
        known: Why this does not work; empty if it does.
    """

    project: str
    title: str
    program: tuple[str, ...]
    more: tuple[str, ...] = ()
    sources: bool = False
    known: str = ""


def code(text: str) -> tuple[str, ...]:
    """Run Python code."""
    return "-c", text


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=.")
LXML_TESTS = """
import importlib, pathlib, sys, unittest, lxml
lxml.__path__.append("src/lxml")
def flat(suite):
    for test in suite:
        yield from flat(test) if isinstance(test, unittest.TestSuite) else [test]
suite = unittest.TestSuite()
for path in sorted(pathlib.Path("src/lxml/tests").glob("test_*.py")):
    if path.stem not in ("test_isoschematron", "test_http_io"):
        tests = importlib.import_module(f"lxml.tests.{path.stem}").test_suite()
        # This document uses isoschematron.
        suite.addTests(test for test in flat(tests) if "validation_txt" not in test.id())
result = unittest.TextTestRunner(verbosity=0).run(suite)
sys.exit(not result.wasSuccessful())
"""
TRIALS = (
    Trial("numpy", "linear algebra", code("import numpy as np; print(np.linalg.inv(np.eye(3) * 2)[0, 0])")),
    Trial(
        "numpy",
        "its tests of linalg, fft and numeric",
        (*PYTEST, "--pyargs", "numpy.linalg.tests", "numpy.fft", "numpy._core.tests.test_numeric"),
        ("pytest", "hypothesis"),
    ),
    Trial(
        "pandas",
        "CSV, group by",
        code(
            "import io, pandas as pd; f = pd.read_csv(io.StringIO('a,b\\n1,x\\n2,y\\n3,x'));"
            " print(f.groupby('b').a.sum().to_dict())"
        ),
    ),
    Trial(
        "scipy",
        "optimize, sparse, stats (with a data file), signal, spatial",
        code(
            "from scipy import integrate, linalg, ndimage, optimize, signal, sparse, spatial, stats\n"
            "assert abs(optimize.minimize(lambda x: (x - 3) ** 2, 0.0).x[0] - 3) < 1e-4\n"
            "assert stats.qmc.Sobol(2, seed=1).random(2).shape == (2, 2)\n"
            "print(sparse.linalg.eigsh(sparse.eye(10, format='csr'), k=2)[0])"
        ),
    ),
    Trial(
        "pyarrow",
        "Parquet, compute, datasets, Flight, to pandas",
        code(
            "import io, pyarrow.dataset, pyarrow.flight\n"
            "import pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as pq\n"
            "table = pa.table({'a': [1, 2], 'b': ['x', 'y']})\n"
            "file = io.BytesIO(); pq.write_table(table, file); file.seek(0)\n"
            "assert pq.read_table(file).to_pandas().shape == (2, 2); print(pc.sum(table['a']))"
        ),
        ("pandas",),
    ),
    Trial(
        "pydantic-core",
        "its tests of validators and serializers",
        (*PYTEST, "tests/validators", "tests/serializers"),
        (
            "pytest",
            "hypothesis",
            "dirty-equals",
            "inline-snapshot",
            "pytest-benchmark",
            "pytest-mock",
            "pytest-run-parallel",
            "pytest-timeout",
            "typing-inspection",
        ),
        sources=True,
    ),
    Trial("lxml", "its tests, except those of HTTP and isoschematron", code(LXML_TESTS), sources=True),
    Trial(
        "lxml",
        "lxml.isoschematron",
        code("import lxml.isoschematron"),
        known="libxml2 opens files of the package by their paths",
    ),
    Trial(
        "cryptography",
        "Fernet, RSA",
        code(
            "from cryptography.fernet import Fernet\n"
            "from cryptography.hazmat.primitives.asymmetric import rsa\n"
            "f = Fernet(Fernet.generate_key()); assert f.decrypt(f.encrypt(b'x')) == b'x'\n"
            "print(rsa.generate_private_key(65537, 2048).key_size)"
        ),
    ),
    Trial("orjson", "both ways", code("import orjson; print(orjson.loads(orjson.dumps({'a': [1, None]})))")),
    Trial(
        "Pillow",
        "drawing, WebP",
        code(
            "import io\nfrom PIL import Image, ImageDraw\n"
            "image = Image.new('RGB', (32, 32)); ImageDraw.Draw(image).ellipse((4, 4, 28, 28), fill='red')\n"
            "file = io.BytesIO(); image.save(file, 'WEBP'); print(Image.open(file).getpixel((16, 16)))"
        ),
    ),
    Trial(
        "Pillow",
        "text with FreeType",
        code("from PIL import ImageFont; print(ImageFont.load_default(12).getlength('quire'))"),
    ),
    Trial(
        "polars",
        "a lazy query",
        code(
            "import polars as pl; f = pl.DataFrame({'a': [1, 2, 3], 'b': ['x', 'y', 'x']}).lazy()\n"
            "print(f.group_by('b').agg(pl.col('a').sum()).collect().sort('b').rows())"
        ),
    ),
    Trial(
        "duckdb",
        "SQL",
        code("import duckdb; print(duckdb.sql('select sum(range) from range(10)').fetchall())"),
    ),
    Trial(
        "matplotlib",
        "a plot with mathematics as PNG; opens its fonts and settings by path",
        code(
            "import io, matplotlib\nmatplotlib.use('Agg')\nimport matplotlib.pyplot as plt\n"
            "plt.plot([1, 2]); plt.title('$x^2$'); file = io.BytesIO(); plt.savefig(file); print(file.tell())"
        ),
    ),
    Trial(
        "certifi",
        "as the authorities of an SSL context, which OpenSSL opens",
        code("import certifi, ssl; print(bool(ssl.create_default_context(cafile=certifi.where())))"),
    ),
    Trial(
        "torch",
        "a matrix product",
        code("import torch; print((torch.ones(3, 3) @ torch.ones(3, 3))[0, 0].item())"),
    ),
)


def sources(project: str, version: str, folder: Path) -> Path:
    """Download and unpack a source distribution. Returns its folder."""
    place = folder / "sources"
    stem = f"{project.replace('-', '_')}-{version}"
    if not (place / stem).is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--no-binary={project}"]
        subprocess.run([*command, f"--dest={place}", f"{project}=={version}"], check=True)  # noqa: S603
        with tarfile.open(place / f"{stem}.tar.gz") as archive:
            archive.extractall(place, filter="data")
    return place / stem


def complete(folder: Path, wanted: list[str]) -> bool:
    """Tell whether a folder has wheels of projects and of all that they need."""
    try:
        return bool(folder.is_dir() and resolve(wanted, str(folder)))
    except Unresolvable:
        return False


def attempt(trial: Trial, folder: Path) -> tuple[list[str], bool]:
    """Try a project. Returns a line of the table, and whether it is as known."""
    wanted = [trial.project, *trial.more]
    if not complete(folder, wanted) and (failure := fetch(folder, wanted, with_dependencies=True)):
        return [trial.project, "", trial.title, f"not to be had: {failure.splitlines()[-1]}"], False
    wheel = find(folder, trial.project)
    assert wheel is not None
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as empty:
        requirements = Path(empty, "requirements.txt")
        requirements.write_text("\n".join(wanted))
        command = [sys.executable, "-m", "quire", "run", "--requirements", str(requirements)]
        command += ["--wheel-dir", str(folder), *trial.program]
        where = sources(trial.project, version, folder) if trial.sources else Path(empty)
        done = subprocess.run(  # noqa: S603
            command, cwd=where, capture_output=True, text=True, check=False, env=os.environ | {"HOME": empty}
        )
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    last = next((line for line in reversed(lines) if "passed" in line or line.startswith("Ran ")), "")
    last = last.partition(" in ")[0]
    if done.returncode == 0:
        return [trial.project, version, trial.title, f"works{': ' * bool(last)}{last}"], not trial.known
    sys.stderr.write(
        "\n".join([f"{trial.project}: {trial.title}: ended with {done.returncode}", *lines[-8:], ""])
    )
    return [trial.project, version, trial.title, f"does not: {trial.known or lines[-1]}"], bool(trial.known)


def main() -> int:
    """Do what the module says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel-dir", type=Path, default=WHEELHOUSE)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "wheels.md")
    parser.add_argument("names", nargs="*", help="only these projects; the table is not written then")
    options = parser.parse_args()
    folder: Path = options.wheel_dir.resolve()
    lines, surprises = [], 0
    for trial in TRIALS:
        if not options.names or trial.project in options.names:
            cells, expected = attempt(trial, folder)
            sys.stdout.write(" | ".join(cells) + ("" if expected else "   <- not as known") + "\n")
            sys.stdout.flush()
            lines.append(cells)
            surprises += not expected
    if not options.names:
        head = [["project", "version", "tried", "result"], ["---"] * 4]
        table = "".join(f"| {' | '.join(cells)} |\n" for cells in head + lines)
        text = options.docs.read_text("utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        options.docs.write_text(f"{before}{BEGIN}{table}{END}{after}", "utf-8")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
