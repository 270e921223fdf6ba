"""Training in fp8, beside f32 and Flax's own `TrainState`.

An fp8 layer keeps scales, and histories of the largest values that it saw. Flax hands their next values out as their
gradient. Here they are state: `with_optimizer` overwrites them, and neither clipping nor AdamW's decay sees them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax import Array

import flaxsplit as fs

SCALES = "_overwrite_with_gradient"


class Net(nn.Module):
    fp8: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dot: Any = nn.Fp8DirectDotGeneralOp if self.fp8 else None
        x = nn.relu(nn.Dense(64, dot_general_cls=dot)(x))
        return nn.Dense(16, dot_general_cls=dot)(x)


tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def train(model: Net, batch: tuple[Array, Array]) -> tuple[fs.Carry, Array]:
    """The carry and the loss of each step."""
    apply = fs.with_mutable(model)

    def loss_fn(params: Any, state: Any, batch: tuple[Array, Array]) -> tuple[Array, Any]:
        x, y = batch
        pred, state = apply(params, state, x)
        return optax.l2_loss(pred, y).mean(), state

    params, state = fs.split_params(model.init(jax.random.key(2), batch[0]))
    carry = fs.init_carry(params, state, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    losses = []
    for _ in range(200):
        carry, loss = step(carry, batch)
        losses.append(loss)
    return carry, jnp.stack(losses)


def train_with_train_state(model: Net, batch: tuple[Array, Array]) -> TrainState:
    """As in Flax's guide on fp8: the scales lie beside the params, and `apply_gradients` tells them apart by name."""
    x, y = batch
    state = TrainState.create(apply_fn=model.apply, params=dict(model.init(jax.random.key(2), x)), tx=tx)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        grads = jax.grad(lambda variables: optax.l2_loss(state.apply_fn(variables, x), y).mean())(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(200):
        state = step(state)
    return state


def main() -> None:
    x, y = jax.random.normal(jax.random.key(0), (32, 16)), jax.random.normal(jax.random.key(1), (32, 16))
    (carry, losses), (_, exact) = train(Net(), (x, y)), train(Net(fp8=False), (x, y))
    flax = train_with_train_state(Net(), (x, y)).params
    jax.tree.map(np.testing.assert_array_equal, (carry.params, carry.state[SCALES]), (flax["params"], flax[SCALES]))
    assert losses[-1] < 0.5 * losses[0]
    assert exact[-1] < 0.5 * exact[0]
    print(f"loss after 200 steps: fp8 {losses[-1]:.4f}, f32 {exact[-1]:.4f}; fp8 is TrainState's, bit for bit")


if __name__ == "__main__":
    main()
