"""Gradient accumulation.

Inside a step: `with_optimizer(microbatches=4)` runs the batch in four parts, one after another, with the memory of
one, and threads batch statistics and dropout keys through them. Across steps: `optax.MultiSteps` updates at every
second call. Here the carry is a `TrainState`, which `jit_step` takes too.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import Array

import flaxsplit as fs


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        h = nn.LayerNorm(dtype=jnp.bfloat16)(x)
        h = nn.Dense(self.width, dtype=jnp.bfloat16)(h)
        h = nn.Dropout(0.1)(nn.silu(h), deterministic=not train)
        return x + nn.Dense(x.shape[-1])(h)


class Network(nn.Module):
    depth: int = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool = True) -> Array:
        for i in range(self.depth):
            x = Block(width=8, name=f"block_{i}")(x, train)
        mean = self.variable("statistics", "mean", jnp.zeros, (1, x.shape[-1]))
        if train and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(axis=0, keepdims=True)
        return nn.Dense(1)(x - mean.value).squeeze(-1)


class TrainState(train_state.TrainState):
    state: dict[str, Any]


model = Network()
apply = fs.with_rngs(fs.with_mutable(model))


def loss_fn(params: optax.Params, state: dict[str, Any], batch: tuple[Array, Array]) -> tuple[Array, dict[str, Any]]:
    x, y = batch
    prediction, state = apply(params, state, x, train=True)
    return optax.l2_loss(prediction, y).mean(), state


def train_step(current: TrainState, batch: tuple[Array, Array]) -> tuple[TrainState, Array]:
    (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(current.params, current.state, batch)
    return current.apply_gradients(grads=grads, state=state), loss


def main() -> None:
    key = jax.random.key(0)
    x = jax.random.normal(key, (64, 4))
    batch = (x, x.sum(axis=-1))
    params, state = fs.split_params(model.init(key, x, train=False))
    state |= fs.rng_state(dropout=key)

    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 2e-2, 10, 100))
    carry = fs.init_carry(params, state, tx)
    inside = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx, microbatches=4)))
    losses: list[float] = []
    for _ in range(100):
        carry, loss = inside(carry, batch)
        losses.append(float(loss))
    print(f"inside a step: loss {losses[0]:.3f} -> {losses[-1]:.3f} after {int(carry.step)} steps of 4 microbatches")
    assert losses[-1] < losses[0] / 3

    every_second = optax.MultiSteps(optax.adam(3e-2), every_k_schedule=2).gradient_transformation()
    current = TrainState.create(apply_fn=model.apply, params=params, tx=every_second, state=state)
    across = fs.jit_step(train_step)
    losses.clear()
    for _ in range(100):
        current, loss = across(current, batch)
        losses.append(loss.item())
    print(f"across steps: loss {losses[0]:.3f} -> {losses[-1]:.3f} after {int(current.step)} steps, 50 updates")
    assert losses[-1] < losses[0] / 3


if __name__ == "__main__":
    main()
