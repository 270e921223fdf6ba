"""A policy and its rollouts.

Reinforcement learning in one dispatch: a policy acts in an environment that `jax.lax.scan` steps, then learns from
the returns. An iteration is a step like any other, `(carry, key) -> (carry, metrics)`, so `scan_steps` runs many of
them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

ACTIONS, HORIZON, ENVIRONMENTS = 2, 20, 64


class Environment(NamedTuple):
    position: Array
    velocity: Array


class Trajectory(NamedTuple):
    observation: Array
    action: Array
    reward: Array


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, observation: Array) -> tuple[Array, Array]:
        h = nn.tanh(nn.Dense(8)(observation))
        return nn.Dense(ACTIONS)(h), nn.Dense(1)(h).squeeze(-1)


model = ActorCritic()
policy = fs.with_mutable(model)
tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))


def advance(environment: Environment, action: Array) -> tuple[Environment, Array]:
    velocity = environment.velocity + 0.1 * (2.0 * action - 1.0)
    position = environment.position + velocity
    return Environment(position, velocity), -jnp.abs(position)


def rollout(act: Callable[[Array], Array], start: Environment, keys: Array) -> tuple[Environment, Trajectory]:
    def body(environment: Environment, key: Array) -> tuple[Environment, Trajectory]:
        observation = jnp.stack(environment, axis=-1)
        action = jax.random.categorical(key, act(observation))
        environment, reward = advance(environment, action)
        return environment, Trajectory(observation, action, reward)

    return jax.lax.scan(body, start, keys)


def returns(reward: Array, discount: float = 0.9) -> Array:
    def body(later: Array, now: Array) -> tuple[Array, Array]:
        total = now + discount * later
        return total, total

    return jax.lax.scan(body, jnp.zeros_like(reward[0]), reward, reverse=True)[1]


def loss_fn(
    params: dict[str, Any], state: dict[str, Any], trajectory: Trajectory
) -> tuple[tuple[Array, dict[str, Array]], dict[str, Any]]:
    (logits, value), state = policy(params, state, trajectory.observation)
    target = returns(trajectory.reward)
    chosen = -optax.softmax_cross_entropy_with_integer_labels(logits, trajectory.action)
    actor = -(chosen * jax.lax.stop_gradient(target - value)).mean()
    critic = optax.huber_loss(value, target).mean()
    return (actor + 0.5 * critic, {"return": target[0].mean(), "critic": critic}), state


update = fs.with_optimizer(loss_fn, tx, has_aux=True)


def iteration(carry: fs.Carry, key: Array) -> tuple[fs.Carry, dict[str, Array]]:
    def act(observation: Array) -> Array:
        (logits, _), _ = policy(carry.params, carry.state, observation)
        return logits

    begin, moves = jax.random.split(key)
    start = Environment(jax.random.normal(begin, (ENVIRONMENTS,)), jnp.zeros(ENVIRONMENTS))
    _, trajectory = rollout(act, start, jax.random.split(moves, HORIZON))
    carry, (loss, metrics) = update(carry, trajectory)
    return carry, metrics | {"loss": loss}


def main() -> None:
    key = jax.random.key(0)
    params, state = fs.split_params(model.init(key, jnp.zeros((1, 2))))
    carry = fs.init_carry(params, state, tx)
    carry, metrics = fs.jit_step(fs.scan_steps(iteration))(carry, jax.random.split(key, 200))
    first, last = metrics["return"][0], metrics["return"][-10:].mean()
    assert last > first / 2  # returns are negative: the distance from the middle, summed
    print(f"return {first:.2f} -> {last:.2f} after {int(carry.step)} iterations in one dispatch")


if __name__ == "__main__":
    main()
