"""A TrainState, moved over step by step.

Each stage runs and gives the same losses. First `jit_step` compiles the step, and the state stays a `TrainState`. Then
`with_mutable` calls the model. Then a `Carry` replaces the `TrainState`, and `with_optimizer` the step.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import Array

import flaxsplit as fs


class Net(nn.Module):
    """Dense and BatchNorm."""

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        """Maps `[batch, n]` to `[batch]`."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x)))
        out: Array = nn.Dense(1)(x)[:, 0]
        return out


class TrainState(train_state.TrainState):
    """As Flax's guide on batch normalization has it."""

    batch_stats: Any


Batch = tuple[Array, Array]
model, tx = Net(), optax.adam(1e-2)


def train_step(state: Any, batch: Batch) -> Any:
    """The step as it was."""
    x, y = batch

    def loss_fn(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        pred, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
        return optax.l2_loss(pred, y).mean(), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads).replace(batch_stats=updates["batch_stats"]), loss


apply = fs.with_mutable(model)


def loss_fn(params: Any, state: Any, batch: Batch) -> tuple[Array, Any]:
    """The loss, with the state as an argument."""
    x, y = batch
    pred, state = apply(params, state, x)
    return optax.l2_loss(pred, y).mean(), state


def their_state_our_loss(state: Any, batch: Batch) -> Any:
    """In between: `loss_fn` knows nothing of TrainState, the step still does."""
    held = {"batch_stats": state.batch_stats}
    (loss, held), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, held, batch)
    return state.apply_gradients(grads=grads).replace(**held), loss


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (64, 8))
    batch = x, jnp.sin(x).sum(-1)
    variables = model.init(jax.random.key(1), x)

    def begin() -> Any:
        copied: Any = jax.tree.map(jnp.copy, variables)
        create: Any = TrainState.create
        return create(apply_fn=model.apply, params=copied["params"], batch_stats=copied["batch_stats"], tx=tx)

    def run(step: Any, carry: Any) -> list[float]:
        losses = []
        for _ in range(50):
            carry, loss = step(carry, batch)
            losses.append(float(loss))
        return losses

    stages = {
        "TrainState, jax.jit": run(jax.jit(train_step), begin()),
        "the same step, compiled and donated by jit_step": run(fs.jit_step(train_step), begin()),
        "with_mutable for the model": run(fs.jit_step(their_state_our_loss), begin()),
        "a carry for the state": run(
            fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx))),
            fs.init_carry(*fs.split_params(variables), tx),
        ),
    }
    first, *others = stages.values()
    for name, losses in stages.items():
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert all(jnp.allclose(jnp.array(first), jnp.array(each), rtol=1e-5) for each in others)


if __name__ == "__main__":
    main()
