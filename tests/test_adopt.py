"""`adopt_carry`: what a checkpoint made of a carry, and a carry of another split of the same training."""

import io
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import flaxsplit as fs

from .flags import needs_x32
from .models import X, Y, structure

TX = optax.adam(1e-2)


class Net(nn.Module):
    """A body with BatchNorm, and a head."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Maps `[batch, 10]` to `[batch, 1]`."""
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5, use_bias=False, name="body")(x))
        return nn.Dense(1, name="head")(jnp.tanh(x))


def loss_fn(params: Any, state: Any, batch: Any) -> Any:
    """The loss of `Net`."""
    apply: Any = fs.with_mutable(Net())
    out, state = apply(params, state, batch[0])
    return optax.l2_loss(out, batch[1]).mean(), state


def assert_equal(left: Any, right: Any) -> None:
    """Compares two trees bit for bit."""
    assert structure(left) == structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_unfreezing_in_mid_training_keeps_moments_count_and_average() -> None:
    """Head first, then all: equal to all from the start with the body's gradient masked, whose moments stay zero."""
    variables = Net().init(jax.random.key(1), X)
    step = fs.with_optimizer(loss_fn, TX)
    params, state = fs.split_params(variables, trainable="head/*")
    carry = fs.init_carry(params, state | {"ema": params}, TX)
    averaging = fs.jit_step(fs.with_ema(step, decay=0.9), donate=False)
    for _ in range(3):
        carry, _ = averaging(carry, (X, Y))
    params, state = fs.split_params(fs.merge_state(carry.params, carry.state))
    wider = fs.adopt_carry(carry, fs.init_carry(params, state | {"ema": params}, TX), strict=False)
    assert int(wider.step) == 3
    assert int(wider.opt_state[0].count) == 3
    assert_equal(wider.opt_state[0].mu["head"], carry.opt_state[0].mu["head"])
    assert_equal(wider.state["ema"]["head"], carry.state["ema"]["head"])
    assert_equal(wider.state["ema"]["body"], params["body"])
    for _ in range(3):
        wider, _ = averaging(wider, (X, Y))

    def masked(grads: Any, on: bool) -> Any:
        return (
            grads
            if on
            else {name: tree if name == "head" else jax.tree.map(jnp.zeros_like, tree) for name, tree in grads.items()}
        )

    @jax.jit
    def hand(params: Any, state: Any, opt_state: Any, on: Any) -> Any:
        (_, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, (X, Y))
        kept = jax.tree.map(lambda all_, head: jnp.where(on, all_, head), grads, masked(grads, False))
        updates, opt_state = TX.update(kept, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state

    params, state = fs.split_params(variables)
    opt_state = TX.init(params)
    for i in range(6):
        params, state, opt_state = hand(params, state, opt_state, i >= 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), wider.params, params)


def test_freezing_again_leaves_out_what_is_frozen() -> None:
    params, state = fs.split_params(Net().init(jax.random.key(1), X))
    carry, _ = fs.with_optimizer(loss_fn, TX)(fs.init_carry(params, state, TX), (X, Y))
    head, rest = fs.split_params(fs.merge_state(carry.params, carry.state), trainable="head/*")
    narrow = fs.adopt_carry(carry, fs.init_carry(head, rest, TX), strict=False)
    assert narrow.opt_state[0].mu.keys() == {"head"}
    assert_equal(narrow.opt_state[0].mu["head"], carry.opt_state[0].mu["head"])
    assert_equal(narrow.state["params"]["body"], carry.params["body"])


@needs_x32
def test_not_strict_is_no_licence_for_another_shape() -> None:
    carry = fs.init_carry({"w": jnp.ones(3)}, {}, TX)
    with pytest.raises(fs.CollectionError) as caught:
        fs.adopt_carry({"params": {"w": np.ones(4, np.float32)}}, carry, strict=False)
    assert caught.value.leaves == ("carry.params['w']: f32[3] -> f32[4]",)
    with pytest.raises(fs.CollectionError, match="absent"):
        fs.adopt_carry({"params": {"w": np.ones(3, np.float32)}}, carry)


def test_a_method_of_a_tuple_is_no_leaf() -> None:
    like = fs.init_carry({"w": jnp.ones(3)}, {}, optax.sgd(optax.linear_schedule(0.1, 0.0, 10)))
    saved = fs.init_carry({"w": jnp.ones(3)}, {}, optax.sgd(0.1))
    with pytest.raises(fs.CollectionError) as caught:
        fs.adopt_carry(saved, like)
    assert caught.value.leaves == ("carry.opt_state[1].count: i32[] -> absent",)


class Pair(NamedTuple):
    """With a field of a name that a tuple has."""

    count: Any
    index: Any


@pytest.mark.parametrize("names", [int, str])
def test_numbers_for_names_and_names_for_numbers(names: Any) -> None:
    like = {
        "layers": {0: jnp.zeros(2), 1: jnp.zeros(3)},
        "named": {"0": jnp.zeros(2)},
        "pair": Pair(jnp.zeros(()), jnp.zeros(1)),
    }
    saved = {
        "layers": {names(0): np.ones(2, np.float32), names(1): np.ones(3, np.float32)},
        "named": {names(0): np.ones(2, np.float32)},
        "pair": {"count": np.float32(1), "index": np.ones(1, np.float32)},
    }
    assert_equal(fs.adopt_carry(saved, like), jax.tree.map(jnp.ones_like, like))


def test_a_dataclass_and_a_bf16_array_out_of_a_npz() -> None:
    @struct.dataclass
    class Scale:
        value: Any

    like = {"scale": Scale(jnp.zeros(2, jnp.bfloat16))}
    file = io.BytesIO()
    np.savez(file, value=np.asarray(jnp.full(2, 1.5, jnp.bfloat16)))
    file.seek(0)
    raw = np.load(file)["value"]
    assert raw.dtype.kind == "V"
    for saved in ({"scale": {"value": raw}}, {"scale": Scale(raw)}):
        adopted = fs.adopt_carry(saved, like)
        np.testing.assert_array_equal(adopted["scale"].value, jnp.full(2, 1.5, jnp.bfloat16))
