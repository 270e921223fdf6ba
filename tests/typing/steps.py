"""Read by mypy and pyright, not run: what a step threads and consumes keeps its type, whatever is put around it."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, assert_type

import jax
import optax
from flax.core import FrozenDict
from flax.struct import PyTreeNode
from jax import Array

import flaxsplit as fs
from tests.typing.models import Classifier

Tree = dict[str, Any]


class Pair(NamedTuple):
    x: Array
    y: Array


class Features(TypedDict):
    x: Array


class Metrics(NamedTuple):
    accuracy: Array


class Mine(PyTreeNode):
    params: Tree


apply = fs.with_rngs(fs.with_mutable(Classifier()))
tx = optax.adam(1e-3)
x: Array = jax.numpy.ones(3)
params: Tree = {}
state: Tree = {}
carry = fs.init_carry(params, state, tx)


def of_pair(params: Tree, state: Tree, batch: Pair) -> tuple[Array, Tree]:
    out, state = apply(params, state, batch.x)
    return optax.l2_loss(out, batch.y).mean(), state


def of_features(params: Tree, state: Tree, batch: Features) -> tuple[tuple[Array, Metrics], Tree]:
    return (batch["x"], Metrics(batch["x"])), state


def of_mapping(params: Mapping[str, Any], state: Mapping[str, Any], batch: Array) -> tuple[Array, Mapping[str, Any]]:
    return batch, state


def of_frozen(params: optax.Params, state: Mapping[str, Any], batch: Array) -> tuple[Array, FrozenDict[str, Any]]:
    return batch, FrozenDict(state)


def mine(carry: Mine, batch: Pair) -> tuple[Mine, Metrics]:
    return carry, Metrics(batch.x)


def steps() -> None:
    step = fs.with_optimizer(of_pair, tx, microbatches=2)
    assert_type(step(carry, Pair(x, x)), tuple[fs.Carry, Array])
    assert_type(fs.with_ema(step, decay=optax.constant_schedule(0.9))(carry, Pair(x, x)), tuple[fs.Carry, Array])
    assert_type(fs.with_optimizer(of_mapping, tx)(carry, x), tuple[fs.Carry, Array])
    assert_type(fs.with_optimizer(of_frozen, tx)(carry, x), tuple[fs.Carry, Array])
    step(carry, (x, x))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    step(carry, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def steps_with_aux() -> None:
    step = fs.with_optimizer(of_features, tx, has_aux=True, axis_name=("data", "model"))
    assert_type(step(carry, {"x": x}), tuple[fs.Carry, tuple[Array, Metrics]])
    _, (loss, metrics) = fs.jit_step(step)(carry, {"x": x})
    assert_type(loss, Array)
    assert_type(metrics.accuracy, Array)
    step(carry, {"y": x})  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
    fs.with_optimizer(of_features, tx)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.with_optimizer(of_features, tx, True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


def untyped(params: Tree, state: Tree, batch: Array) -> Any:
    return (batch, state) if batch.ndim else ((batch, 1), state)


def has_aux_that_is_no_literal(flag: bool) -> None:
    """Only a loss function of which nothing is known fits both values; mypy tries no value by itself."""
    either = fs.with_optimizer(untyped, tx, has_aux=True) if flag else fs.with_optimizer(untyped, tx)
    assert_type(either(carry, x), tuple[fs.Carry, tuple[Array, Any]] | tuple[fs.Carry, Array])
    fs.with_optimizer(untyped, tx, has_aux=flag)  # type: ignore[call-overload]
    fs.with_optimizer(of_pair, tx, has_aux=flag)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    fs.with_optimizer(of_features, tx, has_aux=flag)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def lambdas() -> None:
    """Nothing says what the batch is: it may be passed on, but not taken apart."""
    step = fs.with_optimizer(lambda params, state, batch: (optax.l2_loss(params["w"] * batch).mean(), state), tx)
    assert_type(step(carry, x)[1], Array)
    aux = fs.with_optimizer(lambda params, state, batch: ((params["w"].mean(), 1), state), tx, has_aux=True)
    assert_type(aux(carry, x)[1], tuple[Array, int])
    assert_type(fs.jit_step(fs.scan_steps(fs.with_ema(step, decay=0.9)))(carry, x), tuple[fs.Carry, Array])
    fs.jit_step(lambda carry, batch: (carry + batch, None))(x, x)
    mapped = fs.vmap_stateful(lambda params, state, x: (x, state))
    mapped(params, state, x)  # type: ignore[no-untyped-call]
    fs.with_optimizer(lambda params, state, batch: (batch[0].mean(), state), tx)  # type: ignore[index]  # pyright: ignore[reportIndexIssue]
    fs.with_optimizer(lambda params, state: (params["w"].mean(), state), tx)  # type: ignore[misc, arg-type]  # pyright: ignore[reportArgumentType]


def four_around_a_step() -> None:
    step = fs.jit_step(fs.assert_max_traces(fs.scan_steps(fs.with_ema(fs.with_optimizer(of_pair, tx), decay=0.9))))
    assert_type(step(carry, Pair(x, x)), tuple[fs.Carry, Array])
    assert_type(step.lower(carry, Pair(x, x)), jax.stages.Lowered)
    assert_type(step.trace(carry, Pair(x, x)), jax.stages.Traced)
    for stack in fs.stack_batches([Pair(x, x)], size=2):
        assert_type(stack, Pair)
        step(carry, stack)
        step(carry, stack.x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    step.lower(carry)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def a_carry_of_ones_own(own: Mine) -> None:
    assert_type(fs.scan_steps(mine, unroll=2)(own, Pair(x, x)), tuple[Mine, Metrics])
    step = fs.jit_step(fs.scan_steps(mine), like=own, donate=False)
    assert_type(step(own, Pair(x, x)), tuple[Mine, Metrics])
    assert_type(fs.adopt_carry({}, own), Mine)
    step(carry, Pair(x, x))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.with_ema(mine, decay=0.9)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def carries() -> None:
    updated = optax.apply_updates(params, params)
    assert_type(fs.init_carry(updated, state | {"ema": params}, tx), fs.Carry)
    assert_type(fs.merge_state(updated, {"batch_stats": {}}), Tree)
    apply(updated, {**state, "cache": {}}, x)
    apply(FrozenDict(params), FrozenDict(state), x)
    assert_type(carry._replace(params=updated), fs.Carry)
    placed: Any = jax.device_put((params, state))
    fs.init_carry(*placed, tx)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(carry.step + 1, Array)
    assert_type(carry.opt_state[0].mu, Any)
    fs.init_carry(params, tx, state)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.init_carry(params, state, optax.adam)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.init_carry(params, state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fs.adopt_carry({}, carry).parameters  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    fs.jit_step(step=apply)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.stack_batches(10, [x])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.rng_state(dropout=0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.assert_max_traces(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
