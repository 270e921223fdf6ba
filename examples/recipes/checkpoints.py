"""Checkpoints without a recompile.

A carry is a pytree of arrays, so Orbax saves it whole: step count, params, batch statistics, keys, optimizer state.
A restored checkpoint has other containers, and arrays in other places. `adopt_carry` compares every leaf with a carry
of the step, by name, and converts it. Training continues bit for bit, with the step that is already compiled.
"""

import pathlib
import tempfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax import Array

import flaxsplit as fs


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(32)(x)))
        return nn.Dense(1)(nn.Dropout(0.1, deterministic=False)(x))[:, 0]


model, tx = Net(), optax.adam(1e-2)
apply = fs.with_rngs(fs.with_mutable(model))
Batch = tuple[Array, Array]


def loss_fn(params: Any, state: Any, batch: Batch) -> tuple[Array, Any]:
    x, y = batch
    pred, state = apply(params, state, x)
    return optax.l2_loss(pred, y).mean(), state


def begin(seed: int, batch: Batch) -> fs.Carry:
    key, dropout = jax.random.split(jax.random.key(seed))
    params, state = fs.split_params(model.init({"params": key, "dropout": dropout}, batch[0]))
    return fs.init_carry(params, state | fs.rng_state(dropout=dropout), tx)


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (64, 8))
    batch = x, jnp.sin(x).sum(-1)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        carry, losses = begin(1, batch), list[float]()
        for i in range(40):
            if i % 10 == 0:  # saving reads the carry before the next step takes its buffers
                checkpointer.save(pathlib.Path(folder) / f"{i}", carry)
                checkpointer.wait_until_finished()
            carry, loss = step(carry, batch)
            losses.append(float(loss))

        # Another process would start like this: a fresh carry of the same form, and the newest checkpoint into it.
        fresh = begin(2, batch)
        newest = max(pathlib.Path(folder).iterdir(), key=lambda path: int(path.name))
        carry = fs.adopt_carry(checkpointer.restore(newest), fresh)
    again = []
    for _ in range(int(carry.step), 40):
        carry, loss = step(carry, batch)
        again.append(float(loss))
    assert len(again) == 10
    assert again == losses[30:]
    print(f"restored at step {newest.name}, then {len(again)} losses the same bit for bit, one trace in all")


if __name__ == "__main__":
    main()
