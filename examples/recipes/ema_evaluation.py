"""Evaluating averaged weights.

`with_ema` keeps an average in the state and does not change the training. With noisy gradients the average is the
better model, long before the learning rate has decayed. Which batch statistics belong to it? Those of the last step
belong to other weights. You can average them too, or compute new ones by forward passes. This recipe measures all
three. On this small network they differ by less than averaging gains; measure them on yours.
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
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(32)(x)))
        return nn.Dense(1)(x)[:, 0]


model, tx = Net(), optax.adam(2e-2)
apply = fs.with_mutable(model)
still = fs.with_mutable(model, mutable=False)


def loss_fn(params: Any, state: Any, batch: tuple[Array, Array]) -> tuple[Array, Any]:
    x, y = batch
    pred, state = apply(params, state, x)
    return optax.l2_loss(pred, y).mean(), state


@jax.jit
def error(params: Any, state: Any, batch: tuple[Array, Array]) -> Array:
    pred, _ = still(params, state, batch[0], train=False)
    return optax.l2_loss(pred, batch[1]).mean()


def both(carry: fs.Carry) -> Any:
    """What is averaged: the params, and the statistics that go with them."""
    return {"params": carry.params, "batch_stats": carry.state["batch_stats"]}


def main() -> None:
    x, test = jax.random.normal(jax.random.key(0), (2, 512, 8))
    weights = jax.random.normal(jax.random.key(1), (8,))
    y = jnp.tanh(x @ weights) + jax.random.normal(jax.random.key(2), (512,))  # more noise than signal
    truth = test, jnp.tanh(test @ weights)

    params, state = fs.split_params(model.init(jax.random.key(3), x))
    carry = fs.init_carry(params, state | {"ema": {"params": params, **state}}, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.99, of=both)))
    for i in range(400):
        chosen = jax.random.choice(jax.random.key(i), 512, (32,))
        carry, _ = step(carry, (x[chosen], y[chosen]))

    # The average is a tree like what it is of, so it goes where that goes.
    last, ema = {"batch_stats": carry.state["batch_stats"]}, carry.state["ema"]
    anew = last
    for _ in range(100):  # forward passes alone: until the statistics have forgotten those of other weights
        _, anew = apply(ema["params"], anew, x)
    errors = {
        "the last weights": error(carry.params, last, truth),
        "averaged weights, statistics of the last step": error(ema["params"], last, truth),
        "averaged weights, averaged statistics": error(ema["params"], {"batch_stats": ema["batch_stats"]}, truth),
        "averaged weights, statistics computed anew": error(ema["params"], anew, truth),
    }
    last_error, *averaged = map(float, errors.values())
    assert max(averaged) < last_error
    print("; ".join(f"{name}: {float(value):.4f}" for name, value in errors.items()))


if __name__ == "__main__":
    main()
