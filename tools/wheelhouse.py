"""Download wheels for this interpreter, unless they are there, and say where they are.

Usage: python tools/wheelhouse.py FOLDER NAME...

Prints the wheel of each project, one a line. Ends with 1 and pip's words if something cannot be had.
"""

import subprocess
import sys
from pathlib import Path


def find(folder: Path, name: str) -> Path | None:
    """Find the wheel of a project in a folder; the last by name if there are several.

    Names of wheels are in lower case, with ``_`` for ``-``.
    """
    return max(folder.glob(f"{name.lower().replace('-', '_')}-[0-9]*.whl"), default=None)


def fetch(folder: Path, names: list[str], *, with_dependencies: bool = False) -> str:
    """Download what is missing to a folder.

    Args:
        folder: Made if need be.
        names: Of projects.
        with_dependencies: Look for what they need, too, even if all of them are there.

    Returns:
        What pip said if it failed, else an empty string.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wheels = {name: find(folder, name) for name in names}
    missing = [str(wheel or name) for name, wheel in wheels.items() if with_dependencies or wheel is None]
    if not missing:
        return ""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=1", "--timeout=10"]
    command += [f"--dest={folder}", f"--find-links={folder}"]
    command += [] if with_dependencies else ["--no-deps"]
    done = subprocess.run([*command, *missing], capture_output=True, text=True, check=False)  # noqa: S603
    return "" if done.returncode == 0 else done.stderr.strip() or f"pip ended with {done.returncode}"


def main(arguments: list[str]) -> int:
    """Do what the module says."""
    folder, names = Path(arguments[0]), arguments[1:]
    if failure := fetch(folder, names):
        sys.stderr.write(f"pip cannot download wheels: {failure}\n")
        return 1
    sys.stdout.writelines(f"{find(folder, name)}\n" for name in names)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
