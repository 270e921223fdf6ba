"""`adopt_carry`: what a checkpoint made of a carry, and a carry of another split of the same training."""

import io
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from flax.serialization import msgpack_restore, to_bytes, to_state_dict
from flax.training import train_state

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


class TrainState(train_state.TrainState):
    """As people write it, with their statistics beside the params."""

    batch_stats: Any


def trained(tx: Any = TX, count: int = 3) -> fs.Carry:
    """A carry of `Net`, some steps on."""
    step = fs.jit_step(fs.with_optimizer(loss_fn, tx))
    carry = fs.init_carry(*fs.split_params(Net().init(jax.random.key(1), X)), tx)
    for _ in range(count):
        carry, _ = step(carry, (X, Y))
    return carry


def fresh(tx: Any = TX, trainable: Any = None) -> fs.Carry:
    """One of other numbers, before any step."""
    return fs.init_carry(*fs.split_params(Net().init(jax.random.key(7), X), trainable=trainable), tx)


def mended(error: fs.CollectionError, **names: Any) -> fs.Carry:
    """The carry that the printed fix gives, typed as it is printed. What is only for some stands after a comma."""
    everything: dict[str, Any] = {**vars(fs), "from_nnx": fs.from_nnx, "optax": optax, "nnx": nnx, **names}
    for statement in error.fix.split("; "):
        exec(statement.removeprefix("to go on where the schedule would be, "), everything)  # noqa: S102
    made: fs.Carry = everything["carry"]
    return made


@pytest.mark.parametrize(
    "save", [lambda ts: ts, to_state_dict, lambda ts: msgpack_restore(to_bytes(ts)), jax.device_get]
)
def test_a_whole_train_state(save: Any) -> None:
    carry = trained()
    ts = TrainState(
        step=3,
        apply_fn=Net().apply,
        params=carry.params,
        tx=TX,
        opt_state=carry.opt_state,
        batch_stats=carry.state["batch_stats"],
    )
    assert_equal(fs.adopt_carry(save(ts), fresh()), carry)


def test_a_train_state_has_no_place_for_a_field_of_its_own() -> None:
    carry = trained()
    saved = {**carry._asdict(), **carry.state, "loss_scale": 2.0}
    del saved["state"]
    with pytest.raises(fs.CollectionError) as caught:
        fs.adopt_carry(saved, fresh())
    assert caught.value.leaves == ("carry['loss_scale']: absent -> in the checkpoint",)
    assert_equal(mended(caught.value, restored=saved, like=fresh()), carry)


def test_other_params_frozen_and_the_carry_as_it_was_saved() -> None:
    """What is frozen now, or no longer, keeps its values though `like` was made of others."""
    carry = trained()
    with pytest.raises(fs.CollectionError) as caught:
        fs.adopt_carry(carry, fresh(trainable="head/*"))
    narrow = mended(caught.value, restored=carry, like=fresh(trainable="head/*"))
    assert_equal(fs.merge_state(narrow.params, narrow.state), fs.merge_state(carry.params, carry.state))
    assert_equal(narrow.opt_state[0].mu["head"], carry.opt_state[0].mu["head"])
    wide = fs.adopt_carry(jax.device_get(narrow), fresh(), strict=False)
    assert_equal(fs.merge_state(wide.params, wide.state), fs.merge_state(carry.params, carry.state))
    assert not np.any(wide.opt_state[0].mu["body"]["kernel"])
    assert (int(wide.step), int(wide.opt_state[0].count)) == (3, 3)


@pytest.mark.parametrize(
    "other",
    [
        optax.chain(optax.clip_by_global_norm(1.0), TX),
        optax.chain(TX, optax.ema(0.9)),
        optax.apply_if_finite(TX, 3),
        optax.MultiSteps(TX, 2).gradient_transformation(),
        optax.masked(TX, lambda params: jax.tree.map(lambda leaf: True, params)),
    ],
)
def test_an_optimizer_wrapped_or_unwrapped_since_keeps_its_moments(other: Any) -> None:
    carry = trained()
    with pytest.raises(fs.CollectionError) as caught:
        fs.adopt_carry(carry, fresh(other))
    wrapped = mended(caught.value, restored=jax.device_get(carry), like=fresh(other))
    assert structure(wrapped) == structure(fresh(other))
    assert_equal(wrapped.params, carry.params)
    assert_equal(optax.tree_utils.tree_get(wrapped.opt_state, "mu"), carry.opt_state[0].mu)
    assert_equal(fs.adopt_carry(wrapped, fresh(), strict=False), carry)


def test_a_constant_rate_becomes_a_schedule() -> None:
    carry, tx = trained(optax.sgd(0.1)), optax.sgd(optax.linear_schedule(0.1, 0.0, 10))
    with pytest.raises(fs.CollectionError) as caught:
        fs.adopt_carry(carry, fresh(tx))
    assert caught.value.leaves == ("carry.opt_state[1].count: i32[] -> absent",)
    assert caught.value.cause == "tx counts its updates, for a schedule, and did not when it was saved"
    going_on = mended(caught.value, restored=carry, like=fresh(tx))
    assert int(going_on.opt_state[1].count) == 3
    fs.jit_step(fs.with_optimizer(loss_fn, tx))(going_on, (X, Y))  # no buffer twice
    assert_equal(carry.params, trained(optax.sgd(0.1)).params)


def test_variables_alone() -> None:
    carry = trained()
    for saved in (fs.merge_state(carry.params, carry.state), {"params": carry.params}):
        with pytest.raises(fs.CollectionError) as caught:
            fs.adopt_carry(saved, fresh())
        assert caught.value.cause == "variables were saved, without the optimizer's state and the count of steps"
        adopted = mended(caught.value, restored=saved, like=fresh())
        assert_equal(adopted.params, carry.params)
        assert int(adopted.step) == 0
    with pytest.raises(fs.CollectionError) as caught:
        fs.adopt_carry({"params": {"another": np.ones(3)}}, fresh())
    assert caught.value.cause == "the checkpoint is of another model or optimizer"


def test_an_nnx_optimizer_and_the_boxes_of_its_variables() -> None:
    module = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    both = getattr(nnx, "ModelAndOptimizer", None)  # flax 0.11 took the module out of the other one
    make: Any = nnx.Optimizer
    optimizer = make(module, TX, **({"wrt": nnx.Param} if both else {}))
    _, params, state = fs.from_nnx(module)
    like = fs.init_carry(params, state, TX)
    whole: Any = both(module, TX) if both else optimizer
    parts = {"model": nnx.state(module), "optimizer": nnx.state(optimizer)}
    for saved in (optimizer, whole, nnx.state(optimizer), parts):
        with pytest.raises(fs.CollectionError) as caught:
            fs.adopt_carry(saved, like)
        assert caught.value.cause == "an nnx.Optimizer was saved, which holds no params: they are its module's"
        assert_equal(mended(caught.value, module=module, optimizer=optimizer, like=like), like)
    boxed = jax.tree.map(lambda leaf: {"value": leaf}, jax.device_get(like))  # what Orbax makes of variables
    assert_equal(fs.adopt_carry(boxed, like), like)


def test_the_fix_for_a_schedule_that_came_is_run_as_it_is_printed() -> None:
    restored = fs.init_carry({"w": jnp.ones(3)}, {}, optax.sgd(0.1))._replace(step=jnp.int32(7))
    like = fs.init_carry({"w": jnp.ones(3)}, {}, optax.sgd(lambda count: 0.1))
    with pytest.raises(fs.CollectionError) as caught:
        fs.adopt_carry(restored, like)
    assert caught.value.leaves == ("carry.opt_state[1].count: i32[] -> absent",)
    anew, on = caught.value.fix.split("; to go on where the schedule would be, ")
    names: Any = {"adopt_carry": fs.adopt_carry, "restored": restored, "like": like, "optax": optax}
    exec(anew, names)  # noqa: S102 (the fix itself)
    assert int(names["carry"].opt_state[1].count) == 0
    exec(on, names)  # noqa: S102
    assert int(names["carry"].opt_state[1].count) == int(names["carry"].step) == 7


def test_a_count_of_another_width_is_the_same_count() -> None:
    carry = trained()
    same: list[Any] = [np.uint32(3), np.int64(3), jnp.uint32(3), np.array(3, np.uint8)]
    for step in same:
        assert_equal(fs.adopt_carry(carry._replace(step=step), fresh()), carry)
    others: list[Any] = [np.int64(2**40), np.uint32(2**32 - 1), np.float32(3)]
    for step in others:
        with pytest.raises((fs.CollectionError, fs.SignatureError)):
            fs.adopt_carry(carry._replace(step=step), fresh())


def test_what_a_step_says_of_an_average_or_an_optimizer_of_other_params_keeps_the_rest() -> None:
    step = fs.with_ema(fs.with_optimizer(loss_fn, TX), decay=0.9)
    carry = trained()
    with pytest.raises(fs.CollectionError) as none:
        step(carry, (X, Y))
    averaged = eval(none.value.fix, {"carry": carry, "jax": jax, "jnp": jnp})  # noqa: S307
    assert_equal(averaged.state["ema"], carry.params)
    assert_equal(averaged.opt_state, carry.opt_state)
    part = {"head": jax.tree.map(jnp.zeros_like, carry.params["head"])}
    with pytest.raises(fs.CollectionError) as narrow:
        step(averaged._replace(state={**averaged.state, "ema": part}), (X, Y))
    names = {**vars(fs), "carry": averaged._replace(state={**averaged.state, "ema": part}), "tx": TX}
    wider = eval(narrow.value.fix, names)  # noqa: S307
    assert_equal(wider.state["ema"], {"body": carry.params["body"], "BatchNorm_0": carry.params["BatchNorm_0"], **part})
    assert_equal(wider.opt_state, carry.opt_state)
    tx = optax.chain(optax.clip_by_global_norm(1.0), TX)
    with pytest.raises(fs.SignatureError) as other:
        fs.with_optimizer(loss_fn, tx)(carry, (X, Y))
    fix = other.value.fix.removesuffix(" with the tx of the step")
    wrapped = eval(fix, {**vars(fs), "carry": carry, "tx": tx})  # noqa: S307
    assert_equal(wrapped.opt_state[1], carry.opt_state)
    assert int(wrapped.step) == 3


@pytest.mark.parametrize("end", ["min", "max"])
def test_a_count_is_adopted_as_long_as_it_fits(end: str) -> None:
    like: Any = fs.init_carry({"w": jnp.ones(2)}, {}, TX)
    limit = int(getattr(np.iinfo(np.int32), end))
    assert int(fs.adopt_carry(like._replace(step=np.int64(limit)), like).step) == limit
    with pytest.raises(fs.SignatureError, match=r"carry\.step"):
        fs.adopt_carry(like._replace(step=np.int64(limit + (1 if end == "max" else -1))), like)


def test_an_optimizer_of_another_model_is_not_hung_elsewhere() -> None:
    """Of one structure, but of other shapes: the moments stay where they are asked for."""
    wide = fs.init_carry({"w": jnp.ones(3)}, {}, TX)
    like = fs.init_carry({"w": jnp.ones(2)}, {}, optax.chain(optax.clip(1.0), optax.adam(1e-2)))
    adopted = fs.adopt_carry(wide._replace(params=like.params), like, strict=False)
    assert_equal(adopted.opt_state, like.opt_state)
