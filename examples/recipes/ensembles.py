"""Ensembles by `jax.vmap` over the carry.

A step is a pure function of carry and batch, so an ensemble is `jax.vmap` over a carry whose leaves have a leading
axis: one compile, one dispatch for all members, each with its own params, statistics and optimizer state. To predict,
`vmap_stateful` with `params_axes` and `state_axes` maps the model over its members.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

MEMBERS = 5
Tree = dict[str, Any]


class Regressor(nn.Module):
    hidden: tuple[int, ...] = (32, 32)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for width in self.hidden:
            x = nn.Dense(width)(x)
            x = nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(1)(x)


model, tx = Regressor(), optax.adam(1e-2)
apply = fs.with_mutable(model)
still = fs.with_mutable(model, mutable=False)
members = fs.vmap_stateful(still, in_axes=None, axis_name="member", params_axes=0, state_axes={"batch_stats": 0})


def loss_fn(params: Tree, state: Tree, batch: dict[str, Array]) -> tuple[Array, Tree]:
    pred, state = apply(params, state, batch["x"], train=True)
    return optax.l2_loss(pred, batch["y"]).mean(), state


def init_member(key: Array) -> fs.Carry:
    return fs.init_carry(*fs.split_params(model.init(key, jnp.ones((1, 1)))), tx)


def main() -> None:
    x = jnp.linspace(-1.0, 1.0, 64)[:, None]
    batch = {"x": x, "y": jnp.sin(3 * x)}
    carry = jax.vmap(init_member)(jax.random.split(jax.random.key(0), MEMBERS))
    step = fs.jit_step(fs.assert_max_traces(jax.vmap(fs.with_optimizer(loss_fn, tx), in_axes=(0, None))))
    for _ in range(300):
        carry, _ = step(carry, batch)

    pred, _ = jax.jit(members)(carry.params, carry.state, x)
    errors = jax.vmap(optax.l2_loss, (0, None))(pred, batch["y"]).mean(axis=(1, 2))
    together = optax.l2_loss(pred.mean(axis=0), batch["y"]).mean()
    assert errors.shape == (MEMBERS,)
    assert together < errors.mean()
    print("errors of the members:", ", ".join(f"{error:.5f}" for error in errors))
    print(f"error of their mean: {together:.5f}")


if __name__ == "__main__":
    main()
