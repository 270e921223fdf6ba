"""Gradual unfreezing.

First the head is trained, then the layer below it too, then everything. `adopt_carry(..., strict=False)` converts the
carry from one split of the params to the next: weights, moments, step count and average stay, and newly trained params
start with fresh moments. The step compiles once for each split.
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
    def __call__(self, x: Array) -> Array:
        x = nn.tanh(nn.Dense(16, name="first")(x))
        x = nn.tanh(nn.Dense(16, name="second")(x))
        return nn.Dense(1, name="head")(x)[:, 0]


model, tx = Net(), optax.adam(1e-2)
apply = fs.with_mutable(model)
stages = ("head/*", ["head/*", "second/*"], None)


def loss_fn(params: Any, state: Any, batch: tuple[Array, Array]) -> tuple[Array, Any]:
    x, y = batch
    pred, state = apply(params, state, x)
    return optax.l2_loss(pred, y).mean(), state


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(2 * x[:, 0]) + x[:, 1]
    variables = model.init(jax.random.key(1), x)
    step = fs.jit_step(fs.assert_max_traces(fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.9), len(stages)))
    carry: fs.Carry | None = None
    told = []
    for trainable in stages:
        params, state = fs.split_params(variables, trainable=trainable)
        start = fs.init_carry(params, state | {"ema": params}, tx)
        before = carry
        carry = start if before is None else fs.adopt_carry(before, start, strict=False)
        if before is not None:
            moments = jax.tree.leaves(before.opt_state[0].mu["head"]), jax.tree.leaves(carry.opt_state[0].mu["head"])
            assert all((old == new).all() for old, new in zip(*moments, strict=True))
        for _ in range(150):
            carry, _ = step(carry, (x, y))
        told.append(float(loss_fn(carry.params, carry.state, (x, y))[0]))
    assert carry is not None
    assert int(carry.step) == 450
    assert told[0] > told[1] > told[2]
    print("loss with the head, one layer more, all:", ", ".join(f"{loss:.4f}" for loss in told))


if __name__ == "__main__":
    main()
