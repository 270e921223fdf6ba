"""Law 7: saved, killed at a random step, restored in a new process and adopted, training goes on bit for bit."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from .checkpoint_worker import STEPS
from .flags import needs_jit

ROOT = pathlib.Path(__file__).parent.parent


def start(folder: pathlib.Path, how: str) -> subprocess.Popen[str]:
    """A training process of its own."""
    command = [sys.executable, "-m", "tests.checkpoint_worker", str(folder), how]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, str]:
    """What a process printed, word by word, once it ended well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return dict(line.split(maxsplit=1) for line in out.splitlines())


def killed_at(process: subprocess.Popen[str], step: int, delay: float) -> None:
    """Kills it after it printed that step, so that a save may be under way; says how far it came."""
    assert process.stdout
    assert process.stderr
    for line in process.stdout:
        if line.split() == ["step", str(step)]:
            break
    else:
        pytest.fail(process.stderr.read())
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The last carry of a process that was left in peace."""
    folder = tmp_path_factory.mktemp("never_stopped")
    said = finished(start(folder, "like"))
    assert said["from"] == "0"
    return np.load(folder / "end.npz")


@pytest.mark.slow
@needs_jit
@pytest.mark.parametrize("how", ["like", "bare"])
def test_training_goes_on_as_if_it_had_not_stopped(how: str, never_stopped: Any, tmp_path: pathlib.Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)  # noqa: S311 (says where to kill)
    step, delay = chance.randrange(2, STEPS // 2), chance.uniform(0, 0.02)
    print("killed after step", step, "and", delay, "seconds; seed", seed)
    killed_at(start(tmp_path, how), step, delay)
    assert not (tmp_path / "end.npz").exists()

    said = finished(start(tmp_path, how))
    assert step - 1 <= int(said["from"]) < STEPS  # before a save, Orbax waits for the one before
    assert said["compiles"] == "1 traces 1"
    ours = np.load(tmp_path / "end.npz")
    assert ours.files == never_stopped.files
    assert any("dropout" in name for name in ours.files)
    assert any("ema" in name for name in ours.files)
    for name in ours.files:
        np.testing.assert_array_equal(ours[name], never_stopped[name], err_msg=name)
