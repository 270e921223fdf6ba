"""The laws again, over models, optimizers and stacks that hypothesis draws, against loops written out by hand.

Each test draws for FUZZ_SECONDS and no longer; `make fuzz` sets more.
"""

import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from . import strategies as some
from .drawn_models import BATCH, LANES, Drawn, Dropout, Lanes, Model, NnxModel, Sow, Stack
from .flags import needs_jit, needs_promotion
from .meshes import on, told
from .models import numbers, structure
from .nnx_models import loss_of
from .test_mesh import assert_close, by_shape
from .test_nnx import leaves_of

# Every state has an average, to see that nothing else touches it.
pytestmark = [needs_jit, pytest.mark.filterwarnings("ignore:with_optimizer:flaxsplit.UntouchedStateWarning")]
DECAY = 0.9
KINDS = (AxisType.Auto, AxisType.Explicit)
PAIRS = {kind: jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind)) for kind in KINDS}
SGD = optax.sgd(0.05, momentum=0.9)


def assert_bits(left: Any, right: Any) -> None:
    """Compares two trees bit for bit, NaN equal to NaN."""
    assert_close(left, right, 0)
    assert [leaf.dtype for leaf in jax.tree.leaves(left)] == [leaf.dtype for leaf in jax.tree.leaves(right)]


# With flaxsplit


def applied(model: Model, stack: Stack, mutable: Any = ...) -> Any:
    """The stateful function of a stack; `out` is `(out, captured)` where the model sows."""
    axis_name = "batch" if "vmap" in stack.functions else None
    capture = ("intermediates",) if model.has(Sow) else ()
    fn: Any = fs.with_mutable(Drawn(model, axis_name), mutable=mutable, capture=capture)
    wrap: dict[str, Callable[[Any], Any]] = {"rngs": fs.with_rngs, "vmap": fs.vmap_stateful}
    for name in stack.functions:
        fn = wrap[name](fn)
    return fn


def error(model: Model, result: Any, y: Any) -> Any:
    """The loss of an `out`, sown values included."""
    out, sown = result if model.has(Sow) else (result, {})
    return ((out - y) ** 2).mean() + sum((leaf.astype(jnp.float32) ** 2).mean() for leaf in jax.tree.leaves(sown))


def opened(loss_fn: Any, tx: Any, microbatches: int) -> Any:
    """The step of `with_optimizer`, by hand: somebody could write lines of his own in between."""
    grads_of = fs.value_and_grad(loss_fn, microbatches=microbatches)

    def step(carry: Any, batch: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        (loss, grads), state = grads_of(carry.params, carry.state, batch, *args, **kwargs)
        return fs.apply_gradients(tx, carry, grads, state, value=loss), loss

    return step


def averaged(stack: Stack, params: Any, state: Any) -> Any:
    """What an average is of: whole numbers of a cache are among it."""
    own = {name: tree for name, tree in state.items() if name not in ("params", "rngs", "ema")}
    return params if stack.of == "params" else {"params": params, **own}


def stepped(
    model: Model, stack: Stack, tx: optax.GradientTransformation, traces: int = 1, mesh: Mesh | None = None
) -> Any:
    """The step of a stack, traced so often at most; where a mesh has Explicit axes, its loss says where results go."""
    fn = applied(model, stack)

    def loss_fn(params: Any, state: Any, batch: Any, weight: Any = 1.0) -> tuple[Any, Any]:
        out, state = fn(params, state, batch[0])
        return weight * error(model, out, batch[1]), state

    def by_name(params: Any, state: Any, batch: Any, *, weight: Any = 1.0) -> tuple[Any, Any]:
        return loss_fn(params, state, batch, weight)

    chosen = by_name if stack.given == "name" else loss_fn
    return wrapped(stack, told(chosen, mesh) if mesh else chosen, tx, traces)


def wrapped(stack: Stack, loss_fn: Any, tx: optax.GradientTransformation, traces: int) -> Any:
    """The steps of a stack around a loss."""
    count = stack.microbatches
    step: Any = opened(loss_fn, tx, count) if stack.opened else fs.with_optimizer(loss_fn, tx, microbatches=count)
    of: Any = lambda carry: averaged(stack, carry.params, carry.state)  # noqa: E731
    wrap: dict[str, Callable[[Any], Any]] = {
        "ema": lambda step: fs.with_ema(step, decay=DECAY, of=of, every=stack.every),
        "skip": fs.skip_nonfinite,
        "traced": lambda step: fs.assert_max_traces(step, traces),
    }
    for name in stack.steps:
        step = wrap[name](step)
    return step


# By hand: Flax, jax.value_and_grad, optax


def merged(params: Any, frozen: Any) -> Any:
    """All params."""
    return some.nested(some.flat(params) | some.flat(frozen))


def applied_by_hand(model: Model, stack: Stack, params: Any, state: Any, x: Any) -> tuple[Any, Any]:
    """One call of Flax's apply on the batch, or one per example."""
    rest = {name: tree for name, tree in state.items() if name not in ("params", "rngs", "ema")}
    variables = {**rest, "params": merged(params, state.get("params", {}))}
    mapped = "vmap" in stack.functions

    def call(x: Any, key: Any) -> tuple[Any, Any]:
        if key is not None and stack.functions == ("rngs", "vmap"):
            key = jax.random.split(key)[1]  # drawn once more, per lane
        rngs: Any = {} if key is None else {"rngs": {"dropout": key}}
        module = Drawn(model, "batch" if mapped else None)
        out, new = module.apply(variables, x, mutable=[*rest, "intermediates"], **rngs)
        new = dict(new)
        sown = new.pop("intermediates", {})
        return ((out, {"intermediates": sown}) if model.has(Sow) else out), {**rest, **new}

    keys, key = {}, None
    if model.has(Dropout):
        first, key = jax.random.split(state["rngs"]["dropout"])
        keys = {"rngs": {"dropout": first}}
    if mapped:
        lanes = None if key is None else jax.random.split(key, len(x))
        each = jax.vmap(call, in_axes=(0, None if key is None else 0), out_axes=(0, None), axis_name="batch")
        out, new = each(x, lanes)
    else:
        out, new = call(x, key)
    return out, state | new | keys


def step_by_hand(model: Model, stack: Stack, tx: Any) -> Any:
    """The guide's loop body over `(params, state, opt_state)`, and how many steps were taken before."""
    tx = optax.with_extra_args_support(tx)

    def loss_fn(params: Any, state: Any, x: Any, y: Any, weight: Any) -> tuple[Any, Any]:
        out, state = applied_by_hand(model, stack, params, state, x)
        return weight * error(model, out, y), state

    def step(params: Any, state: Any, opt_state: Any, taken: Any, batch: Any, weight: Any = 1.0) -> Any:
        before = params, state, opt_state
        count = stack.microbatches
        losses, grads = [], []
        for i in range(count):
            x, y = (leaf[i::count] for leaf in batch)
            (loss, state), grad = jax.value_and_grad(loss_fn, has_aux=True)(params, state, x, y, weight)
            losses.append(loss)
            grads.append(grad)
        loss, mean = losses[0], grads[0]
        if count > 1:
            loss = sum(losses) / count
            mean = jax.tree.map(lambda *each: sum(each) / count, *grads)
        updates, opt_state = tx.update(mean, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        if "ema" in stack.steps:
            state = {**state, "ema": average_by_hand(stack, params, state, taken)}
        if "skip" in stack.steps:
            params, state, opt_state = kept_by_hand(before, (params, state, opt_state), loss)
        return params, state, opt_state, loss

    return step


def average_by_hand(stack: Stack, params: Any, state: Any, taken: Any) -> Any:
    """The average after a step."""

    def blended(new: Any, old: Any) -> Any:
        floating = jnp.issubdtype(old.dtype, jnp.inexact)
        return ((1 - DECAY) * new + (1.0 - (1 - DECAY)) * old).astype(old.dtype) if floating else new

    def blend() -> Any:
        return jax.tree.map(blended, averaged(stack, params, state), state["ema"])

    return blend() if stack.every == 1 else jax.lax.cond((taken + 1) % stack.every == 0, blend, lambda: state["ema"])


def kept_by_hand(before: Any, after: Any, loss: Any) -> Any:
    """What a step leaves that is not taken where a number is not finite: all as it was, but for the keys."""
    keys = {name: tree for name, tree in after[1].items() if name == "rngs"}
    rest, old = (
        (each[0], {name: each[1][name] for name in each[1] if name != "rngs"}, each[2]) for each in (after, before)
    )
    floats = [
        jnp.all(jnp.isfinite(new) | ~jnp.isfinite(was))
        for new, was in zip(jax.tree.leaves(rest), jax.tree.leaves(old), strict=True)
        if jnp.issubdtype(new.dtype, jnp.inexact)
    ]
    # the barrier is ours: without it XLA fuses the two in different ways, and rounds a sum that cancels differently
    fine = jax.lax.optimization_barrier(jnp.stack([*floats, jnp.isfinite(loss)]).all())
    params, state, opt_state = jax.tree.map(lambda new, was: jnp.where(fine, new, was), rest, old)
    return params, {**state, **keys}, opt_state


def begun(model: Model, stack: Stack) -> tuple[Any, Any]:
    """Params and state, with the average of this stack."""
    params, state = model.halves()
    return params, state | {"ema": averaged(stack, params, state)}


def said(stack: Stack, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The further arguments of a call: one program for all weights."""
    weight = jnp.float32(1 + seed / 4)
    return ((weight,) if stack.given == "place" else ()), ({"weight": weight} if stack.given == "name" else {})


def parts(carry: fs.Carry) -> tuple[Any, Any, Any]:
    """What the loop by hand carries, in buffers of its own."""
    copy: tuple[Any, Any, Any] = jax.tree.map(jnp.copy, (carry.params, carry.state, carry.opt_state))
    return copy


def jitted(step: Any, stack: Stack, carry: fs.Carry) -> Any:
    """As the stack says."""
    return fs.jit_step(step, like=carry if stack.like else None, donate=stack.donate)


# Law 1


@some.fuzzed(model=some.models(), data=st.data())
def test_law_1_split_and_merge(model: Model, data: st.DataObject) -> None:
    variables = model.variables()
    for _ in range(8):  # a model takes much longer to make than to split
        trainable, chosen = data.draw(some.trainables(variables["params"]))
        params, state = fs.split_params(variables, trainable=trainable)
        assert some.arrays(params).keys() == chosen
        back = fs.merge_state(params, state)
        assert_bits(back, variables)
        assert_bits(fs.split_params(back, trainable=trainable), (params, state))


# Law 2


@some.fuzzed(model=some.models(), data=st.data(), seed=st.integers(0, 99))
def test_law_2_apply(model: Model, data: st.DataObject, seed: int) -> None:
    params, state = model.halves()
    rngs = {"dropout": state.pop("rngs")["dropout"]} if model.has(Dropout) else None
    x, _ = model.batch(seed)
    written = sorted(state.keys() - {"params", "ema"})
    fn = applied(model, Stack(), data.draw(some.mutables(written, [])))

    @jax.jit
    def by_hand(x: Any) -> Any:
        rest = {name: state[name] for name in written}
        variables = {**rest, "params": merged(params, state.get("params", {}))}
        out, new = Drawn(model).apply(variables, x, rngs=rngs, mutable=[*written, "intermediates"])
        sown = {"intermediates": dict(new).get("intermediates", {})}
        return ((out, sown) if model.has(Sow) else out), {name: dict(new)[name] for name in written}

    out, new_state = jax.jit(lambda x: fn(params, state, x, **({} if rngs is None else {"rngs": rngs})))(x)
    expected, updated = by_hand(x)
    assert_bits(out, expected)
    assert_bits(new_state, {**state, **updated})


# Law 3


@some.fuzzed(model=some.models(rounding=False, dropout=False, cached=False), seed=st.integers(0, 99))
def test_law_3_vmap(model: Model, seed: int) -> None:
    params, state = model.halves()
    x, y = model.batch(seed)

    def run(stack: Stack) -> Any:
        fn = applied(model, stack)

        def loss(params: Any) -> tuple[Any, Any]:
            result, new = fn(params, state, x)
            return error(model, result, y), (result, new)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    assert_close(run(Stack(("vmap",))), run(Stack()))


def scored(out: Any, noise: Any, shift: Any, scale: Any) -> dict[str, Any]:
    """What a lane hands out: a number, several, and one that it has no part in."""
    return {"out": out, "many": (out + noise + shift["a"] * shift["b"]) * scale, "total": scale.sum()}


def mapped(model: Model, lanes: Lanes) -> Any:
    """A model of one example as flaxsplit maps it."""
    apply: Any = fs.with_mutable(Drawn(model, lanes.axis_name))

    def fn(params: Any, state: Any, x: Any, shift: Any, *, scale: Any, rngs: Any = None) -> tuple[Any, Any]:
        out, state = apply(params, state, x, rngs=rngs)
        noise = 0.0 if rngs is None else jax.random.normal(rngs["noise"], (), jnp.float32)
        return scored(out, noise, shift, scale), state

    each: Any = fs.vmap_stateful(
        fs.with_rngs(fn) if lanes.rngs == "inside" else fn,
        in_axes=lanes.x if lanes.x == lanes.shift else (lanes.x, lanes.shift),
        out_axes=lanes.many,
        axis_name=lanes.axis_name,
        params_axes=lanes.params,
        state_axes=lanes.state,
        split_rngs=lanes.split,
        axis_size=LANES if lanes.told else None,
    )
    return fs.with_rngs(each) if lanes.rngs == "outside" else each


def advanced(rngs: Any) -> tuple[Any, Any]:
    """What streams go on with, and the keys for one call."""
    pairs = {name: jax.random.split(key) for name, key in rngs.items()}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def lane_by_hand(model: Model, lanes: Lanes, scale: Any) -> Any:
    """One lane: Flax's apply on one example."""

    def lane(params: Any, state: Any, keys: Any, x: Any, shift: Any) -> tuple[Any, Any]:
        if lanes.rngs == "inside" and "rngs" in lanes.state:  # the lane has a stream of its own
            kept, keys = advanced(state["rngs"])
            state = state | {"rngs": kept}
        elif lanes.rngs == "inside":
            keys = advanced(keys)[1]  # drawn once more, per lane
        rest = {name: tree for name, tree in state.items() if name not in ("params", "rngs", "ema")}
        variables = {**rest, "params": merged(params, state.get("params", {}))}
        out, new = Drawn(model, lanes.axis_name).apply(variables, x, mutable=[*rest], rngs=keys or None)
        noise = jax.random.normal(keys["noise"], (), jnp.float32) if keys else 0.0
        return scored(out, noise, shift, scale), state | dict(new)

    return lane


def keys_by_hand(lanes: Lanes, state: Any, given: Any) -> tuple[Any, Any, Any]:
    """The state with its streams advanced, the keys of all lanes, and which of these are one per lane."""
    keys = given
    if lanes.rngs == "outside" or (lanes.rngs == "inside" and "rngs" not in lanes.state):
        kept, keys = advanced(state["rngs"])
        state = state | {"rngs": kept}
    each = {name: jax.random.split(key, LANES) if lanes.splits(name) else key for name, key in keys.items()}
    return state, each, {name: 0 if lanes.splits(name) else None for name in each}


def spread(axes: Any, tree: Any) -> list[Any]:
    """The axis of each leaf of a tree, from a prefix of it."""
    is_none: Any = lambda node: node is None  # noqa: E731
    return jax.tree.leaves(jax.tree.broadcast(axes, tree, is_leaf=is_none), is_leaf=is_none)


def laned(tree: Any, axes: Any) -> Any:
    """Gives each lane leaves of its own along their axes."""

    def other(leaf: Any, i: int) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.fold_in(leaf, i)
        return leaf * (1 + i / 4) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, spread(axes, tree), strict=True)
    each = [
        leaf if axis is None else jnp.stack([other(leaf, i) for i in range(LANES)], axis=axis) for leaf, axis in pairs
    ]
    return jax.tree.unflatten(treedef, each)


def lane_of(tree: Any, axes: Any, i: int) -> Any:
    """What one lane has of a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, spread(axes, tree), strict=True)
    each = [leaf if axis is None else jax.lax.index_in_dim(leaf, i, axis, keepdims=False) for leaf, axis in pairs]
    return jax.tree.unflatten(treedef, each)


@some.fuzzed(model=some.models(rounding=False), data=st.data(), seed=st.integers(0, 99))
def test_law_3_the_options_of_vmap(model: Model, data: st.DataObject, seed: int) -> None:
    key = jax.random.key(seed)
    one_params, one_state = model.halves(one=True)
    one_state |= fs.rng_state(dropout=key, noise=jax.random.fold_in(key, 1))
    lanes = data.draw(some.lanes(model, one_params, one_state))
    state_axes = lanes.axes(one_state)
    axes = (lanes.params, state_axes, lanes.x, lanes.shift)
    x, scale = model.batch(seed)[0][:LANES], jnp.arange(1, 1 + LANES, dtype=jnp.float32)
    x = x[0] if lanes.x is None else jnp.moveaxis(x, 0, lanes.x)
    shift = laned({"a": jnp.float32(2), "b": jnp.float32(3)}, lanes.shift)
    args = (laned(one_params, lanes.params), laned(one_state, state_axes), x, shift)
    given = fs.rng_state(dropout=jax.random.key(3), noise=jax.random.key(4))["rngs"] if lanes.rngs == "hand" else {}
    fn, lane = mapped(model, lanes), lane_by_hand(model, lanes, scale)

    @jax.jit
    def by_hand(params: Any, state: Any, x: Any, shift: Any) -> Any:
        state, keys, key_axes = keys_by_hand(lanes, state, given)
        in_axes, out_axes = (*axes[:2], key_axes, *axes[2:]), (lanes.many, state_axes)
        each = jax.vmap(lane, in_axes, out_axes, axis_name=lanes.axis_name, axis_size=LANES)
        return each(params, state, keys, x, shift)

    result = jax.jit(lambda *args: fn(*args, scale=scale, **({"rngs": given} if given else {})))(*args)
    assert_bits(result, by_hand(*args))
    if lanes.axis_name is None:  # nothing is averaged: a lane is the model alone
        i = data.draw(st.integers(0, LANES - 1))
        params, state, *rest = (lane_of(tree, axis, i) for tree, axis in zip(args, axes, strict=True))
        advanced_state, keys, key_axes = keys_by_hand(lanes, args[1], given)
        state = lane_of(advanced_state, state_axes, i)
        alone = jax.jit(lane)(params, state, lane_of(keys, key_axes, i), *rest)
        assert_close(lane_of(result, (lanes.many, state_axes), i), alone)


# A state at the fixed point


def forms(tree: Any) -> list[tuple[Any, Any]]:
    """The shape and dtype of each leaf."""
    return [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]


def assert_same(left: Any, right: Any) -> None:
    """The very same leaves."""
    assert structure(left) == structure(right)
    assert all(a is b for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


@needs_promotion
@some.fuzzed(model=some.models(rounding=False, drifting=True), data=st.data(), seed=st.integers(0, 99))
def test_a_settled_state_stays(model: Model, data: st.DataObject, seed: int) -> None:
    params, state = model.halves()
    stack, batch = replace(data.draw(some.stacks(model)), of="params"), model.batch(seed)
    fn = applied(model, stack)
    start, expected = data.draw(some.narrowed(model.updated(state)))
    kept = some.flat(start)  # NumPy's leaves are read-only, as JAX's
    settled = fs.settle_state(fn, params, start, batch[0])
    assert_bits(settled, expected)
    assert_same(start, some.nested(kept))
    assert forms(jax.eval_shape(fn, params, settled, batch[0])[1]) == forms(settled)
    assert_same(fs.settle_state(fn, params, settled, batch[0]), settled)
    if forms(start) != forms(settled):
        with pytest.raises(fs.StateDriftError):
            jax.eval_shape(stepped(model, stack, SGD), fs.init_carry(params, start, SGD), batch)
    carry = fs.init_carry(params, settled, SGD)
    compiled = jitted(fs.assert_max_traces(stepped(model, stack, SGD)), stack, carry)
    for _ in range(2):
        carry, _ = compiled(carry, batch)
    assert compiled._cache_size() == 1

    path = data.draw(st.sampled_from(sorted(path for path in kept if path[0] in some.UPDATED)))
    end = some.flat(expected)[path]
    odd = [jnp.zeros((3, *end.shape), jnp.float32), jnp.zeros(3, jnp.float32), end.astype(jnp.complex64)]
    wrong = data.draw(st.sampled_from(odd))
    forgets: Any = lambda params, _, x: fn(params, expected, x)  # noqa: E731
    with pytest.raises(fs.StateDriftError) as caught:
        fs.settle_state(forgets, params, some.nested(some.flat(start) | {path: wrong}), batch[0])
    name = "".join(f"[{key!r}]" for key in path)
    words = [f"{'c64' if leaf.dtype == jnp.complex64 else 'f32'}{[*leaf.shape]}" for leaf in (wrong, end)]
    assert caught.value.leaves == (f"state{name}: {' -> '.join(words)}".replace(", ", ","),)


# Laws 4 and 6: a frozen leaf is in the state, which is compared too


def program(step: Any, *args: Any, **kwargs: Any) -> str:
    """All that a step computes; functions that JAX made are known by their address."""
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(step)(*args, **kwargs)))


def trained(model: Model, stack: Stack, tx: optax.GradientTransformation, check: Any) -> None:
    """Takes three steps by flaxsplit and by hand; opened or not, a step is the same program."""
    params, state = begun(model, stack)
    carry = fs.init_carry(params, state, tx)
    hand = parts(carry)
    step, by_hand = jitted(stepped(model, stack, tx), stack, carry), jax.jit(step_by_hand(model, stack, tx))
    assert structure(carry.opt_state) == structure(tx.init(params))
    either, other = stepped(model, stack, tx), stepped(model, replace(stack, opened=not stack.opened), tx)
    args, kwargs = said(stack, 0)
    assert program(either, carry, model.batch(0), *args, **kwargs) == program(
        other, carry, model.batch(0), *args, **kwargs
    )
    for seed in range(3):
        batch, (args, kwargs) = model.batch(seed), said(stack, seed)
        carry, loss = step(carry, batch, *args, **kwargs)
        *hand, expected = by_hand(*hand, jnp.int32(seed), batch, *args, **kwargs)
        check((carry.params, carry.state, carry.opt_state, loss), (*hand, expected))
    assert step._cache_size() == 1
    assert_bits(carry.state.get("params", {}), state.get("params", {}))


@some.fuzzed(model=some.models(), tx=some.optimizers(), data=st.data())
def test_laws_4_and_6_the_loop_of_the_guide(model: Model, tx: optax.GradientTransformation, data: Any) -> None:
    assume(keeps_its_form(tx, model))
    trained(model, data.draw(some.stacks(model)), tx, assert_bits)


def keeps_its_form(tx: optax.GradientTransformation, model: Model) -> bool:
    """Not so where hyperparameters are arrays and params are of several dtypes: optax then widens its moments."""
    params = model.halves()[0]
    state = jax.eval_shape(tx.init, params)
    update: Any = optax.with_extra_args_support(tx).update
    _, after = jax.eval_shape(lambda *args: update(*args, value=1.0), params, state, params)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    return all((old.shape, old.dtype) == (new.shape, new.dtype) for old, new in pairs)


# Law 10


@some.fuzzed(model=some.models(), tx=some.optimizers(), data=st.data())
def test_law_10_a_poisoned_batch_changes_the_keys_alone(
    model: Model, tx: optax.GradientTransformation, data: Any
) -> None:
    assume(keeps_its_form(tx, model))
    stack = data.draw(some.stacks(model, [1, 2]))
    stack = replace(stack, steps=tuple(name for name in stack.steps if name == "ema"))
    carry = fs.init_carry(*begun(model, stack), tx)
    step = stepped(model, stack, tx)
    both = jax.jit(lambda *args, **kwargs: (fs.skip_nonfinite(step)(*args, **kwargs), step(*args, **kwargs)))
    args, kwargs = said(stack, 1)
    (carry, loss), plain = both(carry, model.batch(0), *args, **kwargs)
    assert is_finite(loss)
    assert_bits((carry, loss), plain)
    x, y = model.batch(1)
    reaches = data.draw(st.booleans())  # what is wrong in x may be dropped by the model, and tokens have no such number
    x, y = (x, poisoned(y)) if reaches else (poisoned(x), y)
    (after, loss), (_, plain_loss) = both(carry, (x, y), *args, **kwargs)
    assert_bits(loss, plain_loss)
    assert not (reaches and is_finite(loss))
    if not is_finite(loss):
        assert_bits(without_keys(after), without_keys(carry))
        assert model.has(Dropout) == (not same_keys(after, carry))
    assert is_finite(without_keys(after))


def same_keys(left: fs.Carry, right: fs.Carry) -> bool:
    """Whether no stream has moved."""
    pairs = zip(*(jax.tree.leaves(each.state.get("rngs", {})) for each in (left, right)), strict=True)
    return all(np.array_equal(numbers(a), numbers(b)) for a, b in pairs)


def poisoned(tree: Any) -> Any:
    """One number of each floating leaf is none."""

    def one(leaf: Any) -> Any:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.at[(0,) * leaf.ndim].set(jnp.nan) if is_float else leaf

    return jax.tree.map(one, tree)


def is_finite(tree: Any) -> bool:
    """Whether all that is floating is finite."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(bool(jnp.isfinite(leaf).all()) for leaf in floats)


def without_keys(carry: fs.Carry) -> Any:
    """All of a carry but what moves at each step."""
    return carry._replace(state={name: tree for name, tree in carry.state.items() if name != "rngs"})


# Law 5


def unstacked(batches: Any) -> list[Any]:
    """The batches of a stack."""
    leaves, treedef = jax.tree.flatten(batches)
    return [jax.tree.unflatten(treedef, each) for each in zip(*leaves, strict=True)]


def stacked_sizes(batches: list[Any], size: int) -> list[int]:
    """How many batches each stack is to hold: `size`, but what is left at the end and where the shape changes."""
    sizes: list[int] = []
    for i, (_, y) in enumerate(batches):
        joins = sizes and sizes[-1] < size and len(y) == len(batches[i - 1][1])
        sizes[-1:] = [sizes[-1] + 1] if joins else [*sizes[-1:], 1]
    return sizes


@some.fuzzed(model=some.models(rounding=False), data=st.data(), unroll=st.integers(1, 2))
def test_law_5_scan(model: Model, data: st.DataObject, unroll: int) -> None:
    stack = data.draw(some.stacks(model, [1, 2]))
    carry = fs.init_carry(*begun(model, stack), SGD)
    hand = parts(carry)
    batches, size = data.draw(some.batches(model))
    stacks = list(fs.stack_batches(iter(batches), size))
    assert_bits([batch for each in stacks for batch in unstacked(each)], batches)
    assert stacked_sizes(batches, size) == [len(each[1]) for each in stacks]
    step = stepped(model, stack, SGD, len({each[1].shape for each in stacks}))
    scan = jitted(fs.scan_steps(step, unroll=unroll), stack, carry)
    by_hand = jax.jit(step_by_hand(model, stack, SGD))
    losses = []
    args, kwargs = said(stack, len(batches))
    for each in stacks:
        carry, outs = scan(carry, each, *args, **kwargs)
        losses += [*outs]
    for i, (loss, batch) in enumerate(zip(losses, batches, strict=True)):
        *hand, expected = by_hand(*hand, jnp.int32(i), batch, *args, **kwargs)
        assert_close(loss, expected)
    assert_close((carry.params, carry.state, carry.opt_state), tuple(hand))


@some.fuzzed(model=some.models(rounding=False), data=st.data())
def test_law_5_microbatches(model: Model, data: st.DataObject) -> None:
    trained(model, data.draw(some.stacks(model, [2, 4])), SGD, assert_close)


# Law 8


@some.fuzzed(model=some.models(rounding=False), data=st.data())
def test_law_8_mesh(model: Model, data: st.DataObject) -> None:
    boxed = any(getattr(layer, "boxed", False) for layer in model.layers)  # by names that are no axes of the mesh
    stack, mesh = data.draw(some.stacks(model)), PAIRS[data.draw(st.sampled_from(KINDS[:1] if boxed else KINDS))]
    single = fs.init_carry(*begun(model, stack), SGD)
    sharded = jax.device_put(jax.tree.map(jnp.copy, single), by_shape(mesh, single))
    step = jitted(stepped(model, stack, SGD), Stack(), single)
    on_mesh: Any = fs.jit_step(stepped(model, stack, SGD, mesh=mesh), like=sharded)
    compiles = 0
    for seed in range(2):
        x, y = (jnp.concatenate([leaf, leaf]) for leaf in model.batch(seed))  # eight examples
        if model.cached:
            x, y = x[:BATCH], y[:BATCH]
        spread = NamedSharding(mesh, P(("data", "model"))) if len(x) == 8 else on(mesh, "data")
        single, expected = step(single, (x, y))
        with fs.compile_log() as log:
            sharded, loss = on_mesh(sharded, jax.device_put((x, y), spread))
        compiles += log.compiles[on_mesh.__name__]
        assert_close((sharded, loss), (single, expected), 1e-3)
    assert compiles == 1
    assert AxisType.Explicit in mesh.axis_types or on_mesh._cache_size() == 1  # there JAX writes P() as P(None) too


# An NNX module: NNX's own loop


def nnx_by_hand(module: Any, wrt: Any, tx: Any) -> tuple[Any, Any, Any]:
    """The loop body over `nnx.split` and `nnx.merge`, where to start, and how to write back."""
    tx = optax.with_extra_args_support(tx)
    split: Any = nnx.split
    graphdef, params, rest = split(module, wrt, ...)
    leaves, treedef = jax.tree.flatten(rest)  # as leaves: a Variable cannot be written in a trace below its own

    def loss_fn(params: Any, leaves: Any, x: Any) -> tuple[Any, Any]:
        module = nnx.merge(graphdef, params, jax.tree.unflatten(treedef, leaves))
        return loss_of(module(x)), jax.tree.leaves(split(module, wrt, ...)[2])

    def step(params: Any, leaves: Any, opt_state: Any, x: Any) -> tuple[Any, Any, Any, Any]:
        (loss, leaves), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, leaves, x)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), leaves, opt_state, loss

    def back(params: Any, leaves: Any) -> None:
        nnx.update(module, params, jax.tree.unflatten(treedef, leaves))

    return jax.jit(step), (params, leaves, jax.tree.map(jnp.array, tx.init(params))), back


@some.fuzzed(model=some.nnx_models(), tx=some.optimizers(), data=st.data())
def test_an_nnx_module_is_trained_as_by_nnx(model: NnxModel, tx: optax.GradientTransformation, data: Any) -> None:
    theirs: Any = model.make(0)
    module = model.make(0)
    several = [data.draw(some.nnx_trainables(theirs)) for _ in range(4)]  # to train takes longer than to take apart
    for trainable, chosen in several:
        assert some.flat(fs.from_nnx(module, trainable=trainable)[1]).keys() == chosen
    trainable, chosen = several[0]
    fn, params, state = fs.from_nnx(module, trainable=trainable)

    def loss_fn(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        out, state = fn(params, state, x)
        return loss_of(out), state

    carry = fs.init_carry(params, state, tx)
    step: Any = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)), donate=False)  # as the loop by hand
    by_hand, hand, back = nnx_by_hand(theirs, lambda path, _: tuple(map(str, path)) in chosen, tx)
    for seed in range(3):
        carry, loss = step(carry, model.inputs(seed))
        *hand, expected = by_hand(*hand, model.inputs(seed))
        assert_bits(loss, expected)
    assert step._cache_size() == 1
    assert_bits(carry.state.get("params", {}), state.get("params", {}))
    back(*hand[:2])
    ours: Any = fs.to_nnx(model.make(7), carry.params, carry.state)
    assert_bits(leaves_of(ours), leaves_of(theirs))
    ours.eval()
    theirs.eval()
    evaluate, params, state = fs.from_nnx(ours, trainable=trainable)
    out, _ = evaluate(params, state, model.inputs(3))
    expected = theirs(model.inputs(3))
    assert_bits(out, expected)
    assert_bits(ours(model.inputs(3)), expected)


# Law 7, and all in any order


class Training(RuleBasedStateMachine):
    """Splits, merges, steps, scans, evaluates, saves, restores and adopts, beside the plain loop."""

    budget: Any = None

    @initialize(
        model=some.models(rounding=False),
        tx=st.sampled_from(["momentum", "adam", "inject_hyperparams"]),
        data=st.data(),
    )
    def begin(self, model: Model, tx: str, data: st.DataObject) -> None:
        self.budget.next()
        self.model, self.stack = model, data.draw(some.stacks(model))
        self.tx = some.OPTIMIZERS[tx]
        self.carry = fs.init_carry(*begun(model, self.stack), self.tx)
        self.first = jax.tree.map(jnp.copy, self.carry)
        self.hand: Any = parts(self.carry)
        step = stepped(model, self.stack, self.tx)
        self.step = jitted(step, self.stack, self.carry)
        self.scan: Any = fs.jit_step(fs.scan_steps(stepped(model, self.stack, self.tx, 4)))  # one to three, or ragged
        self.by_hand = jax.jit(step_by_hand(model, self.stack, self.tx))
        self.saved: Any = None
        self.count = self.at = 0
        self.stacks: set[Any] = set()

    @rule(seed=st.integers(0, 9))
    def steps(self, seed: int) -> None:
        self.takes(self.model.batch(seed), seed)
        self.count += 1

    def takes(self, batch: Any, seed: int) -> None:
        args, kwargs = said(self.stack, seed)
        self.carry, loss = self.step(self.carry, batch, *args, **kwargs)
        *self.hand, expected = self.by_hand(*self.hand, jnp.int32(self.count), batch, *args, **kwargs)
        assert_bits(loss, expected)

    @precondition(lambda self: "skip" in self.stack.steps)
    @rule(seed=st.integers(0, 9))
    def skips(self, seed: int) -> None:
        x, y = self.model.batch(seed)
        kept = jax.tree.map(jnp.copy, without_keys(self.carry))
        self.takes((x, poisoned(y)), seed)
        assert_bits(without_keys(self.carry), kept)

    @rule(data=st.data(), seed=st.integers(0, 9))
    def scans(self, data: st.DataObject, seed: int) -> None:
        batches, size = data.draw(some.batches(self.model))
        args, kwargs = said(self.stack, seed)
        for each in fs.stack_batches(batches, size):
            self.carry, _ = self.scan(self.carry, each, *args, **kwargs)
            self.stacks.add((type(each[1]), each[1].shape))  # NumPy's arrays are dispatched apart, not traced apart
        for i, batch in enumerate(batches):
            *self.hand, _ = self.by_hand(*self.hand, jnp.int32(self.count + i), batch, *args, **kwargs)
        # Two programs: XLA may round otherwise. From here on both go on from the same numbers.
        assert_close(parts(self.carry), tuple(self.hand), 1e-3)
        self.hand = parts(self.carry)
        self.count += len(batches)

    @rule(data=st.data(), seed=st.integers(0, 9))
    def settles(self, data: st.DataObject, seed: int) -> None:
        start, settled = data.draw(some.narrowed(self.carry.state))
        fn, x = applied(self.model, self.stack), self.model.batch(seed)[0]
        state = fs.settle_state(fn, self.carry.params, start, x)
        assert_same(fs.settle_state(fn, self.carry.params, self.carry.state, x), self.carry.state)
        self.carry = fs.adopt_carry(self.carry._replace(state=state), self.first)
        params, _, opt_state = self.hand
        self.hand = [params, settled, opt_state]

    @rule(form=st.sampled_from(["numpy", "names", "lists", "words"]), strict=st.booleans())
    def adopts(self, form: str, strict: bool) -> None:
        forms: dict[str, Callable[[Any], Any]] = {
            "numpy": lambda carry: carry,
            "names": lambda carry: carry._asdict(),
            "lists": lambda carry: carry._replace(opt_state=listed(carry.opt_state)),
            "words": flax.serialization.to_state_dict,
        }
        self.carry = fs.adopt_carry(forms[form](jax.tree.map(numbers, self.carry)), self.first, strict=strict)

    @rule()
    def unfreezes_and_freezes(self) -> None:
        own = {name: tree for name, tree in self.carry.state.items() if name not in ("rngs", "ema")}
        params, state = fs.split_params(fs.merge_state(self.carry.params, own))
        wide = fs.init_carry(params, self.carry.state | state, self.tx)
        wide = wide._replace(state={name: tree for name, tree in wide.state.items() if name != "params"})
        wide = wide._replace(params=jax.tree.map(jnp.zeros_like, wide.params))  # none of them is to be seen
        there = fs.adopt_carry(self.carry, wide, strict=False)
        assert_bits(there.params, params)
        self.carry = fs.adopt_carry(there, self.first, strict=False)

    @rule()
    def splits_and_merges(self) -> None:
        own = {name: tree for name, tree in self.carry.state.items() if name not in ("rngs", "ema")}
        variables = fs.merge_state(self.carry.params, own)
        params, state = fs.split_params(variables, trainable=self.model.trainable)
        self.carry = self.carry._replace(params=params, state=self.carry.state | state)

    @rule(data=st.data(), seed=st.integers(0, 9))
    def evaluates(self, data: st.DataObject, seed: int) -> None:
        rest = {name: tree for name, tree in self.carry.state.items() if name not in ("rngs", "ema", "params")}
        written = ["cache"] if self.model.cached else []  # Flax reads no cache that it may not write
        read = fs.with_mutable(Drawn(self.model), mutable=data.draw(some.mutables(written, [*rest.keys() - written])))
        state = {name: tree for name, tree in self.carry.state.items() if name != "rngs"}
        x, _ = self.model.batch(seed)
        out, after = read(self.carry.params, state, x, train=False)
        variables = {**rest, "params": merged(self.hand[0], self.hand[1].get("params", {}))}
        expected, new = Drawn(self.model).apply(variables, x, train=False, mutable=written)
        assert_bits(out, expected)
        assert_bits(after, state | dict(new))  # and is thrown away: the carry goes on as it was

    @rule(how=st.sampled_from(["msgpack", "orbax"]))
    def saves(self, how: str) -> None:
        self.kept, self.at = jax.tree.map(jnp.copy, tuple(self.hand)), self.count
        if how == "msgpack":
            self.saved = flax.serialization.to_bytes(jax.tree.map(numbers, self.carry))
        else:
            with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
                saver.save(pathlib.Path(folder) / "carry", self.carry)
                saver.wait_until_finished()
                self.saved = saver.restore(pathlib.Path(folder) / "carry", self.carry)
        self.goes_back()  # at once: few examples save, step and go back by chance

    @rule()
    def goes_back(self) -> None:
        if self.saved is None:
            return
        restored = self.saved
        if isinstance(restored, bytes):
            restored = flax.serialization.from_bytes(jax.tree.map(numbers, self.first), restored)
        self.carry = fs.adopt_carry(restored, self.first)
        self.hand, self.count = jax.tree.map(jnp.copy, self.kept), self.at

    @invariant()
    def is_the_plain_loop(self) -> None:
        if hasattr(self, "carry"):
            assert_bits(parts(self.carry), tuple(self.hand))
            assert int(self.carry.step) == self.count
            assert self.step._cache_size() <= 1
            assert self.scan._cache_size() == len(self.stacks)

    def teardown(self) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, Exception):
            self.budget.failed = True
        elif error is None:
            self.budget.end()


def listed(tree: Any) -> Any:
    """Lists for tuples, as JSON and YAML keep them; what has names is left."""
    return [listed(each) for each in tree] if type(tree) is tuple else tree


def test_training_in_any_order_is_the_plain_loop() -> None:
    budget = some.Budget("test_training_in_any_order_is_the_plain_loop")
    machine = type("Training", (Training,), {"budget": budget})
    deep = settings(max_examples=max(1000, settings().max_examples), stateful_step_count=12)
    budget.spend(lambda: run_state_machine_as_test(machine, settings=deep))
