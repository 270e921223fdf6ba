"""A step that your CI checks.

A test compiles the step of a training program on abstract arguments and asserts that there are no findings. It runs
nothing, so it needs neither data nor an accelerator. The first version of the step has three faults, and the report
names each; the second has none.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import Array

import flaxsplit as fs


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        out: Array = nn.Dense(1)(x)[:, 0]
        return out


class TrainState(train_state.TrainState):
    batch_stats: Any
    key: Any


model, tx = Net(), optax.adam(1e-3)


def new_state() -> Any:
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8)), train=False)
    create: Any = TrainState.create
    held = {"params": variables["params"], "batch_stats": variables["batch_stats"], "key": jax.random.key(1)}
    return create(apply_fn=model.apply, tx=tx, **held)


def step(state: Any, batch: tuple[Array, Array], mended: bool) -> Any:
    x, y = batch
    key = jax.random.fold_in(state.key, state.step) if mended else state.key

    def loss_fn(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        pred, updates = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return optax.l2_loss(pred, y).mean(), updates["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads)
    return state.replace(batch_stats=stats) if mended else state, loss


def first_step(state: Any, batch: tuple[Array, Array]) -> Any:
    return step(state, batch, mended=False)


def mended_step(state: Any, batch: tuple[Array, Array]) -> Any:
    return step(state, batch, mended=True)


def main() -> None:
    state = jax.eval_shape(new_state)
    batch = jax.ShapeDtypeStruct((32, 8), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.float32)

    report = fs.explain_step(jax.jit(first_step), state, batch)
    assert {finding.kind for finding in report.findings} == {"state dropped", "key unchanged", "not donated"}
    for finding in report.findings:
        print(f"{finding.where}: {finding.kind}")

    mended = fs.explain_step(jax.jit(mended_step, donate_argnums=0), state, batch)
    assert not mended.findings, mended
    print(f"mended: {len(mended.findings)} findings, {mended.memory['alias']} bytes in place")


if __name__ == "__main__":
    main()
