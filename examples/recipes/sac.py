"""Soft actor-critic: three optimizers, one target network.

Critic, actor and temperature each have a carry, and a tuple of three carries is a carry. Each loss gets what it needs
of the others as further arguments. The target network is the critic's averaged params: `with_ema` keeps them in
`state['ema']`. The critic's loss reads them there, and they get no gradient. Transitions come from a fixed replay.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

DISCOUNT, ENTROPY, STEPS, BATCH, HORIZON = 0.9, -1.0, 400, 128, 30
Transitions = dict[str, Array]


class Critic(nn.Module):
    """Two estimates of what will be gained; the lower one counts."""

    @nn.compact
    def __call__(self, seen: Array, action: Array) -> Array:
        x = jnp.concatenate([seen, action], -1)
        return jnp.stack([nn.Dense(1)(nn.relu(nn.Dense(32)(nn.relu(nn.Dense(32)(x)))))[:, 0] for _ in range(2)])


class Actor(nn.Module):
    """Where an action lies, and how far around it."""

    @nn.compact
    def __call__(self, seen: Array) -> tuple[Array, Array]:
        x = nn.relu(nn.Dense(32)(nn.relu(nn.Dense(32)(seen))))
        return nn.Dense(1)(x), jnp.clip(nn.Dense(1)(x), -5.0, 1.0)


class Learners(NamedTuple):
    critic: fs.Carry
    actor: fs.Carry
    temperature: fs.Carry


critic, actor, tx = Critic(), Actor(), optax.adam(3e-3)
value_of, policy = fs.with_mutable(critic), fs.with_mutable(actor)


def act(params: Any, seen: Array, key: Array) -> tuple[Array, Array]:
    """An action between -1 and 1, and the logarithm of its density."""
    (mean, spread), _ = policy(params, {}, seen)
    noise = jax.random.normal(key, mean.shape)
    raw = mean + jnp.exp(spread) * noise
    log = -0.5 * noise**2 - spread - 0.5 * jnp.log(2 * jnp.pi) - 2 * (jnp.log(2.0) - raw - nn.softplus(-2 * raw))
    return jnp.tanh(raw), log.sum(-1)


def critic_loss(params: Any, state: Any, batch: Transitions, rival: Any, log: Array, key: Array) -> tuple[Array, Any]:
    action, density = act(rival, batch["next"], key)
    later, _ = value_of(state["ema"], {}, batch["next"], action)
    goal = batch["reward"] + DISCOUNT * (later.min(0) - jnp.exp(log) * density)
    values, _ = value_of(params, {}, batch["seen"], batch["action"])
    return ((values - goal) ** 2).mean(), state


def actor_loss(params: Any, state: Any, batch: Transitions, judge: Any, log: Array, key: Array) -> tuple[Any, Any]:
    action, density = act(params, batch["seen"], key)
    values, _ = value_of(judge, {}, batch["seen"], action)
    return ((jnp.exp(log) * density - values.min(0)).mean(), density.mean()), state


def temperature_loss(params: Any, state: Any, density: Array) -> tuple[Array, Any]:
    return -params["log"] * (density + ENTROPY), state


update_critic = fs.with_ema(fs.with_optimizer(critic_loss, tx), decay=0.98)
update_actor = fs.with_optimizer(actor_loss, tx, has_aux=True)
update_temperature = fs.with_optimizer(temperature_loss, tx)


def step(learners: Learners, batch: Transitions, key: Array) -> tuple[Learners, dict[str, Array]]:
    """One update of each."""
    critic, actor, temperature = learners
    keys = jax.random.split(jax.random.fold_in(key, critic.step))
    log = temperature.params["log"]
    critic, error = update_critic(critic, batch, actor.params, log, keys[0])
    actor, (_, density) = update_actor(actor, batch, critic.params, log, keys[1])
    temperature, _ = update_temperature(temperature, density)
    return Learners(critic, actor, temperature), {"error": error, "entropy": -density}


def moved(seen: Array, action: Array) -> tuple[Array, Array]:
    """A mass on a line, pushed: where it is next, and the reward, which is highest at rest in the middle."""
    place, speed = seen[:, :1], seen[:, 1:]
    speed = 0.8 * speed + 0.3 * action
    place = jnp.clip(place + 0.5 * speed, -2.0, 2.0)
    return jnp.concatenate([place, speed], -1), -(place**2 + 0.1 * speed**2)[:, 0]


@jax.jit
def mean_reward(params: Any, key: Array) -> Array:
    """What the policy gains per step, from random places on."""

    def one(seen: Array, key: Array) -> tuple[Array, Array]:
        return moved(seen, act(params, seen, key)[0])

    start = jax.random.uniform(key, (256, 2), minval=-1.0)
    return jax.lax.scan(one, start, jax.random.split(key, HORIZON))[1].mean()


def replay(key: Array) -> Transitions:
    """A batch for each step: random actions at random places."""
    seen = jax.random.uniform(key, (STEPS * BATCH, 2), minval=-1.5, maxval=1.5)
    action = jax.random.uniform(jax.random.fold_in(key, 1), (STEPS * BATCH, 1), minval=-1.0)
    then, reward = moved(seen, action)
    batches = {"seen": seen, "action": action, "next": then, "reward": reward}
    return {name: leaf.reshape(STEPS, BATCH, *leaf.shape[1:]) for name, leaf in batches.items()}


def main() -> None:
    key, seen, action = jax.random.key(0), jnp.ones((1, 2)), jnp.ones((1, 1))
    judge, _ = fs.split_params(critic.init(key, seen, action))
    player, _ = fs.split_params(actor.init(key, seen))
    learners = Learners(
        fs.init_carry(judge, {"ema": judge}, tx),  # the target begins as the critic
        fs.init_carry(player, {}, tx),
        fs.init_carry({"log": jnp.float32(0.0)}, {}, tx),
    )
    train = fs.jit_step(fs.assert_max_traces(fs.scan_steps(step)))
    before = float(mean_reward(learners.actor.params, key))
    batches = replay(key)
    entropy = 0.0
    with fs.compile_log() as log:
        for start in range(0, STEPS, 100):
            part = {name: leaf[start : start + 100] for name, leaf in batches.items()}
            learners, outs = train(learners, part, key)
            entropy = float(outs["entropy"][-1])
    assert log.compiles["step"] == 1
    after, heat = float(mean_reward(learners.actor.params, key)), float(jnp.exp(learners.temperature.params["log"]))
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, learners.critic.params, learners.critic.state["ema"]))
    assert [int(each.step) for each in learners] == [STEPS] * 3
    assert after > before / 10  # both are negative
    assert heat < 0.5
    assert 0 < float(apart) < 0.2 * float(optax.tree.norm(learners.critic.params))  # the target follows, behind
    print(f"reward {before:.3f} -> {after:.3f} per step; temperature 1 -> {heat:.3f}, entropy {entropy:.2f}")


if __name__ == "__main__":
    main()
