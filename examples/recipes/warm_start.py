"""A first step without a compile.

A restarted job traces and compiles its step again; JAX's persistent cache saves the compile, not the trace. `jit_step`
returns `jax.jit`'s object, so you can write its compiled step to a file, and a later process loads it. The file name
contains everything that the step depends on: with another jax, device, source or shape there is no such file, and the
step is compiled. Do not load a file that others can write: loading it runs its content.
"""

import contextlib
import hashlib
import pathlib
import tempfile
import time
from collections.abc import Generator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import flaxsplit as fs


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(8):
            x = x + nn.gelu(nn.BatchNorm(use_running_average=False)(nn.Dense(32)(x)))
        return nn.Dense(1)(x)[:, 0]


model, tx = Net(), optax.adam(1e-2)
apply = fs.with_mutable(model)
Batch = tuple[Array, Array]


def loss_fn(params: Any, state: Any, batch: Batch) -> tuple[Array, Any]:
    x, y = batch
    pred, state = apply(params, state, x)
    return optax.l2_loss(pred, y).mean(), state


@contextlib.contextmanager
def without_cache() -> Generator[None]:
    """What the CPU reads back from JAX's persistent cache cannot be written once more."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def warm(step: Any, carry: fs.Carry, batch: Batch, folder: pathlib.Path) -> Any:
    """The step compiled for these shapes, from a file if there is one."""
    device = jax.devices()[0]
    leaves = jax.tree_util.tree_leaves_with_path((carry, batch))
    shapes = [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves]
    made_for = (jax.__version__, device.device_kind, pathlib.Path(__file__).read_text(), shapes)
    file = folder / hashlib.sha256(repr(made_for).encode()).hexdigest()
    trees = jax.tree.structure(((carry, batch), {})), jax.tree.structure((carry, 0.0))
    if not file.exists():
        with without_cache():
            payload, *written = serialize(step.lower(carry, batch).compile())
        assert tuple(written) == trees
        file.with_suffix(".part").write_bytes(payload)
        file.with_suffix(".part").rename(file)  # whole or not at all
    return deserialize_and_load(file.read_bytes(), *trees, execution_devices=[device])


def begin(batch: Batch) -> fs.Carry:
    params, state = fs.split_params(model.init(jax.random.key(0), batch[0]))
    return fs.init_carry(params, state, tx)


def first_step(batch: Batch, folder: pathlib.Path) -> tuple[float, int, float]:
    """The first loss of a process, how often it compiled the step, and after how many seconds it was there."""
    jax.clear_caches()  # as if the process were new
    step = fs.jit_step(fs.with_optimizer(loss_fn, tx))
    carry = begin(batch)
    began = time.perf_counter()
    with fs.compile_log() as log:
        run = warm(step, carry, batch, folder)
        carry, loss = run(carry, batch)
    seconds = time.perf_counter() - began

    refused = ""
    try:
        run(carry, jax.tree.map(lambda leaf: leaf[:32], batch))
    except TypeError as error:
        refused = str(error)  # names the leaf, and how it differs
    assert "float32[32,32]" in refused
    return float(loss), log.compiles["loss_fn"], seconds


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (64, 32))
    batch = x, jnp.sin(x).sum(-1)
    with tempfile.TemporaryDirectory() as folder:
        cold, compiled, seconds = first_step(batch, pathlib.Path(folder))
        warmed, again, less = first_step(batch, pathlib.Path(folder))
        files = len(list(pathlib.Path(folder).iterdir()))
    assert (compiled, again, files) == (1, 0, 1)
    assert warmed == cold
    print(f"first step after {seconds:.2f} s with a compile, after {less:.2f} s without: the same loss, {warmed:.3f}")


if __name__ == "__main__":
    main()
