"""A student and its averaged teacher.

The student learns from labels if there are any, and else from its own average. The teacher is a tree in the state:
`with_ema` averages params and batch statistics every few steps. No optimizer and no gradient sees it. The loss reads it
from the state.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x)))
        return nn.Dense(1)(x)[:, 0]


model, tx = Net(), optax.adam(1e-2)
apply = fs.with_mutable(model)
still = fs.with_mutable(model, mutable=False)
Batch = tuple[Array, Array, Array]


def both(carry: fs.Carry) -> Any:
    """What is averaged: the params, and the statistics that go with them."""
    return {"params": carry.params, "batch_stats": carry.state["batch_stats"]}


def loss_fn(params: Any, state: Any, batch: Batch, weight: Array) -> tuple[Array, Any]:
    x, y, labelled = batch
    pred, state = apply(params, state, x)
    teacher = state["ema"]
    target, _ = still(teacher["params"], {"batch_stats": teacher["batch_stats"]}, x, train=False)
    supervised = (labelled * (pred - y) ** 2).sum() / labelled.sum()
    return supervised + weight * ((pred - target) ** 2).mean(), state


def error_of(params: Any, stats: Any, x: Array, y: Array) -> float:
    pred, _ = still(params, {"batch_stats": stats}, x, train=False)
    return float(((pred - y) ** 2).mean())


def main() -> None:
    x, test = jax.random.normal(jax.random.key(0), (2, 512, 8))
    weights = jax.random.normal(jax.random.key(1), (8,))
    truth, y = jnp.tanh(test @ weights), jnp.tanh(x @ weights)
    y = y + 0.5 * jax.random.normal(jax.random.key(2), (512,))
    labelled = (jnp.arange(512) % 4 == 0).astype(jnp.float32)

    params, state = fs.split_params(model.init(jax.random.key(3), x))
    carry = fs.init_carry(params, state | {"ema": {"params": params, **state}}, tx)
    step = fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.9, of=both, every=10)
    jitted = fs.jit_step(fs.assert_max_traces(step))
    for i in range(400):
        chosen = jax.random.choice(jax.random.key(i), 512, (64,), replace=False)
        batch = x[chosen], y[chosen], labelled[chosen]
        carry, _ = jitted(carry, batch, jnp.minimum(1.0, i / 200))  # one trace: the weight is an argument of the call

    teacher = carry.state["ema"]
    student = error_of(carry.params, carry.state["batch_stats"], test, truth)
    averaged = error_of(teacher["params"], teacher["batch_stats"], test, truth)
    assert averaged < student
    print(f"error of the student {student:.3f}, of its teacher {averaged:.3f}")


if __name__ == "__main__":
    main()
