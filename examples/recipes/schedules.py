"""Learning rates: schedule, plateau, by hand.

One rate warms up and decays, one waits for a plateau, one is changed by hand in the middle. All three are optax's and
are in the optimizer's state, so a checkpoint saves them and a change needs no recompile. `with_optimizer` passes the
loss to the one that waits for a plateau.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(1)])
apply = fs.with_mutable(model)


def loss_fn(params: Any, state: Any, batch: tuple[Array, Array]) -> tuple[Array, Any]:
    """Mean squared error."""
    x, y = batch
    pred, state = apply(params, state, x)
    return optax.l2_loss(pred[:, 0], y).mean(), state


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """By name; `with_optimizer` hands each the loss, which a plateau is made of."""
    cosine = optax.warmup_cosine_decay_schedule(0.0, 2e-2, steps // 10, steps)
    return {
        "warm-up and cosine": optax.adam(cosine),
        "plateau": optax.chain(optax.adam(2e-2), optax.contrib.reduce_on_plateau(factor=0.5, patience=10)),
        "by hand": optax.inject_hyperparams(optax.adam)(learning_rate=2e-2),
    }


def main() -> None:
    steps = 200
    x = jax.random.normal(jax.random.key(0), (128, 8))
    batch = x, jnp.sin(x).sum(-1)
    params, state = fs.split_params(model.init(jax.random.key(1), x))
    for name, tx in optimizers(steps).items():
        carry = fs.init_carry(params, state, tx)
        step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
        losses = []
        for i in range(steps):
            carry, loss = step(carry, batch)
            losses.append(float(loss))
            if name == "by hand" and i == steps // 2:
                slower = {**carry.opt_state.hyperparams, "learning_rate": 5e-3}
                opt_state = carry.opt_state._replace(hyperparams=slower)
                carry = fs.adopt_carry(carry._replace(opt_state=opt_state), carry)
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.4f}, one trace")
        assert losses[-1] < losses[0] / 20


if __name__ == "__main__":
    main()
