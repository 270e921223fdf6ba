"""Dropout, and its uncertainty.

`rng_state` puts a key for each stream into the state; `with_rngs` splits it at each call and returns the new key, so
every step draws new masks and your loop handles no keys. `apply` draws masks after training too: many draws of one
prediction show how sure the network is (Monte Carlo dropout).
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
        for _ in range(2):
            x = nn.Dropout(0.1, deterministic=not train)(nn.tanh(nn.Dense(64)(x)))
        return nn.Dense(1)(x)[:, 0]


model, tx = Net(), optax.adam(1e-2)
apply = fs.with_rngs(fs.with_mutable(model))


def loss_fn(params: Any, state: Any, batch: tuple[Array, Array]) -> tuple[Array, Any]:
    x, y = batch
    pred, state = apply(params, state, x)
    return optax.l2_loss(pred, y).mean(), state


def draw(carry: fs.Carry, x: Array) -> tuple[fs.Carry, Array]:
    pred, state = apply(carry.params, carry.state, x)
    return carry._replace(state=state), pred


def main() -> None:
    x = jax.random.uniform(jax.random.key(0), (128, 1), minval=-1.0)
    y = jnp.sin(4 * x[:, 0])
    params, state = fs.split_params(model.init(jax.random.key(1), x, train=False))
    carry = fs.init_carry(params, state | fs.rng_state(dropout=jax.random.key(2)), tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    losses = []
    for _ in range(300):
        carry, loss = step(carry, (x, y))
        losses.append(float(loss))

    where = jnp.array([[0.0], [3.0]])  # seen in training, and far away
    carry, draws = fs.jit_step(fs.scan_steps(draw))(carry, jnp.broadcast_to(where, (200, 2, 1)))
    near, far = draws.std(axis=0)
    assert losses[-1] < 0.1
    assert far > near
    print(f"loss {losses[-1]:.3f}; predictions vary by {near:.2f} where there were data, by {far:.2f} far from them")


if __name__ == "__main__":
    main()
