"""Print the requirements of one extra of pyproject.toml, or those of the build, one a line.

Usage: python tools/requirements.py (build | EXTRA)
"""

import sys
import tomllib
from pathlib import Path


def requirements(name: str) -> list[str]:
    """List the requirement specifiers of an extra, or of the build system for ``"build"``."""
    pyproject = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))
    if name == "build":
        return list(pyproject["build-system"]["requires"])
    return list(pyproject["project"]["optional-dependencies"][name])


if __name__ == "__main__":
    sys.stdout.write("".join(f"{line}\n" for line in requirements(sys.argv[1])))
