"""Sharpness-aware minimization.

The step computes the gradient twice: at the params, and at the worst point near them, in the direction of the first
gradient. Two calls of one gradient function make a step. It keeps the batch statistics of the first call, since the
second call uses params that are not kept.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

RADIUS = 0.5


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x)))
        return nn.Dense(1)(x)[:, 0]


model, tx = Net(), optax.adam(1e-2)
apply = fs.with_mutable(model)


def loss_fn(params: Any, state: Any, batch: tuple[Array, Array]) -> tuple[Array, Any]:
    x, y = batch
    pred, state = apply(params, state, x)
    return optax.l2_loss(pred, y).mean(), state


grads_of = fs.value_and_grad(loss_fn)


def step(carry: fs.Carry, batch: tuple[Array, Array]) -> tuple[fs.Carry, Array]:
    """Downhill from where it is worst."""
    (loss, grads), state = grads_of(carry.params, carry.state, batch)
    size = RADIUS / (optax.tree.norm(grads) + 1e-12)
    worst = jax.tree.map(lambda param, grad: param + size * grad, carry.params, grads)
    (_, grads), _ = grads_of(worst, carry.state, batch)
    return fs.apply_gradients(tx, carry, grads, state), loss


def sharpness(carry: fs.Carry, batch: tuple[Array, Array]) -> float:
    """How much the loss rises along its own gradient."""
    (loss, grads), _ = grads_of(carry.params, carry.state, batch)
    size = RADIUS / optax.tree.norm(grads)
    worst = jax.tree.map(lambda param, grad: param + size * grad, carry.params, grads)
    return float(loss_fn(worst, carry.state, batch)[0] - loss)


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (64, 8))
    y = jnp.sign(x[:, 0]) + 0.5 * jax.random.normal(jax.random.key(1), (64,))
    params, state = fs.split_params(model.init(jax.random.key(2), x))
    steps: dict[str, Any] = {"plain": fs.with_optimizer(loss_fn, tx), "sharpness-aware": step}
    found = {}
    for name, stepping in steps.items():
        carry = fs.init_carry(params, state, tx)
        jitted = fs.jit_step(fs.assert_max_traces(stepping))
        for _ in range(300):
            carry, _ = jitted(carry, (x, y))
        found[name] = (float(loss_fn(carry.params, carry.state, (x, y))[0]), sharpness(carry, (x, y)))
    assert found["sharpness-aware"][1] < found["plain"][1]
    print("; ".join(f"{name}: loss {loss:.4f}, sharpness {rise:.4f}" for name, (loss, rise) in found.items()))


if __name__ == "__main__":
    main()
