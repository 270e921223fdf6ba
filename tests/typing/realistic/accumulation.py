"""Gradient accumulation: inside a step by microbatches; across steps by optax, over a TrainState of one's own."""

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
        mean = self.variable("statistics", "mean", jnp.zeros, (x.shape[-1],))
        if train and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(axis=0)
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


def train(steps: int = 2) -> float:
    key = jax.random.key(0)
    x = jax.random.normal(key, (16, 4))
    batch = (x, x.sum(axis=-1))
    params, state = fs.split_params(model.init(key, x, train=False))
    state |= fs.rng_state(dropout=key)

    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10))
    carry = fs.init_carry(params, state, tx)
    inside = fs.jit_step(fs.with_optimizer(loss_fn, tx, microbatches=4))
    losses: list[float] = []
    for _ in range(steps):
        carry, loss = inside(carry, batch)
        losses.append(float(loss))

    every_second = optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation()
    current = TrainState.create(apply_fn=model.apply, params=params, tx=every_second, state=state)
    across = fs.jit_step(train_step, donate=False)
    for _ in range(steps):
        current, loss = across(current, batch)
        losses.append(loss.item())
    print(f"{int(carry.step)} and {int(current.step)} steps")
    return min(losses)
