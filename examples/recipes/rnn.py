"""A recurrent state from step to step.

The network reads a long sequence piece by piece, and its memory goes from one step to the next. The memory is a
collection of its own, so it is state, like batch statistics. Gradients stop at the border of a piece (truncated
backpropagation through time). When another text begins, `adopt_carry` restores the first memory without a recompile.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

BATCH, PIECE, WIDTH = 16, 20, 32


class Reader(nn.Module):
    """Reads on where the last call stopped."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, time, 1]` to `[batch, time, 1]`."""
        cell = nn.GRUCell(WIDTH)
        memory = self.variable("memory", "hidden", jnp.zeros, (len(x), WIDTH))
        last, hidden = nn.RNN(cell, return_carry=True)(x, initial_carry=jax.lax.stop_gradient(memory.value))
        if not self.is_initializing():
            memory.value = last
        out: Array = nn.Dense(1)(hidden)
        return out


model = Reader()
apply = fs.with_mutable(model)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))


def loss_fn(params: Any, state: Any, batch: tuple[Array, Array]) -> tuple[Array, Any]:
    """Mean squared error of the next value."""
    x, y = batch
    pred, state = apply(params, state, x)
    return optax.l2_loss(pred, y).mean(), state


def main() -> None:
    steps = 200
    phase = jax.random.uniform(jax.random.key(0), (BATCH, 1, 1), maxval=6.0)
    wave = jnp.sin(phase + 0.3 * jnp.arange(steps * PIECE + 1)[None, :, None])
    params, state = fs.split_params(model.init(jax.random.key(1), wave[:, :PIECE]))
    forgotten = state["memory"]
    carry = fs.init_carry(params, state, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    losses = []
    for i in range(steps):
        piece = wave[:, i * PIECE : (i + 1) * PIECE + 1]
        carry, loss = step(carry, (piece[:, :-1], piece[:, 1:]))
        losses.append(float(loss))
        if i == steps // 2:  # a new text begins: forget, and compile nothing anew
            carry = fs.adopt_carry(carry._replace(state={**carry.state, "memory": forgotten}), carry)
    assert losses[-1] < losses[0] / 50
    print(f"next value of waves of unknown phase: loss {losses[0]:.3f} -> {losses[-1]:.5f}, one trace")


if __name__ == "__main__":
    main()
