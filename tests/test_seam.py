"""Between the gradient and the optimizer, as users go there: unusual calls work, wrong ones end in words of ours."""

import dataclasses
import inspect
import pathlib
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from flax.training.train_state import TrainState
from jax.sharding import SingleDeviceSharding

import flaxsplit as fs

from .flags import needs_jit, needs_promotion, needs_x32
from .test_messages import fails, whole

X = jax.random.normal(jax.random.key(0), (8, 3), jnp.float32)
BATCH = (X, X.sum(-1) + 1)
PARAMS = {"w": jnp.full(3, 0.5, jnp.float32)}
ADAM = optax.adam(1e-2)
PLATEAU = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())


def loss_fn(params: Any, state: Any, batch: Any) -> Any:
    x, y = batch
    return ((x @ params["w"] - y) ** 2).mean(), state


def counting(params: Any, state: Any, batch: Any) -> Any:
    return loss_fn(params, state, batch)[0], {**state, "n": {"c": state["n"]["c"] + 1}}


def carried(tx: Any = ADAM, **state: Any) -> fs.Carry:
    return fs.init_carry(PARAMS, state, tx)


def assert_equal(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


# ---- unusual, and legal


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_frozen_dict_of_state_comes_out_as_a_dict(microbatches: int) -> None:
    state = freeze({"n": {"c": jnp.int32(0)}})
    grads_of: Any = fs.value_and_grad(counting, microbatches=microbatches)
    found, new = grads_of(PARAMS, state, BATCH)
    expected, plain = grads_of(PARAMS, {"n": {"c": jnp.int32(0)}}, BATCH)
    assert type(new) is dict
    assert type(new["n"]) is dict
    assert_equal((found, new), (expected, plain))


@flax.struct.dataclass
class Rows:
    x: Any
    y: Any
    mask: Any = None
    name: str = flax.struct.field(pytree_node=False, default="rows")


@needs_jit
def test_a_dataclass_with_a_none_as_a_batch() -> None:
    def loss(params: Any, state: Any, rows: Any) -> Any:
        assert rows.mask is None
        assert rows.name == "rows"
        return loss_fn(params, state, (rows.x, rows.y))

    step: Any = fs.jit_step(fs.assert_max_traces(fs.scan_steps(fs.with_optimizer(loss, ADAM, microbatches=2))))
    carry, losses = step(carried(), next(fs.stack_batches([Rows(*BATCH)] * 3, 3)))
    hand: Any = fs.jit_step(fs.scan_steps(fs.with_optimizer(loss_fn, ADAM, microbatches=2)))
    assert_equal((carry, losses), hand(carried(), jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BATCH)))


class Aux(NamedTuple):
    pred: Any
    count: Any


@needs_jit
def test_a_named_tuple_as_aux() -> None:
    def loss(params: Any, state: Any, batch: Any) -> Any:
        return (loss_fn(params, state, batch)[0], Aux(batch[0] @ params["w"], 3)), state

    step: Any = fs.jit_step(fs.with_optimizer(loss, ADAM, has_aux=True, microbatches=2))
    _, (_, aux) = step(carried(), BATCH)
    assert type(aux) is Aux
    assert aux.pred.shape == (2, 4)
    assert aux.count.tolist() == [3, 3]


@needs_jit
def test_a_batch_by_its_name() -> None:
    step: Any = fs.with_ema(fs.skip_nonfinite(fs.with_optimizer(loss_fn, ADAM)), decay=0.9)
    by_name, by_place = fs.jit_step(step), fs.jit_step(step)
    assert_equal(by_name(carried(ema=PARAMS), batch=BATCH), by_place(carried(ema=PARAMS), BATCH))


@needs_jit
@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_argument_by_its_name_where_the_carry_is_pinned(microbatches: int) -> None:
    def loss(params: Any, state: Any, batch: Any, *, weight: Any) -> Any:
        return weight * loss_fn(params, state, batch)[0], state

    step: Any = fs.with_optimizer(loss, ADAM, microbatches=microbatches)
    pinned: Any = fs.jit_step(fs.assert_max_traces(step), like=carried(), donate=False)
    carry, _ = pinned(carried(), BATCH, weight=jnp.float32(2))
    carry, value = pinned(carry, BATCH, weight=jnp.float32(3))
    expected, _ = fs.jit_step(step)(carried(), BATCH, weight=jnp.float32(2))
    assert_equal((carry, value), fs.jit_step(step)(expected, BATCH, weight=jnp.float32(3)))
    assert pinned._cache_size() == 1


# ---- refused in our words


def test_a_frozen_dict_from_the_loss() -> None:
    step = fs.with_optimizer(lambda params, state, batch: (loss_fn(params, state, batch)[0], freeze(state)), ADAM)
    error = fails(fs.StateDriftError, step, carried(n={"c": jnp.int32(0)}), BATCH)
    assert str(error) == whole("""
    value_and_grad(loss_fn): what comes out must have the structure, shapes and dtypes of what goes in
      got:
        state: dict -> FrozenDict
      likely cause: a FrozenDict where a plain dict is due
      fix: return loss, flax.core.unfreeze(new_state); for a carry, init_carry(params, state, tx) makes plain dicts
    """)


def test_a_carry_where_params_and_state_are_due() -> None:
    grads_of: Any = fs.value_and_grad(loss_fn)
    error = fails(fs.SignatureError, grads_of, carried(), BATCH)
    assert str(error) == whole("""
    value_and_grad(loss_fn): params and state come first, and state is a mapping
      got:
        params: Carry
        state: tuple
      likely cause: the carry was passed whole, or an argument was forgotten
      fix: grad_fn(carry.params, carry.state, batch)
    """)
    assert fails(fs.SignatureError, grads_of, PARAMS, {}).fix == "grad_fn(carry.params, carry.state, batch)"


def test_no_state_at_all() -> None:
    none: Any = None
    error = fails(fs.SignatureError, fs.init_carry, PARAMS, none, ADAM)
    assert str(error) == whole("""
    init_carry(params, state, tx): state must be a mapping {collection: tree}
      got:
        state: NoneType
      likely cause: the model has no state, or the arguments are in another order
      fix: init_carry(params, {}, tx) for a model without state
    """)


@needs_x32
def test_a_batch_as_several_arguments_under_microbatches() -> None:
    def loss(params: Any, state: Any, x: Any, y: Any) -> Any:
        return loss_fn(params, state, (x, y))

    error = fails(fs.SignatureError, fs.with_optimizer(loss, ADAM, microbatches=2), carried(), *BATCH)
    assert str(error) == whole("""
    value_and_grad(loss_fn, microbatches=...): what is split into 2 parts must be in the batch: further arguments go to each part whole
      got:
        argument: f32[8]
        TypeError in loss_fn
      likely cause: the batch was passed as several arguments
      fix: def loss_fn(params, state, batch): x, y = batch; ..., and step(carry, (x, y))
    """)  # noqa: E501
    assert isinstance(error.__cause__, TypeError)
    fs.with_optimizer(loss, ADAM)(carried(), *BATCH)
    with pytest.raises(TypeError, match="shapes"):  # the user's own error, where nothing was to be split
        fs.with_optimizer(loss, ADAM)(carried(), X, BATCH[1][:3])


def test_names_among_what_is_stacked() -> None:
    def loss(params: Any, state: Any, batch: Any) -> Any:
        return (loss_fn(params, state, batch)[0], {"name": "a"}), state

    error = fails(fs.SignatureError, fs.with_optimizer(loss, ADAM, has_aux=True, microbatches=2), carried(), BATCH)
    assert str(error) == whole("""
    value_and_grad(loss_fn, microbatches=...): every leaf of what is stacked must be an array or a number
      got:
        aux['name']: str
      likely cause: names, records or objects are returned beside arrays
      fix: return arrays and numbers alone; what does not change belongs outside the step
    """)
    step: Any = fs.with_optimizer(loss, ADAM, has_aux=True)
    assert step(carried(), BATCH)[1][1] == {"name": "a"}  # one part, not compiled: nothing is stacked
    error = fails(fs.SignatureError, fs.scan_steps(step), carried(), jax.tree.map(lambda leaf: leaf[None], BATCH))
    assert str(error) == whole("""
    scan_steps(step): every leaf of what is stacked must be an array or a number
      got:
        out[1]['name']: str
      likely cause: names, records or objects are returned beside arrays
      fix: return arrays and numbers alone; what does not change belongs outside the step
    """)


def test_a_gradient_function_has_the_name_and_the_signature_of_the_loss() -> None:
    made: Any = fs.value_and_grad(loss_fn)
    assert made.__name__ == "loss_fn"
    assert inspect.signature(made).parameters == inspect.signature(loss_fn).parameters


def test_state_of_a_gradient_function_that_a_loss_drops_is_told() -> None:
    """As of any stateful function: in a loss that differentiates another one, such as MAML's."""
    inner = fs.value_and_grad(counting)

    def outer(params: Any, state: Any, batch: Any) -> Any:
        (_, grads), _ = inner(params, state, batch)
        return loss_fn(jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), state, batch)

    with pytest.warns(fs.DroppedStateWarning, match=r"state\['n'\]\['c'\]"):
        fs.value_and_grad(outer)(PARAMS, {"n": {"c": jnp.int32(0)}}, BATCH)


@pytest.mark.parametrize("grads", [{}, {"w": jnp.ones(4)}, {"w": jnp.ones(3), "b": jnp.ones(3)}])
def test_gradients_that_are_not_like_the_params(grads: Any) -> None:
    error = fails(fs.SignatureError, fs.apply_gradients, ADAM, carried(), grads, {})
    assert error.leaves[0].startswith("grads['b']" if "b" in grads else "grads['w']")
    assert error.required.startswith("grads must have the structure and shapes of carry.params")


def test_the_optimizer_is_given_the_loss_without_its_aux() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any) -> Any:
        del state, params
        return updates, value

    def with_aux(params: Any, state: Any, batch: Any) -> Any:
        loss, state = loss_fn(params, state, batch)
        return (loss, 7.0), state

    extra_args: Any = optax.GradientTransformationExtraArgs
    tx = extra_args(lambda _: jnp.float32(0), update)
    carry, (loss, _) = fs.with_optimizer(with_aux, tx, has_aux=True)(carried(tx), BATCH)
    assert float(carry.opt_state) == float(loss) != 7.0


@pytest.mark.parametrize("every", [1, 2])
def test_an_average_is_due_every_so_many_steps(every: int) -> None:
    step = fs.with_ema(fs.with_optimizer(loss_fn, ADAM), decay=0.5, every=every)
    carry, expected, seen = carried(ema=PARAMS), PARAMS["w"], 0
    for i in range(1, 5):
        before, (carry, _) = carry.state["ema"]["w"], step(carry, BATCH)
        if i % every == 0:
            expected, seen = 0.5 * expected + 0.5 * carry.params["w"], seen + 1
        assert bool((carry.state["ema"]["w"] == before).all()) == (i % every != 0)
        np.testing.assert_allclose(carry.state["ema"]["w"], expected, rtol=1e-6)
    assert seen == 4 // every
    branches = "cond" in str(jax.make_jaxpr(step)(carry, BATCH))
    assert branches == (every > 1)  # each step an average: no instruction to choose


def test_what_has_no_signature_can_be_compiled_like_a_carry() -> None:
    fs.jit_step(max, like=jnp.float32(0))  # a builtin: ValueError

    class Odd:
        """What `inspect` calls no signature: TypeError."""

        __name__, __signature__ = "odd", 3

        def __call__(self, carry: Any, batch: Any) -> Any:
            return carry + batch

    zero = jax.device_put(jnp.float32(0), jax.devices()[0])
    jitted = fs.jit_step(Odd(), like=zero, donate=False)
    with fs.compile_log() as log:
        for batch in (jnp.float32(1), jax.device_put(jnp.float32(1), jax.devices()[0])):
            assert float(jitted(zero, batch)) == 1.0
    assert log.compiles["odd"] == 1  # all arguments are pinned: whether one is committed makes no other program


def test_like_with_what_lives_nowhere() -> None:
    error = fails(fs.SignatureError, fs.jit_step, loss_fn, like={"w": jnp.ones(2), "name": "adam"})
    assert error.leaves == ("like['name']: str",)


def test_a_list_from_the_loss() -> None:
    listed: Any = lambda params, state, batch: [*loss_fn(params, state, batch)]  # noqa: E731
    error = fails(fs.SignatureError, fs.with_optimizer(listed, ADAM), carried(), BATCH)
    assert error.cause == "a list was returned, where a tuple is due"


def opened(tx: Any, **names: str) -> Any:
    """A step by hand that hands the loss over under these names."""
    grads_of = fs.value_and_grad(loss_fn)

    def step(carry: Any, batch: Any) -> Any:
        (loss, grads), state = grads_of(carry.params, carry.state, batch)
        return fs.apply_gradients(tx, carry, grads, state, **dict.fromkeys(names, loss)), loss

    return step


@pytest.mark.parametrize("names", [{}, {"loss": "misspelt"}])
def test_an_open_step_without_the_value_that_the_optimizer_asks_for(names: Any) -> None:
    error = fails(fs.SignatureError, opened(PLATEAU, **names), carried(PLATEAU), BATCH)
    assert str(error) == whole("""
    apply_gradients(tx, carry, grads, new_state): tx asks for optax's extra arguments
      got:
        value: not given
      likely cause: the step is open, and the arguments that with_optimizer passes by itself are missing
      fix: apply_gradients(tx, carry, grads, new_state, value=loss); or with_optimizer(loss_fn, tx)
    """)
    assert_equal(
        opened(PLATEAU, value="value")(carried(PLATEAU), BATCH),
        fs.with_optimizer(loss_fn, PLATEAU)(carried(PLATEAU), BATCH),
    )


def test_an_open_step_without_what_a_line_search_asks_for() -> None:
    tx = optax.lbfgs()
    error = fails(fs.SignatureError, opened(tx), carried(tx), BATCH)
    assert error.leaves[0] == "value: not given"
    assert error.fix.startswith("apply_gradients(tx, carry, grads, new_state, value=loss, grad=grads, value_fn=...)")


@needs_promotion
def test_gradients_of_another_precision() -> None:
    carry = fs.init_carry({"w": jnp.ones(3, jnp.bfloat16)}, {}, ADAM)
    grads = {"w": jnp.ones(3, jnp.float32)}
    error = fails(fs.SignatureError, fs.apply_gradients, ADAM, carry, grads, {})
    assert str(error) == whole("""
    apply_gradients(tx, carry, grads, new_state): grads must have the dtypes of carry.params, since tx keeps them in carry.opt_state (params -> grads)
      got:
        grads['w']: bf16[3] -> f32[3]
      likely cause: the gradients were computed or summed in another precision than the params are kept in
      fix: grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, carry.params)
    """)  # noqa: E501
    grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, carry.params)
    assert int(fs.apply_gradients(ADAM, carry, grads, {}).step) == 1
    sgd = optax.sgd(0.1)  # keeps nothing of them
    plain = fs.init_carry(carry.params, {}, sgd)
    assert int(fs.apply_gradients(sgd, plain, {"w": jnp.ones(3, jnp.float32)}, {}).step) == 1


def test_a_train_state_for_a_carry() -> None:
    state: Any = TrainState.create(apply_fn=loss_fn, params=PARAMS, tx=ADAM).apply_gradients(grads=PARAMS)
    error = fails(fs.SignatureError, fs.with_optimizer(loss_fn, ADAM), state, BATCH)
    assert str(error) == whole("""
    step(carry, batch): the first argument must be a Carry
      got:
        carry: TrainState
      likely cause: a TrainState was passed, whose update is its own
      fix: state.apply_gradients(grads=grads); or carry = adopt_carry(state, init_carry(state.params, {}, state.tx))
    """)
    carry = fs.adopt_carry(state, fs.init_carry(state.params, {}, state.tx))
    assert_equal((carry.step, carry.params, carry.opt_state), (state.step, state.params, state.opt_state))


@needs_jit
@pytest.mark.filterwarnings("ignore:with_optimizer:flaxsplit.UntouchedStateWarning")  # one of the two keeps no average
@pytest.mark.parametrize("combinator", ["skip_nonfinite", "with_ema"])
def test_a_step_that_was_compiled_before_it_was_wrapped(combinator: str) -> None:
    wraps: dict[str, Any] = {"skip_nonfinite": fs.skip_nonfinite, "with_ema": lambda step: fs.with_ema(step, decay=0.9)}
    wrap, step = wraps[combinator], fs.with_optimizer(loss_fn, ADAM)
    with pytest.raises(fs.SignatureError) as caught:
        wrap(fs.jit_step(step))(carried(ema=PARAMS), BATCH)
    error = caught.value
    assert "carry.params['w']: deleted f32[3]" in error.leaves
    assert error.cause == (
        "step was compiled by jit_step, which donates its carry, before it was wrapped; or this carry was passed twice"
    )
    assert error.fix == f"jit_step({error.where}): to compile comes last"
    assert int(wrap(fs.jit_step(step, donate=False))(carried(ema=PARAMS), BATCH)[0].step) == 1
    assert int(fs.jit_step(wrap(step))(carried(ema=PARAMS), BATCH)[0].step) == 1


@needs_jit
def test_a_batch_by_its_name_where_it_is_to_be_cut() -> None:
    step: Any = fs.jit_step(fs.with_optimizer(loss_fn, ADAM), batch=SingleDeviceSharding(jax.devices()[0]))
    with pytest.raises(fs.SignatureError) as caught:
        step(carried(), batch=BATCH)
    assert str(caught.value) == whole("""
    jit_step(batch=...): the batch must be the second argument, and without its name
      got:
        positional arguments: 1
        by name: ['batch']
      likely cause: the batch was passed by name, or not at all
      fix: step(carry, batch)
    """)


# ---- what is no carry any more


@dataclasses.dataclass
class Case:
    restored: Any
    cause: str
    fix: str


def adopted() -> dict[str, Case]:
    carry = jax.device_get(carried())
    return {
        "a tuple": Case(
            tuple(carry), "the carry was saved as a tuple without names", "adopt_carry(Carry(*restored), like)"
        ),
        "with its loss": Case(
            (carry, 0.5), "the carry was saved with something beside it", "adopt_carry(restored[0], like)"
        ),
        "after its epoch": Case(
            [3, carry._asdict()], "the carry was saved with something beside it", "adopt_carry(restored[1], like)"
        ),
        "a path": Case(
            pathlib.Path("checkpoints") / "7",
            "a path was passed, and not what a checkpoint library reads there",
            "adopt_carry(checkpointer.restore(path), like)",
        ),
    }


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", adopted())
def test_what_is_around_a_carry(name: str, strict: bool) -> None:
    case, like = adopted()[name], carried()
    with pytest.raises(
        fs.CollectionError
    ) as caught:  # also where not strict: nothing would be kept, and `like` come out
        fs.adopt_carry(case.restored, like, strict=strict)
    assert (caught.value.cause, caught.value.fix) == (case.cause, case.fix)
    if name != "a path":
        fixed: Any = eval(case.fix, {**vars(fs), "restored": case.restored, "like": like})  # noqa: S307 (our own words)
        assert_equal(fixed, like)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float64"])
def test_a_carry_that_was_saved_in_another_precision(precision: str) -> None:
    like = carried()
    restored = jax.tree.map(
        lambda leaf: leaf.astype(precision) if leaf.dtype == "float32" else leaf, jax.device_get(like)
    )
    error = fails(fs.CollectionError, fs.adopt_carry, restored, like)
    assert error.cause == "it was saved in another precision"
    cast = f"lambda leaf: leaf.astype('float32') if leaf.dtype == '{precision}' else leaf"
    assert error.fix == f"restored = jax.tree.map({cast}, restored)"
    names: Any = {"jax": jax, "restored": restored}
    exec(error.fix, names)  # noqa: S102 (our own words)
    assert_equal(fs.adopt_carry(names["restored"], like), like)


def test_nothing_in_common_is_no_carry_with_parts_missing() -> None:
    with pytest.raises(fs.CollectionError, match="absent"):
        fs.adopt_carry({}, carried(), strict=False)
    assert int(fs.adopt_carry({"step": 3}, carried(), strict=False).step) == 3
