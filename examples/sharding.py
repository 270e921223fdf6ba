"""One training on eight devices, laid out in six ways: `python examples/sharding.py [WAY ...]`.

Virtual CPU devices stand for accelerators. Each way takes the same steps from the same start, and ends with the result
of one device, up to rounding. docs/sharding.md says what each does with the batch statistics.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

Tree = dict[str, Any]
Batch = tuple[jax.Array, jax.Array]
Step = Callable[[fs.Carry, Batch], tuple[fs.Carry, jax.Array]]
STEPS, FEATURES = 20, 16
LINE = jax.make_mesh((8,), ("data",), devices=jax.devices()[:8])
GRID = jax.make_mesh((4, 2), ("data", "model"), devices=jax.devices()[:8])
tx = optax.adam(1e-2)


class Net(nn.Module):
    """Batch statistics are averaged over `axis_name`, where it is one."""

    axis_name: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Maps `[..., features]` to `[..., 1]`."""
        x = nn.Dense(64, use_bias=False)(x)
        norm = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)
        return nn.Dense(1)(nn.relu(norm(x)))


def start() -> fs.Carry:
    """Step 0."""
    variables = Net().init(jax.random.key(0), jnp.zeros((1, FEATURES)), train=False)
    params, state = fs.split_params(variables)
    return fs.init_carry(params, state | {"ema": params}, tx)


def told(loss_fn: Any, mesh: Mesh) -> Any:
    """Says where the results of the loss lie, which Linen's layers do not say on Explicit axes, JAX's default."""
    everywhere = NamedSharding(mesh, P())
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.sharding.auto_axes(loss_fn, out_sharding=everywhere) if explicit else loss_fn


def step_of(apply: Any, axis_name: str | None = None, mesh: Mesh | None = None) -> Step:
    """A step over the whole batch, or, with the name of a mesh axis, over each device's part of it."""

    def loss_fn(params: Tree, state: Tree, batch: Batch) -> tuple[jax.Array, Tree]:
        pred, state = apply(params, state, batch[0], train=True)
        return optax.l2_loss(pred, batch[1]).mean(), state

    return fs.with_ema(fs.with_optimizer(told(loss_fn, mesh) if mesh else loss_fn, tx, axis_name=axis_name), decay=0.9)


def whole(mesh: Mesh | None = None) -> Step:
    """The model on the batch, wherever its rows are: the mesh is XLA's affair."""
    return step_of(fs.with_mutable(Net()), mesh=mesh)


def per_example() -> Step:
    """The model on one example, mapped over the batch."""
    return step_of(fs.vmap_stateful(fs.with_mutable(Net(axis_name="batch")), axis_name="batch"), mesh=LINE)


def on_each_device(inside: bool) -> Step:
    """Each device its own rows; statistics, loss and gradients are averaged by name. `inside`: per example there."""
    if inside:
        apply = fs.vmap_stateful(fs.with_mutable(Net(axis_name=("data", "batch"))), axis_name="batch")
    else:
        apply = fs.with_mutable(Net(axis_name="data"))
    specs: Any = {"in_specs": (P(), P("data")), "out_specs": (P(), P())}
    # JAX marks what varies along a mesh axis, not along vmap's: a mean over both at once fails that check
    mapped: Step = jax.shard_map(step_of(apply, "data"), mesh=LINE, check_vma=not inside, **specs)
    return mapped


def replicated(carry: fs.Carry) -> Any:
    """Every leaf whole on every device."""
    return jax.tree.map(lambda _: NamedSharding(LINE, P()), carry)


def fully_sharded(carry: fs.Carry) -> Any:
    """The first axis of each leaf split over the devices, where they divide it."""
    split, everywhere = NamedSharding(LINE, P("data")), NamedSharding(LINE, P())
    return jax.tree.map(lambda leaf: split if leaf.ndim and leaf.shape[0] % LINE.size == 0 else everywhere, carry)


def by_columns(carry: fs.Carry) -> Any:
    """The columns of each matrix split over `model`; the batch goes over `data`."""
    split, everywhere = NamedSharding(GRID, P(None, "model")), NamedSharding(GRID, P())
    return jax.tree.map(lambda leaf: split if leaf.ndim == 2 and leaf.shape[1] % 2 == 0 else everywhere, carry)


WAYS: dict[str, tuple[Callable[[], Step], Callable[[fs.Carry], Any]]] = {
    "jit, data parallel": (whole, replicated),
    "jit, fully sharded": (lambda: whole(LINE), fully_sharded),
    "jit, tensor parallel": (lambda: whole(GRID), by_columns),
    "jit, vmap_stateful": (per_example, fully_sharded),
    "shard_map": (lambda: on_each_device(inside=False), replicated),
    "shard_map, vmap_stateful": (lambda: on_each_device(inside=True), replicated),
}


def batches() -> list[Batch]:
    """The same for every way."""
    x = jax.random.normal(jax.random.key(1), (STEPS, 64, FEATURES))
    return [(rows, jnp.tanh(rows.sum(1, keepdims=True))) for rows in x]


def train(step: Step, carry: fs.Carry, place: Callable[[Batch], Batch]) -> tuple[fs.Carry, float]:
    """Takes the steps; it must not be traced twice."""
    jitted, loss = fs.jit_step(fs.assert_max_traces(step), like=carry), jnp.float32(0)
    for batch in batches():
        carry, loss = jitted(carry, place(batch))
    return carry, float(loss)


def run(way: str) -> tuple[fs.Carry, float]:
    """Makes the carry straight into its shards, and trains."""
    make_step, place = WAYS[way]
    shardings = place(jax.eval_shape(start))
    carry = jax.jit(start, out_shardings=shardings)()  # no device ever holds what is split
    rows = NamedSharding(carry.step.sharding.mesh, P("data"))
    return train(make_step(), carry, lambda batch: jax.device_put(batch, rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of: {'; '.join(WAYS)}; all if none")
    ways = parser.parse_args().ways or [*WAYS]
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"no such way: {'; '.join(unknown)}; there are {'; '.join(WAYS)}")
    single, expected = train(whole(), start(), lambda batch: batch)
    print(f"{'one device':26} loss {expected:.6f}")
    for way in ways:
        carry, loss = run(way)
        kernel = carry.params["Dense_0"]["kernel"]
        off = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), carry, single)
        most = max(jax.tree.leaves(off))
        print(f"{way:26} loss {loss:.6f}  first kernel {kernel.sharding.spec}, largest difference of a leaf {most:.1e}")
        if most > 1e-2:
            print("sharding: failed, it is not the training of one device")
            return 1
    print(f"sharding: {len(ways)} of {len(WAYS)} ways, one trace each, one result")
    return 0


if __name__ == "__main__":
    sys.exit(main())
