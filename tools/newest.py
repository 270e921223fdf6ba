"""`Makefile`: where the first CPython among the versions given is (`newest.py 3.13 3.12`), or nothing.

With `--name`, its version instead: `3.13`.
"""

import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

# venv: Debian packages some interpreters without it.
PROBE = "import sys, venv, ensurepip; print(sys.implementation.name, '%d.%d' % sys.version_info[:2])"


def candidates(version: str) -> Iterator[str]:
    """Yields what may be that CPython: on PATH, what pyenv has but did not select, the one that runs this."""
    yield f"python{version}"
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        yield from map(str, sorted(pathlib.Path(root).glob(f"versions/{version}.*/bin/python")))
    yield str(pathlib.Path(sys.base_prefix) / "bin" / f"python{version}")


def works(python: str, version: str) -> bool:
    """Runs it, since a file is no proof: pyenv has shims for versions that it then refuses to start."""
    if not shutil.which(python):
        return False
    probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    return probe.stdout.split() == ["cpython", version]


def found(version: str) -> str:
    """Where that CPython is, or nothing."""
    return next((shutil.which(python) or python for python in candidates(version) if works(python, version)), "")


if __name__ == "__main__":
    named = sys.argv[1:2] == ["--name"]
    there = ((version, python) for version in sys.argv[1 + named :] if (python := found(version)))
    print(next((version if named else python for version, python in there), ""))
