"""The ImageNet step, before and after.

The step of Flax's ImageNet example on each device: a residual network with batch statistics, momentum, weight decay on
kernels, a warmup and cosine schedule, gradients and statistics averaged across devices. `before` is that step by hand
over a TrainState. In `after` you write only the loss, and `with_optimizer(axis_name=...)` averages. Both give the same
losses.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before JAX starts

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

Batch = tuple[Array, Array]
CLASSES, STEPS = 4, 30


class ResNet(nn.Module):
    """A stem, two residual blocks, a head; statistics are those of all devices' examples."""

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, axis_name="data")
        x = nn.relu(norm()(conv(8)(x)))
        for width in (8, 16):
            y = norm(scale_init=nn.initializers.zeros)(conv(width)(nn.relu(norm()(conv(width)(x)))))
            x = nn.relu(y + (x if x.shape == y.shape else norm()(nn.Conv(width, (1, 1), use_bias=False)(x))))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


model = ResNet()
schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, STEPS // 10, STEPS)
tx = optax.chain(optax.add_decayed_weights(1e-4, mask=kernels), optax.sgd(schedule, momentum=0.9, nesterov=True))


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)).mean()


class TrainState(train_state.TrainState):
    batch_stats: Any


def before(state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
    x, y = batch

    def loss_fn(params: Any) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = model.apply(variables, x, mutable=["batch_stats"])
        return jax.lax.pmean(cross_entropy(logits, y), "data"), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"]), loss


apply = fs.with_mutable(model)


def loss_fn(params: Any, state: Any, batch: Batch) -> tuple[Array, Any]:
    x, y = batch
    logits, state = apply(params, state, x)
    return cross_entropy(logits, y), state


after = fs.with_optimizer(loss_fn, tx, axis_name="data")


def run(step: Callable[..., Any], carry: Any, batch: Batch) -> list[float]:
    """On all devices: the batch is split over them, everything else is the same on each."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    mapped: Any = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    carry, losses = jax.device_put(carry, NamedSharding(mesh, P())), list[float]()
    compiled = fs.jit_step(fs.assert_max_traces(mapped), like=carry, batch=NamedSharding(mesh, P("data")))
    for _ in range(STEPS):
        carry, loss = compiled(carry, batch)
        losses.append(float(loss))
    return losses


def main() -> None:
    y = jax.random.randint(jax.random.key(0), (64,), 0, CLASSES)
    x = jax.random.normal(jax.random.key(1), (64, 8, 8, 3)) + y[:, None, None, None] / 2
    variables: Any = model.init(jax.random.key(2), x[:1], train=False)
    copied: Any = jax.tree.map(jnp.copy, variables)
    create: Any = TrainState.create
    theirs = create(apply_fn=model.apply, params=copied["params"], batch_stats=copied["batch_stats"], tx=tx)
    ours = fs.init_carry(*fs.split_params(variables), tx)

    by_hand, losses = run(before, theirs, (x, y)), run(after, ours, (x, y))
    np.testing.assert_allclose(losses, by_hand, rtol=1e-4)
    assert losses[-1] < losses[0] / 2
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} on {jax.device_count()} devices, before and after alike")


if __name__ == "__main__":
    main()
