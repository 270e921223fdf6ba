"""Prints where the newest CPython among the versions given is (`newest.py 3.13 3.12`), or nothing."""

import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

# venv: Debian packages some interpreters without it.
PROBE = "import sys, venv, ensurepip; print(sys.implementation.name, '%d.%d' % sys.version_info[:2])"


def candidates(version: str) -> Iterator[str]:
    """Yields what may be that CPython: on PATH, then what pyenv has installed but not selected."""
    yield f"python{version}"
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        yield from map(str, sorted(pathlib.Path(root).glob(f"versions/{version}.*/bin/python")))


def works(python: str, version: str) -> bool:
    """Runs it, since a file is no proof: pyenv has shims for versions that it then refuses to start."""
    if not shutil.which(python):
        return False
    probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    return probe.stdout.split() == ["cpython", version]


if __name__ == "__main__":
    print(next((p for version in sys.argv[1:] for p in candidates(version) if works(p, version)), ""))
