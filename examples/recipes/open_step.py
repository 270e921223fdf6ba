"""The open step.

Put your code between the gradient and the optimizer: log the norms of gradients, updates and params, add a penalty to
one gradient by name, and give the loss a key of this step. It takes three lines, and all checks stay.
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
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x)))
        return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(x))[:, 0]


STEPS = 200
model = Net()
apply: Any = fs.with_mutable(model)  # which is given keys by hand
schedule = optax.cosine_decay_schedule(3e-2, STEPS)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def loss_fn(params: Any, state: Any, batch: tuple[Array, Array], key: Array) -> tuple[Array, Any]:
    x, y = batch
    pred, state = apply(params, state, x, rngs={"dropout": key})
    return optax.l2_loss(pred, y).mean(), state


grads_of = fs.value_and_grad(loss_fn, microbatches=2)


def step(carry: fs.Carry, batch: tuple[Array, Array], key: Array) -> tuple[fs.Carry, dict[str, Any]]:
    """A step by hand, of parts that check themselves."""
    key = jax.random.fold_in(key, carry.step)
    (loss, grads), state = grads_of(carry.params, carry.state, batch, key)
    new = fs.apply_gradients(tx, carry, grads, state)
    moved = jax.tree.map(jnp.subtract, new.params, carry.params)
    norms = {"gradient": grads, "update": moved, "params": new.params}
    return new, {"loss": loss, "rate": schedule(carry.step)} | {
        name: optax.tree.norm(tree) for name, tree in norms.items()
    }


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.tanh(x).sum(-1)
    params, state = fs.split_params(model.init(jax.random.key(1), x, train=False))
    carry = fs.init_carry(params, state, tx)
    jitted = fs.jit_step(fs.assert_max_traces(step))
    logs = []
    for _ in range(STEPS):
        carry, log = jitted(carry, (x, y), jax.random.key(2))
        logs.append(log)  # arrays: nothing waits for the device until the end
    first, last = ({name: float(value) for name, value in log.items()} for log in (logs[0], logs[-1]))
    assert last["loss"] < first["loss"] / 10
    assert last["rate"] < first["rate"] / 100
    assert last["update"] < first["update"]  # the rate has decayed
    print("; ".join(f"{name} {first[name]:.3g} -> {last[name]:.3g}" for name in first))


if __name__ == "__main__":
    main()
