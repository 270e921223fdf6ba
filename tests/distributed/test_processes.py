"""Several real processes over loopback: law 8, a checkpoint onto another mesh, and a process that is killed."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from tests import strategies as some
from tests.test_traces import MODELS

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS = 24


def free_address() -> str:
    """An address on this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def environment(devices: int) -> dict[str, str]:
    """As this process, with that many virtual devices."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    return os.environ | flags | {"PYTHONPATH": os.pathsep.join(filter(None, [*sys.path]))}


def start(*command: str, devices: int) -> "subprocess.Popen[str]":
    """A process in a group of its own, so that whatever it starts can be ended with it."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: "subprocess.Popen[str]", code: int = 0, timeout: float = 300) -> str:
    """What a process said, once it ended as it should; it and its children are gone afterwards."""
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        kill_group(process)
    assert (process.returncode == 0) == (code == 0), said
    return said


def kill_group(process: "subprocess.Popen[str]") -> None:
    """Ends whatever is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_law_8_in_two_processes() -> None:
    address = free_address()
    workers = [start("-m", "tests.distributed.worker", address, "2", str(rank), devices=4) for rank in range(2)]
    try:
        said, other = (ended(worker, timeout=600) for worker in workers)
    finally:
        for worker in workers:
            kill_group(worker)
            worker.communicate()
    equal = re.findall(r"^equal (\S+)$", said, re.MULTILINE)
    assert equal == [*some.OPTIMIZERS, *MODELS, "microbatches"]
    assert "done" in other


def train(folder: pathlib.Path, processes: int, devices: int, steps: int) -> "subprocess.Popen[str]":
    """The example."""
    options = {"--folder": folder, "--processes": processes, "--devices": devices, "--steps": steps, "--timeout": 10}
    words = [str(word) for option in options.items() for word in option]
    return start("examples/processes.py", *words, devices=devices)


def leaves(folder: pathlib.Path) -> dict[str, Any]:
    """The last carry, by key path."""
    with np.load(folder / "end.npz") as end:
        return dict(end)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last carry of two processes that were left in peace."""
    folder = tmp_path_factory.mktemp("never_stopped")
    said = ended(train(folder, 2, 2, STEPS))
    assert said.count("done: 1 trace, 1 compile") == 2
    end = leaves(folder)
    assert any("dropout" in name for name in end)
    assert any("ema" in name for name in end)
    return end


@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 1)])
def test_a_checkpoint_goes_on_with_other_processes_and_another_mesh(
    processes: int, devices: int, never_stopped: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    ended(train(tmp_path, 2, 2, STEPS // 2))
    said = ended(train(tmp_path, processes, devices, STEPS))
    assert said.count(f"from {STEPS // 2} on {processes * devices} devices of {processes} processes") == processes
    assert said.count("done: 1 trace, 1 compile") == processes
    end = leaves(tmp_path)
    assert end.keys() == never_stopped.keys()
    for name, leaf in end.items():  # to rounding: another mesh adds in another order
        np.testing.assert_allclose(leaf, never_stopped[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_a_killed_process_ends_the_others_and_the_run_resumes_bit_for_bit(
    never_stopped: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    process = train(tmp_path, 2, 2, 10_000)
    said = ""
    assert process.stdout
    for line in process.stdout:
        said += line
        if re.search(r"^\[1\] step 4 ", line):
            break
    victim = re.search(r"^\[1\] process (\d+)", said, re.MULTILINE)
    assert victim, said
    began = time.monotonic()
    os.kill(int(victim[1]), signal.SIGKILL)
    said = ended(process, code=1, timeout=120)
    assert time.monotonic() - began < 60  # the time-out of ten seconds, and a slow machine
    codes = re.search(r"a process failed \(exit codes \[(-?\d+), (-?\d+)\]\)", said)
    assert codes, said
    assert codes[2] == str(-signal.SIGKILL)
    assert codes[1] not in ("0", str(-signal.SIGKILL))  # it ended by itself, with an error

    resumed = ended(train(tmp_path, 2, 2, STEPS))
    first = int(re.findall(r"from (\d+) on 4 devices", resumed)[0])
    assert 3 <= first < STEPS
    for name, leaf in leaves(tmp_path).items():
        np.testing.assert_array_equal(leaf, never_stopped[name], err_msg=name)
