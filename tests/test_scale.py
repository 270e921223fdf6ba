"""The figures of `docs/scale.md` come from an extrapolation over layers, which must be exact."""

import pathlib
import subprocess
import sys

import pytest

from .flags import needs_jit

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@needs_jit
def test_what_is_reckoned_per_layer_is_what_is_compiled() -> None:
    command = [sys.executable, "tools/scale.py", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all-gather" in done.stdout
    assert "all-reduce" in done.stdout
