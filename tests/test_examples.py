"""The examples run as printed, and end as they say. (`make demo` runs digits.py, `tests/distributed` processes.py.)"""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def example(name: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """Runs one in a process of its own."""
    command = [sys.executable, f"examples/{name}.py", *options]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


ENVIRONMENT = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}


@pytest.mark.exhaustive
def test_six_ways_over_eight_devices_are_one_training() -> None:
    done = example("sharding")
    assert done.returncode == 0, done.stdout + done.stderr
    first, *ways, last = done.stdout.splitlines()
    assert len(ways) == 6
    assert {line.split("loss ")[1].split()[0][:6] for line in [first, *ways]} == {first.split("loss ")[1][:6]}
    assert last == "sharding: 6 of 6 ways, one trace each, one result"


@pytest.mark.parametrize("name", ["sharding", "processes"])
def test_a_wrong_option_is_said(name: str) -> None:
    done = example(name, "nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr.splitlines()[-1]
