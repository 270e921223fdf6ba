"""BatchNorm.

Batch statistics are state: `with_mutable` passes them to the model and returns the new ones, `with_optimizer` threads
them through the step. To evaluate, wrap the same module with `mutable=False`; it reads the trained statistics.
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
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Dense(32)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(1)(x)[:, 0]


model, tx = Net(), optax.adam(1e-2)
apply = fs.with_mutable(model)
evaluate = fs.with_mutable(model, mutable=False)


def loss_fn(params: Any, state: Any, batch: tuple[Array, Array]) -> tuple[Array, Any]:
    x, y = batch
    pred, state = apply(params, state, x, train=True)
    return optax.l2_loss(pred, y).mean(), state


def main() -> None:
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(x).sum(-1)
    params, state = fs.split_params(model.init(jax.random.key(1), x, train=False))
    carry = fs.init_carry(params, state, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    losses = []
    for _ in range(300):
        carry, loss = step(carry, (x, y))
        losses.append(float(loss))

    def evaluated(state: Any) -> float:
        pred, _ = evaluate(carry.params, state, x, train=False)
        return float(optax.l2_loss(pred, y).mean())

    learned, initial = evaluated(carry.state), evaluated(state)
    assert learned < 0.5 < initial
    print(f"training loss {losses[-1]:.3f}; evaluated with its statistics {learned:.3f}, without {initial:.1f}")


if __name__ == "__main__":
    main()
