"""Model-agnostic meta-learning.

The params are trained so that one gradient step on ten points of a new sine fits that sine. This inner step is
`value_and_grad` inside the loss. It is a pure function, so the outer gradient goes through it, second derivatives
included. `vmap_stateful` runs one task per lane.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import flaxsplit as fs

RATE, SHOTS, TASKS, STEPS = 0.05, 10, 16, 500
Points = tuple[Array, Array]
Task = tuple[Points, Points]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(2):
            x = nn.tanh(nn.Dense(40)(x))
        return nn.Dense(1)(x)


model, tx = Net(), optax.adam(5e-3)
apply = fs.with_mutable(model)


def error(params: Any, state: Any, points: Points) -> tuple[Array, Any]:
    x, y = points
    pred, state = apply(params, state, x)
    return ((pred - y) ** 2).mean(), state


inner = fs.value_and_grad(error)


def adapted(params: Any, state: Any, points: Points) -> tuple[Any, Any]:
    """Params after one step on the points of one task."""
    (_, grads), state = inner(params, state, points)
    return jax.tree.map(lambda param, grad: param - RATE * grad, params, grads), state


def task_loss(params: Any, state: Any, task: Task) -> tuple[Array, Any]:
    shown, asked = task
    params, state = adapted(params, state, shown)
    return error(params, state, asked)


def first_order_loss(params: Any, state: Any, task: Task) -> tuple[Array, Any]:
    """The same number, but the inner gradient counts as a constant."""
    shown, asked = task
    (_, grads), state = inner(params, state, shown)
    grads = jax.lax.stop_gradient(grads)
    return error(jax.tree.map(lambda param, grad: param - RATE * grad, params, grads), state, asked)


def joint_loss(params: Any, state: Any, task: Task) -> tuple[Array, Any]:
    """What is compared with: the same points, learned without an inner step."""
    return error(params, state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *task))


def mean_over_tasks(loss_fn: fs.LossFn[Task, Array]) -> fs.LossFn[Task, Array]:
    over_tasks = fs.vmap_stateful(loss_fn)

    def meta_loss(params: Any, state: Any, tasks: Task) -> tuple[Array, Any]:
        losses, state = over_tasks(params, state, tasks)
        return losses.mean(), state

    return meta_loss


def sines(key: Array) -> Task:
    """Points of sines of random height and phase: some are shown, others are asked for."""
    height = jax.random.uniform(jax.random.fold_in(key, 0), (TASKS, 1, 1), minval=0.5, maxval=2.0)
    phase = jax.random.uniform(jax.random.fold_in(key, 1), (TASKS, 1, 1), maxval=jnp.pi)
    x = jax.random.uniform(jax.random.fold_in(key, 2), (TASKS, 2 * SHOTS, 1), minval=-3.0, maxval=3.0)
    y = height * jnp.sin(x + phase)
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])


def main() -> None:
    params, state = fs.split_params(model.init(jax.random.key(0), jnp.ones((1, 1))))
    tasks = jax.vmap(sines)(jax.random.split(jax.random.key(1), STEPS))
    new = sines(jax.random.key(2))  # tasks that no training has seen
    error_after_one_step = jax.jit(mean_over_tasks(task_loss))
    found = {}
    for name, loss_fn in {"meta-learned": task_loss, "learned jointly": joint_loss}.items():
        carry = fs.init_carry(params, state, tx)
        train = fs.jit_step(fs.assert_max_traces(fs.scan_steps(fs.with_optimizer(mean_over_tasks(loss_fn), tx))))
        with fs.compile_log() as log:
            carry, _ = train(carry, tasks)
        assert log.compiles["meta_loss"] == 1
        found[name] = float(error_after_one_step(carry.params, carry.state, new)[0])
    assert found["meta-learned"] < found["learned jointly"] / 2

    (_, second), _ = jax.jit(fs.value_and_grad(mean_over_tasks(task_loss)))(params, state, new)
    (_, first), _ = jax.jit(fs.value_and_grad(mean_over_tasks(first_order_loss)))(params, state, new)
    apart = float(optax.tree.norm(jax.tree.map(jnp.subtract, second, first)) / optax.tree.norm(second))
    assert apart > 0.05  # the second derivatives are there
    words = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    print(f"error on new sines after one step: {words}; second derivatives change the first gradient by {apart:.0%}")


if __name__ == "__main__":
    main()
