"""Wheels for other systems, from the package index, kept with what pytest caches."""

import pathlib
import subprocess
import sys

import pytest


def downloaded(
    config: pytest.Config, platforms: tuple[str, ...], projects: tuple[str, ...], python: str = "3.11"
) -> list[pathlib.Path]:
    """The newest wheels of these projects for one of these platforms; skips if they cannot be had."""
    cache = config.cache
    if cache is None:
        pytest.skip("pytest has no cache (-p no:cacheprovider), so there is no place for wheels")
    folder = cache.mkdir(f"wheels-{platforms[0]}-{python}")

    def find(project: str) -> pathlib.Path | None:
        # Wheels may be spelled otherwise than projects.
        name = project.replace("-", "_")
        return next((each for each in folder.glob("*.whl") if each.name.lower().startswith(f"{name}-")), None)

    missing = [project for project in projects if find(project) is None]
    if missing:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--retries=1", "--timeout=10", f"--dest={folder}"]
        command += [f"--platform={platform}" for platform in platforms]
        command += [f"--python-version={python}", *missing]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        if done.returncode:
            pytest.skip(f"pip cannot download wheels for {platforms[0]}: {done.stderr.strip()[-300:]}")
    return [path for path in map(find, projects) if path is not None]
