"""Mixed precision with a loss scale.

The network computes in float16; params and statistics stay in float32. Small gradients would vanish in half precision,
so the loss is scaled; the scale is state of the optimizer. A step that overflows is not taken, and halves the scale;
many good steps double it. A corrupt row costs one step. Otherwise it would make the batch statistics infinite, while
the loss looks fine.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

PATIENCE = 50


class Net(nn.Module):
    """Dense and BatchNorm, in half precision but for the statistics."""

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        """Maps `[batch, n]` to `[batch]`."""
        x = nn.Dense(64, dtype=jnp.float16)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=jnp.float16)(x))
        out: Array = nn.Dense(1, dtype=jnp.float16)(x)
        return out[:, 0].astype(jnp.float32)


model = Net()
apply = fs.with_mutable(model)


def unscaled() -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the scale, which the carry hands in; keeps whether they were finite."""

    def init(params: Any) -> Any:
        return {"scale": jnp.float32(2.0**30), "good": jnp.int32(0)}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        finite = jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]))
        good = jnp.where(finite, state["good"] + 1, 0)
        doubled = good >= PATIENCE
        scale = jnp.where(finite, jnp.where(doubled, state["scale"] * 2, state["scale"]), state["scale"] / 2)
        updates = jax.tree.map(lambda leaf: leaf / state["scale"], updates)
        return updates, {"scale": scale, "good": jnp.where(doubled, 0, good)}

    return optax.GradientTransformationExtraArgs(init, update)


tx = optax.chain(unscaled(), optax.adam(1e-2))


def loss_fn(params: Any, state: Any, batch: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Any]:
    """The scaled loss, which is differentiated, and the plain one, to look at."""
    x, y, scale = batch
    pred, state = apply(params, state, x)
    loss = optax.l2_loss(pred, y).mean()
    return (loss * scale, loss), state


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(x).sum(-1)
    params, state = fs.split_params(model.init(jax.random.key(1), x))
    carry = fs.init_carry(params, state, tx)
    inner = fs.with_optimizer(loss_fn, tx, has_aux=True)

    def scaled_step(carry: fs.Carry, batch: tuple[Array, Array]) -> tuple[fs.Carry, Array]:
        carry, (_, loss) = inner(carry, (*batch, carry.opt_state[0]["scale"]))
        return carry, loss

    # The whole carry is kept where anything in the new one is not finite, but for the scale, which always moves.
    step = fs.jit_step(fs.assert_max_traces(fs.skip_nonfinite(scaled_step, moving="opt_state/0/*")))
    corrupt = x.at[0].set(1e6)  # beyond float16
    losses = []
    for i in range(300):
        carry, loss = step(carry, (corrupt if i % 100 == 50 else x, y))
        losses.append(float(loss))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((carry.params, carry.state)))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((carry.params, carry.state)))
    scale, skipped = float(carry.opt_state[0]["scale"]), 300 - int(carry.step)
    assert losses[-1] < losses[0] / 10
    assert skipped > 3
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {skipped} steps skipped, scale {scale:.0f}")


if __name__ == "__main__":
    main()
