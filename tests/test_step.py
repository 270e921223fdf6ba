"""`with_optimizer` beside its laws: several devices, optax's extra arguments, what a failing or donated step leaves."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from .flags import needs_donation
from .meshes import KINDS, line
from .models import MLP, Dropping, X, Y


def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """Linear regression, counting the batches."""
    x, y = batch
    return ((x @ params["w"] - y) ** 2).mean(), {"seen": state["seen"] + 1}


def start(tx: optax.GradientTransformation, sharding: Any = None) -> fs.Carry:
    """A carry of one matrix and one counter."""
    return fs.init_carry({"w": jax.device_put(jnp.full((10, 1), 0.1), sharding)}, {"seen": jnp.int32(0)}, tx)


def assert_close(left: Any, right: Any) -> None:
    """Compares two trees to rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)


@KINDS
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_axis_name_averages_under_shard_map(check_vma: bool, microbatches: int, kind: AxisType) -> None:
    mesh = line(kind)
    tx = optax.sgd(0.1, momentum=0.9)  # not Adam: it would not see gradients that are eight times too large
    step = fs.with_optimizer(loss_fn, tx, axis_name="data", microbatches=microbatches)
    sharded = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()), check_vma=check_vma)
    )
    ours, plain = start(tx, NamedSharding(mesh, P())), start(tx)
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    for _ in range(3):
        ours, loss = sharded(ours, batch)
        plain, expected = fs.with_optimizer(loss_fn, tx)(plain, (X, Y))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_close(ours.params, plain.params)
    assert_close(ours.opt_state, plain.opt_state)
    assert int(ours.state["seen"]) == 3 * microbatches


def test_axis_name_averages_under_vmap() -> None:
    tx = optax.sgd(0.1)
    step = fs.with_optimizer(loss_fn, tx, axis_name="data")
    batch = jax.tree.map(lambda leaf: leaf.reshape(8, 4, -1), (X, Y))
    carry, losses = jax.vmap(step, in_axes=(None, 0), axis_name="data")(start(tx), batch)
    expected, loss = fs.with_optimizer(loss_fn, tx)(start(tx), (X, Y))
    np.testing.assert_allclose(losses, jnp.full(8, loss), rtol=1e-5)
    for i in range(8):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], carry.params), expected.params)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pmap is on its way out; it has to work while it is there
def test_axis_name_averages_under_pmap() -> None:
    tx = optax.sgd(0.1)
    step = fs.with_optimizer(loss_fn, tx, axis_name="data")
    batch = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(8, 4, -1), (X, Y))
    carry = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (8, *leaf.shape)), jax.device_get(start(tx)))
    carry, _ = jax.pmap(step, axis_name="data")(carry, batch)
    expected, _ = fs.with_optimizer(loss_fn, tx)(start(tx), (X, Y))
    for i in range(8):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], jax.device_get(carry.params)), expected.params)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("tx", [optax.lbfgs(), optax.contrib.reduce_on_plateau(patience=1)], ids=["lbfgs", "plateau"])
def test_extra_arguments_reach_the_optimizer(tx: Any, microbatches: int) -> None:
    tx = optax.chain(optax.sgd(0.05), tx) if "plateau" in str(tx.update) else tx
    step = fs.jit_step(fs.with_optimizer(loss_fn, tx, microbatches=microbatches))
    carry, losses = start(tx), []
    for _ in range(5):
        carry, loss = step(carry, (X, Y))
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_value_fn_is_the_loss_on_the_same_batch_and_state() -> None:
    seen: dict[str, Any] = {}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        seen.update(value=extra["value"], again=extra["value_fn"](params))
        seen["same"] = jax.tree.all(jax.tree.map(operator.is_, extra["grad"], updates))
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    fs.with_optimizer(loss_fn, tx)(start(tx), (X, Y))
    np.testing.assert_array_equal(seen["value"], seen["again"])
    assert seen["same"]


def test_aux_comes_out_and_is_stacked_over_microbatches() -> None:
    def with_aux(params: Any, state: Any, batch: Any) -> tuple[tuple[jax.Array, Any], Any]:
        loss, state = loss_fn(params, state, batch)
        return (loss, {"n": jnp.int32(len(batch[0]))}), state

    tx = optax.sgd(0.1)
    _, (loss, aux) = fs.with_optimizer(with_aux, tx, has_aux=True)(start(tx), (X, Y))
    assert (loss.shape, int(aux["n"])) == ((), 32)
    _, (loss, aux) = fs.with_optimizer(with_aux, tx, has_aux=True, microbatches=4)(start(tx), (X, Y))
    assert loss.shape == ()
    np.testing.assert_array_equal(aux["n"], [8, 8, 8, 8])


def test_each_microbatch_draws_its_own_keys() -> None:
    apply = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(Dropping())))

    def loss_with_masks(params: Any, state: Any, x: jax.Array) -> tuple[tuple[jax.Array, Any], Any]:
        out, state = apply(params, state, x, train=True)
        return ((out**2).mean(), out), state

    tx, same = optax.sgd(0.1), jnp.repeat(X[:4], 2, axis=0)  # equal microbatches: what differs, differs by its masks
    params, state = fs.split_params(Dropping().init(jax.random.key(0), X[0], train=False))
    state |= fs.rng_state(dropout=jax.random.key(1))
    carry = fs.init_carry(params, state, tx)
    new, (_, outs) = fs.with_optimizer(loss_with_masks, tx, has_aux=True, microbatches=2)(carry, same)
    assert (outs[0] != outs[1]).any()
    (_, first), state = loss_with_masks(params, state, same[0::2])
    (_, second), state = loss_with_masks(params, state, same[1::2])
    assert_close((outs[0], outs[1]), (first, second))
    assert_close(new.state["batch_stats"], state["batch_stats"])
    assert new.state["rngs"]["dropout"] == state["rngs"]["dropout"]


def test_bf16_gradients_are_accumulated_in_f32() -> None:
    def small(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return (params["w"] * x).mean(), state

    tx = optax.sgd(1.0)
    x = jnp.concatenate([jnp.full((1,), 1.0), jnp.full((255,), 2.0**-9)]).astype(jnp.bfloat16)
    carry = fs.init_carry({"w": jnp.zeros((), jnp.bfloat16)}, {}, tx)
    new, _ = fs.with_optimizer(small, tx, microbatches=256)(carry, x)
    assert new.params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(new.params["w"]), -float(x.astype(jnp.float32).mean()), rtol=1e-2)


@needs_donation
def test_a_donated_step_deletes_nothing_of_the_callers() -> None:
    model = MLP()
    variables = model.init(jax.random.key(0), X[0])
    params, state = fs.split_params(variables)
    apply = fs.vmap_stateful(fs.with_mutable(model))
    before = jax.device_get((variables, params, state))

    def mlp_loss(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        pred, state = apply(params, state, batch[0], train=True)
        return optax.l2_loss(pred, batch[1]).mean(), state

    tx = optax.adam(0.1)
    carry = fs.init_carry(params, state | {"ema": params}, tx)
    step = fs.jit_step(fs.with_ema(fs.with_optimizer(mlp_loss, tx), decay=0.9))
    given = carry
    carry, _ = step(carry, (X, Y))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((variables, params, state)), before)
    out, _ = apply(carry.state["ema"], carry.state, X, train=True)  # evaluation with averaged weights: one line
    assert out.shape == Y.shape


@needs_donation
def test_a_carry_that_was_consumed_says_so_in_jaxs_words() -> None:
    # jit_step returns jax.jit's own object: nothing of ours runs at a dispatch, so the words are JAX's
    tx = optax.sgd(0.1)
    step, carry = fs.jit_step(fs.with_optimizer(loss_fn, tx)), start(tx)
    step(carry, (X, Y))
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        step(carry, (X, Y))


def test_jit_step_takes_a_train_state() -> None:
    from flax.training.train_state import TrainState

    train_state = TrainState.create(apply_fn=print, params={"w": jnp.ones(3)}, tx=optax.sgd(0.1))

    def step(train_state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        grads = jax.grad(lambda params: (params["w"] * batch).sum())(train_state.params)
        return train_state.apply_gradients(grads=grads), ()

    new, _ = fs.jit_step(step)(train_state, jnp.ones(3))
    assert int(new.step) == 1


class Out(NamedTuple):
    """What a step may return: the carry first."""

    carry: Any
    loss: Any
    metrics: Any


@KINDS
@pytest.mark.parametrize(
    "form",
    [lambda c, b: c, lambda c, b: (c, b), lambda c, b: (c, b, {"n": b}), lambda c, b: Out(c, b, {"n": b})],
    ids=["alone", "a pair", "three", "a named tuple"],
)
def test_jit_step_pins_the_carry_of_any_return_form(form: Any, kind: Any) -> None:
    mesh = line(kind)
    carry: Any = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("data"))), "n": 0}

    def step(carry: Any, batch: Any, scale: Any, *, offset: Any) -> Any:
        new = {"w": carry["w"] + scale * batch.sum() + offset, "n": carry["n"] + 1}
        return form(new, batch)

    jitted: Any = fs.jit_step(fs.assert_max_traces(step), like=carry, donate=False)
    with fs.compile_log() as log:
        result = jitted(carry, jnp.ones(4), 2.0, offset=1.0)
        new = result if form(carry, 0) is carry else result[0]
        again = jitted({**new, "n": 1}, jnp.ones(4), 2.0, offset=1.0)
    assert new["w"].sharding.is_equivalent_to(carry["w"].sharding, 2)
    assert type(result) is type(form(new, 0))
    assert log.compiles["step"] == 1
    np.testing.assert_array_equal((again if form(carry, 0) is carry else again[0])["w"], jnp.full((8, 2), 19.0))


def test_jit_step_names_what_is_no_carry_like_the_one_named() -> None:
    carry = fs.init_carry({"w": jnp.ones(3)}, {}, optax.sgd(0.1))
    step: Any = fs.jit_step(lambda carry, batch: (batch, carry), like=carry)
    with pytest.raises(fs.SignatureError) as caught:
        step(carry, jnp.ones(3))
    assert str(caught.value) == (
        "jit_step(like=...): the step must return a carry of the structure of like, alone or first in a tuple "
        "(like -> returned)\n"
        "  got:\n"
        "    carry: Carry -> f32[3]\n"
        "  likely cause: like is the carry of another step, or the step returns something else first\n"
        "  fix: jit_step(step, like=carry), where the step returns (carry, out)"
    )


def test_ema_takes_a_schedule() -> None:
    tx, params = optax.sgd(1.0), {"w": jnp.ones(2)}
    step = fs.with_ema(
        fs.with_optimizer(lambda p, s, b: ((p["w"] * b).sum(), s), tx),
        decay=lambda count: jnp.where(count == 0, 0.0, 1.0),
    )
    carry = fs.init_carry(params, {"ema": params}, tx)
    carry, _ = step(carry, jnp.ones(2))
    np.testing.assert_array_equal(carry.state["ema"]["w"], carry.params["w"])
    after, _ = step(carry, jnp.ones(2))
    np.testing.assert_array_equal(after.state["ema"]["w"], carry.params["w"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_python_number_is_adopted_in_the_leafs_precision(dtype: Any) -> None:
    adopted = fs.adopt_carry({"rate": 0.5}, {"rate": jnp.ones((), dtype)})
    assert (adopted["rate"].dtype, float(adopted["rate"])) == (dtype, 0.5)
    with pytest.raises(fs.CollectionError):
        fs.adopt_carry({"n": 0.5}, {"n": jnp.int32(1)})
