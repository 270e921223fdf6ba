"""Adapters of low rank.

The pretrained kernels are frozen; two thin matrices beside each are trained (LoRA). The adapters have their own names,
so one glob chooses them: `trainable="*/lora_*"`. After training they are added into the kernels of the plain network.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

RANK = 2


class Adapted(nn.Module):
    """A dense layer with `x @ a @ b` added."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, n]` to `[batch, features]`."""
        a = self.param("lora_a", nn.initializers.lecun_normal(), (x.shape[-1], RANK))
        b = self.param("lora_b", nn.initializers.zeros, (RANK, self.features))
        dense: Array = nn.Dense(self.features, name="dense")(x)
        return dense + x @ a @ b


class Net(nn.Module):
    """Two adapted layers."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, 8]` to `[batch, 1]`."""
        out: Array = Adapted(1)(nn.relu(Adapted(32)(x)))
        return out


def folded(params: Any) -> Any:
    """The kernels with their adapters added, and adapters that add nothing."""
    return {
        name: {
            "dense": {**layer["dense"], "kernel": layer["dense"]["kernel"] + layer["lora_a"] @ layer["lora_b"]},
            "lora_a": layer["lora_a"],
            "lora_b": jnp.zeros_like(layer["lora_b"]),
        }
        for name, layer in params.items()
    }


model = Net()
apply = fs.with_mutable(model, mutable=False)
tx = optax.adam(1e-2)


def loss_fn(params: Any, state: Any, batch: tuple[Array, Array]) -> tuple[Array, Any]:
    """Mean squared error."""
    x, y = batch
    pred, state = apply(params, state, x)
    return optax.l2_loss(pred[:, 0], y).mean(), state


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (128, 8))
    y = jnp.sin(x).sum(-1)
    pretrained = model.init(jax.random.key(1), x)

    params, state = fs.split_params(pretrained, trainable="*/lora_*")
    carry = fs.init_carry(params, state, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    losses = []
    for _ in range(200):
        carry, loss = step(carry, (x, y))
        losses.append(float(loss))

    whole = fs.merge_state(carry.params, carry.state)["params"]
    adapted, plain = (model.apply({"params": each}, x) for each in (whole, folded(whole)))
    assert jnp.allclose(adapted, plain, atol=1e-4)
    assert losses[-1] < losses[0] / 2
    trained, of = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (carry.params, whole))
    print(f"{trained} of {of} numbers trained: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
