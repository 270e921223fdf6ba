"""An NNX module.

`from_nnx` splits a module once: into a function with the module's own signature, its params and its state. Both are
plain dicts that every combinator takes. Dropout's streams and batch statistics are state. `to_nnx` writes the trained
values back; then use the module as if NNX had trained it. NNX's own loop has the same losses.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import flaxsplit as fs


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense, self.head = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        out: Array = self.head(self.dropout(nnx.relu(self.norm(self.dense(x)))))[:, 0]
        return out


Batch = tuple[Array, Array]
tx = optax.adam(1e-2)


def with_nnx(module: Net, batch: Batch, steps: int) -> list[float]:
    optimizer: Any = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nnx.jit
    def step(module: Net, optimizer: Any, batch: Batch) -> Any:
        def loss_fn(module: Net) -> Array:
            return optax.l2_loss(module(batch[0]), batch[1]).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(module)
        optimizer.update(module, grads)
        return loss

    return [float(step(module, optimizer, batch)) for _ in range(steps)]


def with_flaxsplit(module: Net, batch: Batch, steps: int) -> list[float]:
    apply, params, state = fs.from_nnx(module)

    def loss_fn(params: Any, state: Any, batch: Batch) -> tuple[Array, Any]:
        pred, state = apply(params, state, batch[0])
        return optax.l2_loss(pred, batch[1]).mean(), state

    carry = fs.init_carry(params, state, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    losses = []
    for _ in range(steps):
        carry, loss = step(carry, batch)
        losses.append(float(loss))
    fs.to_nnx(module, carry.params, carry.state)
    return losses


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (64, 8))
    batch = x, jnp.sin(x).sum(-1)
    theirs, ours = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    losses = with_nnx(theirs, batch, 50)
    np.testing.assert_allclose(with_flaxsplit(ours, batch, 50), losses, rtol=1e-5)
    evaluated: list[Any] = [ours, theirs]
    for module in evaluated:
        module.eval()  # a module like any other
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
    assert losses[-1] < losses[0] / 2
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in both, and the module predicts as the one that NNX trained")


if __name__ == "__main__":
    main()
