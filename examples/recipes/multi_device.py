"""Many devices, one or many hosts.

The step is the same as on a single device. You choose the placement of its leaves once, when you make the carry. Here
params are sharded over all devices (fully sharded data parallelism) and the batch is split over them.
`jit_step(like=carry)` keeps the output carry where the input was, so the second step reuses the first one's compile.
The same program runs in many processes, each with its part of the batch.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before JAX starts

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

Tree = dict[str, Any]
Loss = Callable[[Tree, Tree, dict[str, Array]], tuple[Array, Tree]]


class MLP(nn.Module):
    hidden: int = 64

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        x = nn.Dense(self.hidden)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(1)(nn.relu(x))


model, tx = MLP(), optax.adam(1e-2)
apply = fs.with_mutable(model)


def loss_fn(params: Tree, state: Tree, batch: dict[str, Array]) -> tuple[Array, Tree]:
    prediction, state = apply(params, state, batch["x"], train=True)
    return jnp.square(prediction - batch["y"]).mean(), state


def told(mesh: Mesh) -> Loss:
    """Says where the loss lies: on Explicit axes, JAX's default, no Linen layer says how split kernels are joined."""
    if AxisType.Explicit not in mesh.axis_types:
        return loss_fn
    auto_axes: Any = jax.sharding.auto_axes
    inside: Loss = auto_axes(loss_fn, out_sharding=NamedSharding(mesh, P()))
    return inside


def sharding_of(mesh: Mesh, leaf: Array) -> NamedSharding:
    """Splits the last axis of a kernel where it divides."""
    divides = leaf.ndim == 2 and leaf.shape[-1] % mesh.shape["data"] == 0
    return NamedSharding(mesh, P(None, "data") if divides else P())


def place(mesh: Mesh, params: Tree) -> Tree:
    def put(leaf: Array) -> Array:
        placed: Array = jax.device_put(leaf, sharding_of(mesh, leaf))
        return placed

    tree: Tree = jax.tree.map(put, params)
    return tree


def local_batches(count: int, size: int) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(jax.process_index())
    for _ in range(count):
        x = rng.normal(size=(size // jax.process_count(), 4)).astype(np.float32)
        yield {"x": x, "y": x.sum(axis=-1, keepdims=True)}


def global_batch(mesh: Mesh, local: dict[str, npt.NDArray[np.float32]]) -> dict[str, Array]:
    sharding = NamedSharding(mesh, P("data"))
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in local.items()}


def main() -> None:
    if "COORDINATOR" in os.environ:
        jax.distributed.initialize(os.environ["COORDINATOR"], int(os.environ["HOSTS"]), int(os.environ["HOST"]))
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    params, state = fs.split_params(model.init(jax.random.key(0), jnp.ones((1, 4))))
    carry = fs.init_carry(place(mesh, params), state, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(told(mesh), tx)), like=carry)
    losses = []
    with fs.compile_log() as log:
        for local in local_batches(200, 8 * jax.device_count()):
            carry, loss = step(carry, global_batch(mesh, local))
            losses.append(float(loss))
    kernel = carry.params["Dense_0"]["kernel"]
    assert losses[-1] < losses[0] / 10
    assert log.compiles["loss_fn"] == 1
    assert kernel.sharding == carry.opt_state[0].mu["Dense_0"]["kernel"].sharding  # Adam's moments follow
    if jax.process_index() == 0:
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} on {jax.device_count()} devices, one compile")
        part = kernel.addressable_shards[0].data.shape
        print(f"a kernel of {kernel.shape} is {part} on each device, and so are its moments")


if __name__ == "__main__":
    main()
