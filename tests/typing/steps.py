"""Read by mypy and pyright, not run: what a step threads and consumes keeps its type, whatever is put around it."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, assert_type

import jax
import numpy as np
import numpy.typing as npt
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


class Weights(TypedDict):
    w: Array


class Layers(NamedTuple):
    body: Array
    head: Array


def of_weights(params: Weights, state: Tree, batch: Pair, key: Array, *, clip: float = 1.0) -> tuple[Array, Tree]:
    return (batch.x * params["w"]).mean() * clip, state


def of_layers(
    params: Layers, state: Tree, batch: Array, rival: fs.Carry, scale: float
) -> tuple[tuple[Array, Metrics], Tree]:
    return (batch.mean(), Metrics(params.head)), state


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
    step(carry, {"y": x})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
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
    aux = fs.with_optimizer(lambda params, state, batch: ((params["w"].mean(), len(params)), state), tx, has_aux=True)
    assert_type(aux(carry, x)[1], tuple[Array, int])
    assert_type(fs.jit_step(fs.scan_steps(fs.with_ema(step, decay=0.9)))(carry, x), tuple[fs.Carry, Array])
    assert_type(fs.scan_steps(fs.skip_nonfinite(step, moving=["step"]))(carry, x), tuple[fs.Carry, Array])
    fs.jit_step(lambda carry, batch: (carry + batch, None))(x, x)
    mapped = fs.vmap_stateful(lambda params, state, x: (x, state))
    mapped(params, state, x)  # type: ignore[no-untyped-call]
    fs.with_optimizer(lambda params, state, batch: (batch[0].mean(), state), tx)
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
    step = fs.jit_step(fs.scan_steps(mine), like=own, batch=None, donate=False)
    assert_type(step(own, Pair(x, x)), tuple[Mine, Metrics])
    assert_type(fs.adopt_carry({}, own), Mine)
    step(carry, Pair(x, x))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.with_ema(mine, decay=0.9)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    fs.skip_nonfinite(mine)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    fs.skip_nonfinite(fs.with_optimizer(of_pair, tx), moving=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def carries() -> None:
    updated = optax.apply_updates(params, params)
    assert_type(fs.init_carry(updated, state | {"ema": params}, tx), fs.Carry)
    assert_type(fs.merge_state(updated, {"batch_stats": {}}), Tree)
    apply(updated, {**state, "cache": {}}, x)
    apply(FrozenDict(params), FrozenDict(state), x)
    assert_type(carry._replace(params=updated), fs.Carry)
    assert_type(carry.step + 1, Array)
    assert_type(carry.opt_state[0].mu, Any)
    fs.init_carry(params, tx, state)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.init_carry(params, state, optax.adam)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.init_carry(params, state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fs.adopt_carry({}, carry).parameters  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    fs.stack_batches(10, [x])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.rng_state(dropout=0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.explain_step(3, carry, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.explain_step(of_pair)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fs.assert_max_traces(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def gradients(weights: Weights, layers: Layers, key: Array) -> None:
    """The params' tree, the batch and further arguments are the loss function's own."""
    grads_of = fs.value_and_grad(of_weights, microbatches=2, axis_name="data")
    assert_type(grads_of(weights, state, Pair(x, x), key, clip=0.5), tuple[tuple[Array, Weights], Tree])
    (loss, grads), new_state = grads_of(carry.params, carry.state, Pair(x, x), key)
    assert_type(loss, Array)
    assert_type(grads["w"], Array)
    assert_type(new_state, Tree)
    with_metrics = fs.value_and_grad(of_layers, has_aux=True, overwrite="scales")
    ((loss, metrics), tree), _ = with_metrics(layers, state, x, carry, 2.0)
    assert_type(metrics, Metrics)
    assert_type(tree, Layers)
    assert_type(fs.value_and_grad(of_pair)(params, state, Pair(x, x))[0], tuple[Array, Tree])
    assert_type(fs.value_and_grad(of_mapping)(params, state, x)[0], tuple[Array, Mapping[str, Any]])
    assert_type(fs.value_and_grad(of_features, has_aux=True)(params, state, {"x": x})[0][0], tuple[Array, Metrics])
    partial = fs.value_and_grad(functools.partial(of_layers, scale=2.0), has_aux=True)
    assert_type(partial(layers, state, x, carry)[1], Tree)


def gradients_around(weights: Weights, key: Array) -> None:
    """A gradient function is a stateful function: each example's own gradients, keys that the state holds, a count."""
    grads_of = fs.value_and_grad(of_weights)
    each = fs.vmap_stateful(grads_of, in_axes=(0, None), axis_name=None)
    assert_type(each(weights, state, Pair(x, x), key, clip=0.5), tuple[tuple[Array, Weights], Tree])
    drawn = fs.with_rngs(fs.assert_max_traces(each))
    assert_type(drawn(weights, state | fs.rng_state(noise=key), Pair(x, x), key)[0][1], Weights)
    loss, _ = fs.vmap_stateful(fs.value_and_grad(of_weights))(weights, state, Pair(x, x), key)[0]
    assert_type(loss, Array)  # the params are Any to pyright, where the gradient function has no name
    assert_type(fs.jit_step(grads_of, donate=False)(weights, state, Pair(x, x), key)[1], Tree)
    assert_type(fs.settle_state(grads_of, weights, state, Pair(x, x), key), Tree)


def opened(carry: fs.Carry, batch: Pair, key: Array, *, clip: float = 1.0) -> tuple[fs.Carry, dict[str, Array]]:
    """The step taken apart."""
    grads_of = fs.value_and_grad(of_weights)
    (loss, grads), new_state = grads_of(carry.params, carry.state, batch, key, clip=clip)
    assert_type(fs.apply_gradients(tx, carry, grads, new_state, value=loss), fs.Carry)
    return fs.apply_gradients(tx, carry, grads, new_state), {"loss": loss, "norm": optax.global_norm(grads)}


def arguments_of_a_step(key: Array) -> None:
    """Positional and keyword ones go through every combinator."""
    made = fs.with_optimizer(of_weights, tx)
    assert_type(made(carry, Pair(x, x), key, clip=0.5), tuple[fs.Carry, Array])
    assert_type(made(carry=carry, batch=Pair(x, x), key=key), tuple[fs.Carry, Array])
    averaged = fs.with_ema(opened, decay=0.9, of=lambda carry: {"params": carry.params}, every=10)
    assert_type(averaged(carry, Pair(x, x), key, clip=0.5), tuple[fs.Carry, dict[str, Array]])
    assert_type(averaged(carry=carry, batch=Pair(x, x), key=key), tuple[fs.Carry, dict[str, Array]])
    counted = fs.assert_max_traces(averaged)
    scanned = fs.scan_steps(counted)
    assert_type(scanned(carry, Pair(x, x), key, clip=0.5), tuple[fs.Carry, dict[str, Array]])
    compiled = fs.jit_step(fs.assert_max_traces(fs.scan_steps(fs.with_ema(made, decay=0.9))))
    assert_type(compiled(carry, Pair(x, x), key, clip=0.5), tuple[fs.Carry, Array])
    assert_type(compiled.lower(carry, Pair(x, x), key=key), jax.stages.Lowered)
    made(carry, Pair(x, x))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    averaged(carry, Pair(x, x), key, clop=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    scanned(carry, Pair(x, x), "key")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    compiled(carry, Pair(x, x), key, clip=key)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def steps_of_any_form() -> None:
    """`jit_step` takes a step of any arity, whatever it returns."""

    def alone(carry: Tree) -> Tree:
        return carry

    def images(carry: Mine, x: Array, y: Array) -> tuple[Mine, Array, Array]:
        return carry, x, y

    assert_type(fs.jit_step(alone)({}), Tree)
    assert_type(fs.jit_step(images)(Mine({}), x=x, y=x), tuple[Mine, Array, Array])
    assert_type(fs.jit_step(apply, donate=False)(params, state, x, train=True), tuple[Array, Tree])
    fs.jit_step(images)(Mine({}), x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def numbers_from_elsewhere(arrays: npt.NDArray[np.float32], decay: np.float32) -> None:
    """Loaders give NumPy arrays, and so do schedules numbers."""
    of_array, of_two = fs.with_optimizer(of_mapping, tx), fs.with_optimizer(of_tuple, tx)
    assert_type(fs.jit_step(of_array)(carry, arrays), tuple[fs.Carry, Array])
    assert_type(fs.jit_step(fs.with_ema(of_two, decay=decay))(carry, (arrays, arrays)), tuple[fs.Carry, Array])
    assert_type(fs.jit_step(fs.with_optimizer(of_features, tx, has_aux=True))(carry, {"x": arrays})[0], fs.Carry)
    for stack in fs.stack_batches([(arrays, arrays)], 10):
        assert_type(fs.jit_step(fs.scan_steps(of_two))(carry, stack), tuple[fs.Carry, Array])
    fs.with_ema(of_array, decay=x.mean())
    fs.with_ema(of_array, decay=lambda step: step / 10)
    fs.jit_step(of_two)(params, (arrays, arrays))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.jit_step(of_array)(carry, "arrays")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def of_tuple(params: Tree, state: Tree, batch: tuple[Array, Array]) -> tuple[Array, Tree]:
    return batch[0].mean(), state


def accumulating() -> None:
    many = optax.MultiSteps(tx, 2)
    step = fs.with_optimizer(of_pair, many)
    assert_type(step(fs.init_carry(params, state, many), Pair(x, x)), tuple[fs.Carry, Array])


def lambdas_of_the_open_step() -> None:
    (loss, grads), _ = fs.value_and_grad(lambda params, state, batch: ((params["w"] * batch).mean(), state))(
        params, state, x
    )
    assert_type(loss, Array)
    assert_type(grads["w"], Any)
    fs.value_and_grad(lambda params, state, batch, key: ((params["w"].mean(), 1), state), has_aux=True)(
        params, state, x, x
    )
    fs.jit_step(lambda carry, batch, key: (carry + batch + key, None))(x, x, x)
    fs.assert_max_traces(lambda carry: carry + 1)(x)
    fs.scan_steps(lambda carry, batch, *, key: (carry + batch, key))
