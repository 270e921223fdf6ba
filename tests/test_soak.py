"""The long run of `make soak`, made short; and what it watches for is seen where it happens."""

import copy
import json
import pathlib
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxsplit as fs
from tools import soak

from .flags import needs_jit

pytestmark = [needs_jit, pytest.mark.slow]
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run of 400 steps wrote."""
    out = tmp_path_factory.mktemp("soak") / "soak.json"
    command = [sys.executable, "tools/soak.py", "--steps", "400", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("soak: done, 400 steps and 8 threads of 200: 3 compiles")
    return json.loads(out.read_text())


def test_nothing_grows_or_is_traced_again(found: Any) -> None:
    assert (found["steps"], found["traces"], found["compiles"]) == (400, 3, 3)
    assert found["threads"] == {"callers": 8, "steps": 200, "traces": 3, "compiles": 3}
    assert len(found["seen"]["host"]) == soak.LOOKS
    assert min(found["seen"]["most on device"]) > 10 * max(found["seen"]["device"])


@pytest.mark.parametrize(
    ("key", "fault"),
    [("arrays", "live arrays: "), ("device", "bytes on the device: "), ("host", "host memory: +5.0 MiB")],
)
def test_what_grows_is_a_fault(found: Any, key: str, fault: str) -> None:
    grown = copy.deepcopy(found)
    grown["seen"][key] = [1_000 + 5 * 2**20 * i // (soak.LOOKS // 2) for i in range(soak.LOOKS)]
    assert [said[: len(fault)] for said in soak.faults(grown)][:1] == [fault]


@pytest.mark.parametrize("count", ["traces", "compiles"])
def test_another_trace_is_a_fault(found: Any, count: str) -> None:
    assert soak.faults(found) == []
    (fault,) = soak.faults(found | {count: 4})
    assert fault.startswith("traced ")


def test_threads_that_end_elsewhere_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "same", lambda a, b: False)
    with pytest.raises(SystemExit, match="differ from one alone"):
        soak.threads(callers=2, steps=1)


# Poisoned batches


class Normed(nn.Module):
    """Statistics, and no keys, so that a step not taken leaves no trace at all."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Maps `[batch, 3]` to `[batch, 1]`."""
        return nn.Dense(1)(nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))))


def test_a_hundred_thousand_steps_with_one_poisoned_batch_in_a_thousand() -> None:
    """The carry stays finite, and is that of the run without those batches, bit for bit."""
    apply, tx = fs.with_mutable(Normed()), optax.adam(1e-2)

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        pred, state = apply(params, state, batch)
        return ((pred - batch.sum(-1, keepdims=True)) ** 2).mean(), state

    step = fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.99)
    guarded, plain = fs.jit_step(fs.scan_steps(fs.skip_nonfinite(step))), fs.jit_step(fs.scan_steps(step))
    rng = np.random.default_rng(0)
    params, state = fs.split_params(Normed().init(jax.random.key(0), jnp.ones((4, 3), jnp.float32)))
    ours, theirs = (fs.init_carry(params, state | {"ema": params}, tx) for _ in range(2))
    for _ in range(100):
        batches = rng.normal(size=(1000, 4, 3)).astype(np.float32)
        bad = int(rng.integers(1000))
        poisoned = batches.copy()
        poisoned[bad, rng.integers(4), rng.integers(3)] = rng.choice([np.nan, np.inf])
        ours, losses = guarded(ours, poisoned)
        theirs, _ = plain(theirs, np.delete(batches, bad, 0))
        assert int((~jnp.isfinite(losses)).sum()) == 1
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(ours))
    assert int(ours.step) == 99_900
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
