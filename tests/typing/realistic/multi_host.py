"""Many hosts: params sharded over a mesh, each process feeding its own part of the batch."""

import os
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs


class MLP(nn.Module):
    hidden: int = 16

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        x = nn.Dense(self.hidden)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(1)(nn.relu(x))


model = MLP()
apply = fs.with_mutable(model)
tx = optax.adam(1e-2)


def loss_fn(params: dict[str, Any], state: dict[str, Any], batch: dict[str, Array]) -> tuple[Array, dict[str, Any]]:
    prediction, state = apply(params, state, batch["x"], train=True)
    return jnp.square(prediction - batch["y"]).mean(), state


def sharding_of(mesh: Mesh, leaf: Array) -> NamedSharding:
    """Shards the last axis where it divides, as fully sharded data parallelism does."""
    divides = leaf.ndim == 2 and leaf.shape[-1] % mesh.shape["data"] == 0
    return NamedSharding(mesh, P(None, "data") if divides else P())


def place(mesh: Mesh, params: dict[str, Any]) -> dict[str, Any]:
    def put(leaf: Array) -> Array:
        placed: Array = jax.device_put(leaf, sharding_of(mesh, leaf))
        return placed

    tree: dict[str, Any] = jax.tree.map(put, params)
    return tree


def local_batches(count: int, size: int) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(jax.process_index())
    for _ in range(count):
        x = rng.normal(size=(size // jax.process_count(), 4)).astype(np.float32)
        yield {"x": x, "y": x.sum(axis=-1, keepdims=True)}


def global_batch(mesh: Mesh, local: dict[str, npt.NDArray[np.float32]]) -> dict[str, Array]:
    sharding = NamedSharding(mesh, P("data"))
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in local.items()}


def train(steps: int = 2) -> float:
    if "COORDINATOR" in os.environ:
        jax.distributed.initialize(os.environ["COORDINATOR"], int(os.environ["HOSTS"]), int(os.environ["HOST"]))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, state = fs.split_params(model.init(jax.random.key(0), jnp.ones((1, 4))))
    carry = fs.init_carry(place(mesh, params), state, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)), like=carry)
    loss = jnp.zeros(())
    with fs.compile_log() as log:
        for local in local_batches(steps, 2 * jax.device_count()):
            carry, loss = step(carry, global_batch(mesh, local))
    if jax.process_index() == 0:
        print(log)
    return float(loss)
