"""A process whose step is in a file reaches its first step in at most 0.50 of the time with JAX's persistent cache.

From the batch to the loss, imports apart: cold, with the cache that a process before it has filled, and with the
executable that one wrote, as the recipe `warm_start` does it. The last traces and compiles no step, which is asserted.
A chain of 24 Dense layers and BatchNorms.
"""

import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import flaxsplit as fs

from ._measure import Effort, Row, Tell, elsewhere, in_turn
from ._models import batch_of, dense_norm, ours, start

COLD, CACHED, FILE = "cold", "persistent cache", "executable in a file"
MODES = (COLD, CACHED, FILE)


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """One process after another, each with what a process before them left."""
    layers = effort.of(smoke=[2], quick=[8], full=[24])[0]
    case = f"{layers} layers"
    if not effort.wants(case):
        return
    with tempfile.TemporaryDirectory() as folder:
        for mode in (CACHED, FILE):
            tell(f"a first process fills: {mode}")
            process(mode, layers, folder)
        samples: dict[str, list[float]] = {mode: [] for mode in MODES}
        (most,) = effort.of(smoke=[1], quick=[3], full=[10])
        for mode in in_turn(MODES, effort, lambda words: tell(f"{case}: {words}"), most):
            found = process(mode, layers, folder)
            samples[mode].append(found["seconds"])
            if found["traces"] != (mode != FILE):
                raise RuntimeError(f"a process started from {mode} traced its step {found['traces']:g} times")
    yield Row(f"first step, {case}", "s", samples, CACHED, bounds={FILE: 0.5})


def process(mode: str, layers: int, folder: str) -> dict[str, float]:
    """What a new process says; it leaves an accelerator's memory to this one."""
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"} if mode == CACHED else {"JAX_COMPILATION_CACHE_DIR": ""}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    cache |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    found: dict[str, float] = elsewhere(__name__, mode, str(layers), folder, **cache)
    return found


def report(mode: str, layers: int, folder: pathlib.Path) -> dict[str, float]:
    """Seconds to the first loss, and how often the step was traced for it, in this process."""
    tx, batch = optax.adam(1e-3), batch_of(32, 64)
    model = dense_norm(layers)
    carry = start(model, tx, batch[0])
    jax.block_until_ready(carry)
    began = time.perf_counter()
    with fs.compile_log() as log:
        step: Any = fs.jit_step(ours(model, tx))
        step = from_file(step, carry, batch, folder / "step") if mode == FILE else step
        jax.block_until_ready(step(carry, batch)[1])
    return {"seconds": time.perf_counter() - began, "traces": log.traces["loss_fn"]}


def from_file(step: Any, carry: Any, batch: Any, file: pathlib.Path) -> Any:
    """The compiled step, from a file if there is one."""
    trees = jax.tree.structure(((carry, batch), {})), jax.tree.structure((carry, 0.0))
    if not file.exists():
        file.write_bytes(serialize(step.lower(carry, batch).compile())[0])
    return deserialize_and_load(file.read_bytes(), *trees, execution_devices=jax.devices()[:1])


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))))
