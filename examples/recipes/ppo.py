"""Proximal policy optimization.

Rollouts are split into minibatches, and each is trained on several times in one dispatch. `scan_steps` scans only the
batch; each minibatch gets the clip parameter as it is. It falls from round to round without a new trace, because it is
an argument of the call, not a part of the batch or of the closure.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

ACTIONS, ROUNDS, ROLLOUTS, PARTS, EPOCHS = 4, 30, 512, 4, 4


class Policy(nn.Module):
    """The logarithm of each action's probability, and what reward is expected."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = nn.tanh(nn.Dense(32)(x))
        return nn.log_softmax(nn.Dense(ACTIONS)(x)), nn.Dense(1)(x)[:, 0]


model, tx = Policy(), optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-3))
apply = fs.with_mutable(model)
Rollout = dict[str, Array]


def chosen(logs: Array, actions: Array) -> Array:
    return jnp.take_along_axis(logs, actions[:, None], -1)[:, 0]


def loss_fn(params: Any, state: Any, batch: Rollout, clip: Array) -> tuple[Array, Any]:
    (logs, values), state = apply(params, state, batch["seen"])
    ratio = jnp.exp(chosen(logs, batch["action"]) - batch["log"])
    advantage = batch["reward"] - batch["value"]
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    entropy = -(jnp.exp(logs) * logs).sum(-1)
    value_loss = (values - batch["reward"]) ** 2
    return (value_loss - gain - 0.01 * entropy).mean(), state


@jax.jit
def rollouts(carry: fs.Carry, world: Array, key: Array) -> Rollout:
    """One decision each: the reward is 1 where the action is the best of this world."""
    seen = jax.random.normal(jax.random.fold_in(key, 0), (ROLLOUTS, 6))
    (logs, values), _ = apply(carry.params, carry.state, seen)
    action = jax.random.categorical(jax.random.fold_in(key, 1), logs)
    reward = (action == jnp.argmax(seen @ world, -1)).astype(jnp.float32)
    return {"seen": seen, "action": action, "reward": reward, "log": chosen(logs, action), "value": values}


def minibatches(batch: Rollout, key: Array) -> Rollout:
    """Every epoch in an order of its own: `[EPOCHS * PARTS, ROLLOUTS / PARTS, ...]`."""
    orders = jax.vmap(lambda each: jax.random.permutation(each, ROLLOUTS))(jax.random.split(key, EPOCHS))
    rows = orders.reshape(EPOCHS * PARTS, -1)
    return {name: leaf[rows] for name, leaf in batch.items()}


def main() -> None:
    world = jax.random.normal(jax.random.key(0), (6, ACTIONS))
    params, state = fs.split_params(model.init(jax.random.key(1), jnp.ones((1, 6))))
    carry = fs.init_carry(params, state, tx)
    train = fs.jit_step(fs.assert_max_traces(fs.scan_steps(fs.with_optimizer(loss_fn, tx))))
    rewards = []
    for i in range(ROUNDS):
        key = jax.random.fold_in(jax.random.key(2), i)
        batch = rollouts(carry, world, key)
        rewards.append(float(batch["reward"].mean()))
        clip = jnp.float32(0.2 * (1 - i / ROUNDS))
        carry, _ = train(carry, minibatches(batch, key), clip)
    assert int(carry.step) == ROUNDS * EPOCHS * PARTS
    assert rewards[-1] > 2 * rewards[0]
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f} in {ROUNDS} rounds of {EPOCHS * PARTS} minibatches")


if __name__ == "__main__":
    main()
