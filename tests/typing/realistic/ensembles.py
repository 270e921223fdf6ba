"""An ensemble: many members of one architecture, each with its own params and statistics, in one step."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

MEMBERS = 3


class Regressor(nn.Module):
    hidden: tuple[int, ...] = (16, 16)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        for width in self.hidden:
            x = nn.Dense(width)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.tanh(x)
        mean, log_variance = jnp.split(nn.Dense(2)(x), 2, axis=-1)
        return mean, log_variance


model = Regressor()
members = fs.vmap_stateful(
    fs.with_mutable(model), in_axes=None, axis_name="member", params_axes=0, state_axes={"batch_stats": 0}
)
frozen_members = fs.vmap_stateful(
    fs.with_mutable(model, mutable=False),
    in_axes=None,
    axis_name="member",
    params_axes=0,
    state_axes={"batch_stats": 0},
)
tx = optax.sgd(1e-2, momentum=0.9)


def negative_log_likelihood(mean: Array, log_variance: Array, y: Array) -> Array:
    return 0.5 * (log_variance + (y - mean) ** 2 * jnp.exp(-log_variance)).mean(axis=(-2, -1))


def loss_fn(
    params: dict[str, Any], state: dict[str, Any], batch: dict[str, Array]
) -> tuple[tuple[Array, Array], dict[str, Any]]:
    (mean, log_variance), state = members(params, state, batch["x"], train=True)
    each = negative_log_likelihood(mean, log_variance, batch["y"])
    return (each.sum(), each), state


def predict(carry: fs.Carry, x: Array) -> tuple[Array, Array]:
    """Returns the mean of the mixture and how much its members disagree."""
    (mean, _), _ = frozen_members(carry.params, carry.state, x)
    return mean.mean(axis=0), mean.std(axis=0)


def init_member(key: Array) -> tuple[dict[str, Any], dict[str, Any]]:
    return fs.split_params(model.init(key, jnp.ones((1, 1))))


def train(steps: int = 2) -> float:
    member_keys = jax.random.split(jax.random.key(0), MEMBERS)
    params, state = jax.vmap(init_member)(member_keys)
    carry = fs.init_carry(params, state, tx)
    step = fs.jit_step(fs.with_optimizer(loss_fn, tx, has_aux=True))

    x = jnp.linspace(-1.0, 1.0, 16)[:, None]
    batch = {"x": x, "y": jnp.sin(3 * x)}
    best = jnp.array(jnp.inf)
    for _ in range(steps):
        carry, (_, each) = step(carry, batch)
        best = jnp.minimum(best, each.min())
        print("members:", ", ".join(f"{loss:.2f}" for loss in each))

    mean, disagreement = jax.jit(predict)(carry, x)
    assert mean.shape == disagreement.shape == (16, 1)
    return float(best)
