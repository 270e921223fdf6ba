"""Training with differential privacy.

Each example's gradient is clipped before the average, and noise is added, so that the result reveals no single example.
`vmap_stateful` around a gradient function gives the gradient of each example; the optimizer is optax's own, and takes
them with a leading axis. One example has no batch to normalize over, so there is no BatchNorm.
"""

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import differentially_private_aggregate

import flaxsplit as fs


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        out: Array = nn.Dense(1, name="head")(nn.tanh(nn.Dense(16, name="body")(x)))[0]
        return out


model = Net()
cross_entropy: Any = optax.sigmoid_binary_cross_entropy  # which has no types
apply = fs.with_mutable(model)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # optax renames `seed`; the oldest one knows no other name
    make: Any = differentially_private_aggregate
    private = make(l2_norm_clip=1.0, noise_multiplier=0.3, seed=0)
tx = optax.chain(private, optax.sgd(0.5))


def loss_fn(params: Any, state: Any, example: tuple[Array, Array]) -> tuple[Array, Any]:
    """Of one example."""
    x, y = example
    pred, state = apply(params, state, x)
    return cross_entropy(pred, y), state


grads_of_each: Any = fs.vmap_stateful(fs.value_and_grad(loss_fn))


def step(carry: fs.Carry, batch: tuple[Array, Array]) -> tuple[fs.Carry, Array]:
    (losses, grads), state = grads_of_each(carry.params, carry.state, batch)
    return fs.apply_gradients(tx, carry, grads, state), losses.mean()


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.float32)
    params, state = fs.split_params(model.init(jax.random.key(1), x[0]))
    carry = fs.init_carry(params, state, tx)
    jitted = fs.jit_step(fs.assert_max_traces(step))
    losses = []
    for _ in range(400):
        carry, loss = jitted(carry, (x, y))
        losses.append(float(loss))
    (_, grads), _ = grads_of_each(carry.params, carry.state, (x, y))
    kernel = grads["body"]["kernel"]
    assert kernel.shape == (256, 8, 16)
    assert losses[-1] < losses[0] / 2
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, each of {len(kernel)} gradients clipped to 1, with noise")


if __name__ == "__main__":
    main()
