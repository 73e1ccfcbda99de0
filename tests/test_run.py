"""``quire run``: what a program sees and leaves is what it would under ``python``."""

import os
import pathlib
import subprocess
import sys

import pytest
from wheelfiles import SUFFIX, extension, make_wheel

Folder = pathlib.Path

QUIRE = [sys.executable, "-m", "quire", "run"]
PROGRAMS = {
    "path": "import sys, os; print(sys.argv, __name__, os.path.realpath(sys.path[0] or '.'), __file__)",
    "main": "import sys; print(sys.modules['__main__'].__dict__ is globals(), __package__, __doc__)",
    "names": "print(sorted(name for name in globals() if name != '__annotations__'))",
    "raises": "def f():\n    raise KeyError('x')\nf()\n",
    "chain": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('y') from e\n",
    "syntax": "x = = 1\n",
    "status": "raise SystemExit(3)",
    "text": "import sys; sys.exit('some words')",
    "interrupted": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n",
    "terminated": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n",
    "hook": "import sys, traceback\n"
    "sys.excepthook = lambda *a: print('mine', traceback.format_exception(*a))\n1/0\n",
    "atexit": "import atexit, sys\n"
    "@atexit.register\ndef f(): print('end', sys.modules['__main__'].f is f)\n1/0\n",
    "thread": "import threading, pickle\nclass A: pass\n"
    "def f():\n    threading.main_thread().join()\n    print(pickle.loads(pickle.dumps(A)) is A)\n"
    "threading.Thread(target=f).start()\n",
    "group": "raise ExceptionGroup('g', [ValueError(1)])",
}


def run(*command: str | Folder, cwd: Folder, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=100,
        input=text,
        env=os.environ | {"QUIRE_CODE_CACHE": "off"},
    )


def same(cwd: Folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run under Python and under quire, and compare all that comes out."""
    expected = run(sys.executable, *arguments, cwd=cwd)
    done = run(*QUIRE, *arguments, cwd=cwd)
    assert (done.returncode, done.stdout, done.stderr) == (
        expected.returncode,
        expected.stdout,
        expected.stderr,
    )
    return done


@pytest.mark.parametrize("name", PROGRAMS)
def test_scripts_as_under_python(tmp_path: Folder, name: str) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "script.py").write_text(PROGRAMS[name])
    same(tmp_path, "below/script.py", "-x", "--wheel", "y")


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - {"path"}))
def test_code_and_modules_as_under_python(tmp_path: Folder, name: str) -> None:
    if name != "syntax":
        same(tmp_path, "-c", PROGRAMS[name], "-m", "z")
    (tmp_path / "mod.py").write_text(PROGRAMS[name])
    done = same(tmp_path, "-m", "mod", "-x")
    assert "quire" not in done.stderr


def test_packages_folders_and_archives_as_under_python(tmp_path: Folder) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys; print(sys.argv, __name__, __spec__ and __spec__.name)")
    same(tmp_path, "-m", "pkg", "a")
    same(tmp_path, "pkg", "a")
    done = run(sys.executable, "-m", "zipapp", "pkg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    same(tmp_path, "pkg.pyz", "a")
    same(tmp_path, "-m", "nothing_of_this_name")


def test_wheels_in_the_program_and_its_processes(tmp_path: Folder) -> None:
    one = make_wheel(tmp_path / "one.whl", {f"ext{SUFFIX}": extension(tmp_path, "ext")})
    two = make_wheel(tmp_path / "two.whl", {"pure.py": "value = 7\n"})
    (tmp_path / "script.py").write_text(
        """
import concurrent.futures, multiprocessing, os, sys
import ext, pure

class Thing:
    def value(self):
        return ext.value() + pure.value

def work(thing):
    return thing.value(), ext.__file__, os.getpid()

if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            value, file, pid = pool.submit(work, Thing()).result()
            assert (value, file) == (49, ext.__file__) and pid != os.getpid(), method
        with context.Pool(1) as pool:
            assert pool.map(work, [Thing()])[0][0] == 49
    print(sys.path[1:3])
"""
    )
    done = run(*QUIRE, "--wheel", "one.whl", "--wheel", two, "script.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{[str(one), str(two)]}\n"


def test_tracebacks_show_the_source_in_wheels(tmp_path: Folder) -> None:
    wheel = make_wheel(tmp_path / "w.whl", {"mod.py": "def fail():\n    raise KeyError('here')\n"})
    done = run(*QUIRE, "--wheel", wheel, "-c", "import mod; mod.fail()", cwd=tmp_path)
    assert done.returncode == 1
    assert f"{wheel}/mod.py\", line 2, in fail\n    raise KeyError('here')\n" in done.stderr, done.stderr


def test_commands_that_wheels_would_install(tmp_path: Folder) -> None:
    members = {
        "mod.py": "import sys\ndef main():\n    print('entry', sys.argv, __name__)\n    return 5\n",
        "made-1.0.dist-info/entry_points.txt": "[console_scripts]\nhello = mod:main\n",
        "made-1.0.data/scripts/tool": "#!python\nimport sys, mod, beside\n"
        "print('tool', sys.argv, __name__)\n",
        "made-1.0.data/scripts/shell": "#!/bin/sh\n",
        "made-1.0.data/purelib/beside.py": "",
        "made-1.0.data/platlib/pkg/__init__.py": "value = 3\n",
        "made-1.0.data/platlib/pkg/sub.py": "value = 4\n",
    }
    wheel = make_wheel(tmp_path / "w.whl", members)
    done = run(*QUIRE, "--wheel", wheel, "--script", "hello", "-a", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "entry ['hello', '-a'] mod\n"), done.stderr
    done = run(*QUIRE, "--wheel", wheel, "--script", "tool", "-a", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "tool ['tool', '-a'] __main__\n"), done.stderr
    done = run(*QUIRE, "--wheel", wheel, "--script", "nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "quire run: no wheel has a command 'nothing'; there are: hello, shell, tool\n"
    done = run(*QUIRE, "--wheel", wheel, "--script", "shell", cwd=tmp_path)
    assert done.returncode == 2
    assert "no script in Python" in done.stderr
    code = "import pkg.sub, beside; print(pkg.value, pkg.sub.value, beside.__file__)"
    done = run(*QUIRE, "--wheel", wheel, "-c", code, cwd=tmp_path)
    assert done.stdout == f"3 4 {wheel}/made-1.0.data/purelib/beside.py\n", done.stderr


def test_what_cannot_be_run(tmp_path: Folder) -> None:
    (tmp_path / "no.whl").write_text("no archive")
    (tmp_path / "script.py").write_text("raise AssertionError")
    for arguments, text in (
        (["gone.py"], "gone.py"),
        (["--wheel", "gone.whl", "script.py"], "gone.whl"),
        (["--wheel", "no.whl", "script.py"], "no.whl"),
        ([], "nothing to run"),
        (["--requirements", "x", "script.py"], "need each other"),
        (["--requirements", "gone.txt", "--wheel-dir", ".", "script.py"], "gone.txt"),
    ):
        done = run(*QUIRE, *arguments, cwd=tmp_path)
        assert done.returncode == 2, arguments
        assert text in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr


def test_requirements(tmp_path: Folder) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    make_wheel(folder / "made-1.0-py3-none-any.whl", {"mod.py": "value = 7\n"})
    # The program may have what quire itself needs for this.
    make_wheel(folder / "packaging-1.0-py3-none-any.whl", {"packaging/__init__.py": "own = True\n"})
    (tmp_path / "req.txt").write_text("# all of it\n-r more.txt  # and this\n")
    (tmp_path / "more.txt").write_text("made >= 1, \\\n < 2\npackaging==1.0\n")
    (tmp_path / "script.py").write_text("import mod, packaging; print(mod.value, packaging.own)")
    chosen = ["--requirements", "req.txt", "--wheel-dir", "wheels"]
    done = run(*QUIRE, *chosen, "script.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "7 True\n"), done.stderr
    (tmp_path / "more.txt").write_text("made > 1\n")
    done = run(*QUIRE, *chosen, "script.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "made>1, needed by the requirements: there is made-1.0-py3-none-any.whl" in done.stderr
    (tmp_path / "req.txt").write_text("-r req.txt\n")
    assert "includes itself" in run(*QUIRE, *chosen, "script.py", cwd=tmp_path).stderr
