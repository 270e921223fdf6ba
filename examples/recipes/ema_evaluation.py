"""Evaluating averaged weights.

`with_ema` keeps an average of the params in the state, beside the batch statistics: what is trained stays as it was,
what is evaluated is `carry.state["ema"]`. With noisy gradients the average is the better model, long before the rate
has decayed.
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


def main() -> None:
    x, test = jax.random.normal(jax.random.key(0), (2, 512, 8))
    weights = jax.random.normal(jax.random.key(1), (8,))
    y = jnp.tanh(x @ weights) + jax.random.normal(jax.random.key(2), (512,))  # more noise than signal
    truth = test, jnp.tanh(test @ weights)

    params, state = fs.split_params(model.init(jax.random.key(3), x))
    carry = fs.init_carry(params, state | {"ema": params}, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.99)))
    for i in range(400):
        chosen = jax.random.choice(jax.random.key(i), 512, (32,))
        carry, _ = step(carry, (x[chosen], y[chosen]))

    # The average is a tree like the params, so it goes where they go.
    raw, averaged = (float(error(each, carry.state, truth)) for each in (carry.params, carry.state["ema"]))
    assert averaged < raw
    print(f"error of the last weights {raw:.3f}, of their average {averaged:.3f}")


if __name__ == "__main__":
    main()
