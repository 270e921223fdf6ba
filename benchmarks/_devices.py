"""One step over virtual devices, as each writes it: `python -m benchmarks._devices DEVICES MICROBATCHES` prints JSON.

The network is a stack of matrices without state, since `optax.microbatch` threads none. All but one are data parallel
over Auto axes: the carry whole on every device, the batch split.
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from . import _hlo
from ._measure import HAND, OURS
from ._models import batch_of, loss_of, start
from ._nets import Act, Dense, Linen

BLOCKS, OPTAX, TRAIN_STATE = "by hand, blocks of rows", "optax.microbatch", "TrainState, not split"
EXPLICIT, ONCE = "flaxsplit, Explicit axes", "flaxsplit, shard_map"
ROWS, WIDTH, LAYERS, STEPS = 512, 64, 4, 3
MODEL, TX = Linen(((Dense(WIDTH), Act()) * LAYERS) + (Dense(1),)), optax.adam(1e-3)

Build = Callable[[Any, int], tuple[Any, Any]]


def objective(params: Any, batch: Any) -> Any:
    """The loss of a batch or of a part."""
    return loss_of(MODEL.apply({"params": params}, batch[0]), batch[1])


def fitted(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """The loss as flaxsplit takes it."""
    return objective(params, batch), state


def combined(mesh: Any, count: int) -> tuple[Any, Any]:
    """Out of combinators."""
    carry = fs.init_carry(_params(), {}, TX, sharding=NamedSharding(mesh, P()))
    return fs.jit_step(fs.with_optimizer(fitted, TX, microbatches=count), like=carry), carry


def mapped(mesh: Any, count: int) -> tuple[Any, Any]:
    """Out of combinators, each device by itself, so that gradients are reduced once a step."""
    carry = fs.init_carry(_params(), {}, TX, sharding=NamedSharding(mesh, P()))
    step = fs.with_optimizer(fitted, TX, microbatches=count, axis_name="data")
    specs: Any = {"in_specs": (P(), P("data")), "out_specs": (P(), P())}
    return fs.jit_step(jax.shard_map(step, mesh=mesh, **specs), like=carry), carry


def by_hand(grads_of: Callable[..., Any]) -> Build:
    """`jax.value_and_grad` over parts, Adam, in one jitted function."""

    def build(mesh: Any, count: int) -> tuple[Any, Any]:
        def step(held: Any, batch: Any) -> Any:
            params, opt_state = held
            loss, grads = grads_of(params, batch, count)
            updates, opt_state = TX.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        params = _params()
        return jax.jit(step, donate_argnums=0), jax.device_put((params, TX.init(params)), NamedSharding(mesh, P()))

    return build


def in_parts(cut: Callable[[Any, int], Any]) -> Callable[..., Any]:
    """Loss and gradients over parts as a scan by hand; `cut` gives the parts a leading axis."""

    def grads_of(params: Any, batch: Any, count: int) -> Any:
        if count == 1:
            return jax.value_and_grad(objective)(params, batch)

        def body(sums: Any, part: Any) -> tuple[Any, Any]:
            loss, grads = jax.value_and_grad(objective)(params, part)
            return jax.tree.map(jnp.add, sums, grads), loss

        parts = jax.tree.map(lambda leaf: cut(leaf, count), batch)
        total, losses = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), parts)
        return losses.mean(), jax.tree.map(lambda leaf: leaf / count, total)

    return grads_of


def strided(leaf: Any, count: int) -> Any:
    """Part `i` has the rows `i, i + count, ...`."""
    return leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1)


def blocks(leaf: Any, count: int) -> Any:
    """What first comes to mind."""
    return leaf.reshape(count, -1, *leaf.shape[1:])


def with_optax(params: Any, batch: Any, count: int) -> Any:
    """Loss and gradients as optax adds them up."""
    size = None if count == 1 else batch[0].shape[0] // count
    split: Any = optax.microbatch(jax.value_and_grad(objective), 1, size)
    return jax.tree.map(lambda leaf: leaf / count, split(params, batch))


def of_train_state(mesh: Any, count: int) -> tuple[Any, Any]:
    """As Flax's examples write it, which split no batch."""

    def step(held: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(objective)(held.params, batch)
        return held.apply_gradients(grads=grads), loss

    held = train_state.TrainState.create(apply_fn=MODEL.apply, params=_params(), tx=TX)
    return jax.jit(step, donate_argnums=0), jax.device_put(held, NamedSharding(mesh, P()))


def contenders(count: int) -> Iterator[tuple[str, Build]]:
    """Each by its name."""
    yield HAND, by_hand(in_parts(strided))
    yield from ((OURS, combined), (ONCE, mapped))
    if count == 1 or jax.__version_info__ >= (0, 7):  # before, no Explicit axis beside one of size 1 is reshaped
        yield EXPLICIT, combined
    if count > 1:
        yield BLOCKS, by_hand(in_parts(blocks))
    if count > 1 and hasattr(optax, "microbatch"):  # optax < 0.2.6 has none
        yield OPTAX, by_hand(with_optax)
    if count == 1:
        yield TRAIN_STATE, of_train_state


def _params() -> Any:
    return start(MODEL, TX, jnp.zeros((1, WIDTH))).params


def share(devices: int) -> float:
    """FLOPs of each of so many devices: a matrix is in three products, but the first one and the column in two."""
    return 2 * ROWS * ((3 * LAYERS - 1) * WIDTH * WIDTH + 2 * WIDTH) / devices


def measured(name: str, build: Build, devices: int, count: int) -> dict[str, Any]:
    """What XLA made of a step, and how often it made it in some steps."""
    kind = AxisType.Explicit if name == EXPLICIT else AxisType.Auto
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])
    batch = jax.device_put(batch_of(ROWS, WIDTH), NamedSharding(mesh, P("data")))
    step, held = build(mesh, count)
    losses = []
    with fs.compile_log() as log:
        for _ in range(STEPS):
            held, loss = step(held, batch)
            losses.append(float(loss))
    compiled = step.lower(held, batch).compile()
    return {
        "share": share(devices),
        "flops": _hlo.flops(compiled.as_text(), count),
        "sent": dict(_hlo.sent(compiled.as_text(), count)),
        "memory": compiled.memory_analysis().temp_size_in_bytes,
        "compiles": max(log.compiles.values()),
        "losses": losses,
    }


if __name__ == "__main__":
    _devices, _count = map(int, sys.argv[1:])
    print(json.dumps({name: measured(name, build, _devices, _count) for name, build in contenders(_count)}))
