"""`state['extra']`: the caller's own tree, which no model sees and every combinator carries."""

import warnings
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale

import flaxsplit as fs

from .flags import needs_jit, needs_x32
from .models import X, structure

TX = optax.sgd(0.1)


class Best(NamedTuple):
    """The tree of somebody else."""

    loss: Any
    steps: Any


EXTRAS: dict[str, Any] = {
    "a number": jnp.float32(3.0),
    "a tuple": (jnp.zeros(3), jnp.ones(())),
    "a named tuple": Best(jnp.float32(3.0), jnp.int32(0)),
    "int keys": {0: jnp.zeros(3), 1: {"deep": jnp.ones(2)}},
    "an object of flax": DynamicScale(),
    "params of another network": {"Dense_0": {"kernel": jnp.ones((2, 2))}},
    "nothing": {},
}


class Net(nn.Module):
    """Dense and BatchNorm."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Maps `[batch, 10]` to `[batch, 1]`."""
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))


def owned(extra: Any) -> Any:
    """What a carry makes of it: arrays of JAX."""
    return jax.tree.map(jnp.asarray, extra)


def assert_equal(left: Any, right: Any) -> None:
    """Compares two trees bit for bit."""
    assert structure(left) == structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_the_model_computes_the_same_and_the_tree_stays(extra: Any) -> None:
    params, state = fs.split_params(Net().init(jax.random.key(0), X))
    apply = fs.with_mutable(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, new_state = apply(params, {**state, "extra": extra}, X)
    expected, expected_state = apply(params, state, X)
    assert_equal((out, new_state), (expected, {**expected_state, "extra": extra}))


@needs_jit
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_every_combinator_carries_it(extra: Any) -> None:
    """Keys, lanes, microbatches, an average, a scan, a checkpoint: all beside it, and it comes back as it was."""
    model = nn.BatchNorm(False, axis_name="batch")
    params, state = fs.split_params(model.init(jax.random.key(0), X))
    lanes: Any = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(model), axis_name="batch"))

    def loss(params: Any, state: Any, batch: Any) -> Any:
        out, state = lanes(params, state, batch)
        return (out**2).mean(), state

    state = {**state, **fs.rng_state(dropout=jax.random.key(1)), "ema": params, "extra": extra}
    step = fs.with_ema(fs.with_optimizer(loss, TX, microbatches=2), decay=0.9)
    carry = fs.init_carry(params, state, TX)
    many = fs.jit_step(fs.assert_max_traces(fs.scan_steps(step)), donate=False)
    for _ in range(2):
        new_carry, _ = many(carry, jnp.stack([X, X]))
        assert_equal(new_carry.state["extra"], owned(extra))
        carry = fs.adopt_carry(jax.device_get(new_carry), new_carry)
    assert int(carry.step) == 4


def test_a_loss_counts_in_it() -> None:
    model = nn.Dense(1)
    params, state = fs.split_params(model.init(jax.random.key(0), X))
    apply = fs.with_mutable(model)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        out, state = apply(params, state, batch)
        count = state["extra"]["n"]
        return (out**2).mean() * jnp.minimum(1.0, count / 100), {**state, "extra": {"n": count + 1}}

    carry = fs.init_carry(params, state | {"extra": {"n": 0}}, TX)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, TX)))
    for _ in range(3):
        carry, _ = step(carry, X)
    assert int(carry.state["extra"]["n"]) == 3


@needs_x32
def test_the_same_under_another_name_is_told_where_it_belongs() -> None:
    apply = fs.with_mutable(nn.Dense(1))
    params, state = fs.split_params(nn.Dense(1).init(jax.random.key(0), X))
    _, new_state = apply(params, state | {"counters": {"n": jnp.int32(0)}}, X)  # no layer reads it: no warning
    assert new_state["counters"]["n"] == 0
    with pytest.raises(fs.CollectionError) as error:
        apply(params, state | {"best": jnp.float32(0)}, X)
    assert error.value.fix == "state | {'extra': ...}, any tree, which no model sees"
    apply(params, state | {"extra": {"best": jnp.float32(0)}}, X)
    with pytest.raises(fs.CollectionError) as error:
        fs.with_mutable(nn.Dense(1), mutable="extra")(params, state | {"extra": jnp.float32(0)}, X)
    assert error.value.cause == "'extra' in the state belongs to the caller, and no model sees it"


def test_an_nnx_module_does_not_see_it() -> None:
    module = nnx.BatchNorm(10, rngs=nnx.Rngs(0))
    fn, params, state = fs.from_nnx(module)
    out, new_state = fn(params, state, X)
    same, with_extra = fn(params, {**state, "extra": Best(1, 2)}, X)
    assert_equal((same, with_extra), (out, {**new_state, "extra": Best(1, 2)}))
    fs.to_nnx(module, params, with_extra)
    assert_equal(fs.from_nnx(module)[2], new_state)
