"""From a loss function to its gradients: a stateful function again, so that every combinator takes it."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._axes import averaged, check_bound, unsynced, varying
from ._checks import check_count, checked, is_function, is_inexact
from ._declared import declaring
from ._describe import ABSENT, describe, is_array, keyed_leaves, plain, same_structure
from ._drift import check_drift
from ._linear import noted, watched
from ._lost import warn_of_lost
from ._microbatches import accumulated, scan_parts
from ._refusals.improve import (
    ARGUMENTS,
    HALVES,
    LOSS_FN,
    MISRETURNED,
    NOT_DIFFERENTIABLE,
    OVERWRITE,
    UNCOMPUTED,
    UNSYNCED,
    ZERO_GRADIENT,
)
from ._types import OVERWRITTEN, AuxT, AxisName, BatchT, Carry, GivenLoss, GradFn, P, ParamsT, State, Tree
from ._upstream import is_traced_with
from ._wraps import wraps


@overload
def value_and_grad(
    loss_fn: GivenLoss[ParamsT, BatchT, P, tuple[Float[Array, ""], AuxT]],
    *,
    has_aux: Literal[True],
    microbatches: int = 1,
    axis_name: AxisName | None = None,
    overwrite: str = ...,
) -> GradFn[BatchT, tuple[Float[Array, ""], AuxT], P, ParamsT]: ...
@overload
def value_and_grad(
    loss_fn: GivenLoss[ParamsT, BatchT, P, Float[Array, ""]],
    *,
    has_aux: Literal[False] = False,
    microbatches: int = 1,
    axis_name: AxisName | None = None,
    overwrite: str = ...,
) -> GradFn[BatchT, Float[Array, ""], P, ParamsT]: ...
@checked
def value_and_grad(
    loss_fn: Any,
    *,
    has_aux: bool = False,
    microbatches: int = 1,
    axis_name: AxisName | None = None,
    overwrite: str = OVERWRITTEN,
) -> Any:
    """Turns a loss function into a gradient function: `(params, state, batch) -> ((loss, grads), new_state)`.

    Law: equals `jax.value_and_grad(loss_fn, has_aux=True)`, with the results in the order of a stateful function, so
    that `vmap_stateful` (per-example gradients), `with_rngs` and every other combinator take it.

    >>> import jax.numpy as jnp, flaxsplit as fs
    >>> def loss_fn(params, state, batch):
    ...     return jnp.sum((params["w"] - batch) ** 2), state
    >>> (loss, grads), state = fs.value_and_grad(loss_fn)({"w": jnp.ones(3)}, {}, jnp.zeros(3))
    >>> float(loss), grads["w"]
    (3.0, Array([2., 2., 2.], dtype=float32))

    Args:
        loss_fn: `(params, state, batch, *args, **kwargs) -> (loss, new_state)`, the loss a real scalar.
        has_aux: whether `loss_fn` returns `((loss, aux), new_state)`; the value is then `(loss, aux)`.
        microbatches: the number of parts of the batch. It accumulates the mean gradient over them, one after another,
            and threads the state. Part `i` of `n` has the rows `i, i + n, i + 2n, ...`, so on a mesh each device keeps
            its own. Losses are averaged; `aux` is stacked, as by `jax.lax.scan`. Further arguments are not split. The
            result equals the whole batch only if the loss is a mean over rows. For a mean over unmasked tokens, pass
            their count over the whole batch after the batch, and return `n * sum / count` for each part.
        axis_name: averages value and gradients over this axis of an enclosing `shard_map`, `pmap` or `vmap`.
        overwrite: a collection of the state whose gradient is its new value: the scales and amax histories of fp8. It
            is differentiated with the params; microbatches and devices are joined by the elementwise maximum.

    Returns:
        A stateful function whose `out` is `(value, grads)`; `grads` is a tree like `params`.

    Raises:
        SignatureError: `loss_fn` returns something else, a param is not differentiable, `microbatches` does not divide
            the batch, or `axis_name` is not bound.
        StateDriftError: the state would come out with another structure, shape or dtype.
        UnsyncedStateError: under `shard_map` a state leaf would differ between the devices of `axis_name`.

    As `jax.value_and_grad`, but it threads the state.
    """
    LOSS_FN.unless(is_function(loss_fn), loss_fn=loss_fn)
    given: Any = overwrite
    OVERWRITE.unless(isinstance(given, str), overwrite=given)
    check_count("value_and_grad(loss_fn, microbatches=...)", microbatches)
    declared = declaring(loss_fn, "value_and_grad(loss_fn)")
    objective = _differentiated(_objective(declared, has_aux, axis_name))

    @wraps(loss_fn)
    @noted
    def grad_fn(params: Any, state: Tree, batch: Any = ABSENT, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        _check_call(params, state, batch, axis_name)
        state = plain(state)
        # differentiated per device, so that the mean below is the only reduction
        learned = varying((params, {name: state[name] for name in (overwrite,) if name in state}), axis_name)

        def gradient(_state: Tree, _batch: Any) -> tuple[Any, Any]:
            return jax.value_and_grad(objective, has_aux=True)(learned, _state, _batch, *args, **kwargs)

        over_batch = gradient if microbatches == 1 else accumulated(gradient, learned, microbatches, axis_name)
        try:
            (loss, (aux, new_state)), (grads, overwritten) = over_batch(state, batch)
        except Exception as error:
            UNCOMPUTED.instead_of(error, error, params, state, batch, (*args, kwargs), microbatches)
        loss, grads = averaged((loss, grads), axis_name)
        overwritten = overwritten if axis_name is None else jax.lax.pmax(overwritten, axis_name)
        return (((loss, aux) if has_aux else loss), grads), {**new_state, **overwritten}

    return grad_fn


def mean_loss(loss_fn: Any, has_aux: bool, microbatches: int, axis_name: AxisName | None) -> Callable[..., Any]:
    """The loss of the gradient function alone, without a gradient: what a line search evaluates."""
    objective = _objective(loss_fn, has_aux, axis_name)

    def loss_of(params: Any, state: Tree, batch: Any, *args: Any, **kwargs: Any) -> Any:
        def body(_state: Tree, _batch: Any) -> tuple[Any, Any]:
            _loss, (_, _new_state) = objective((params, {}), _state, _batch, *args, **kwargs)
            return _new_state, _loss

        losses = body(state, batch)[1] if microbatches == 1 else scan_parts(body, state, batch, microbatches)[1]
        return averaged(losses if microbatches == 1 else jnp.mean(losses), axis_name)

    return loss_of


def _objective(loss_fn: Any, has_aux: bool, axis_name: AxisName | None) -> Callable[..., tuple[Any, Any]]:
    """The loss function as `jax.value_and_grad` takes it, checked: `(learned, state, ...) -> (loss, (aux, state))`."""

    def objective(learned: tuple[Any, Any], state: Tree, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        params, overwritten = learned
        given = (params, {**state, **overwritten}, *args)
        try:
            result, calls = watched(loss_fn, given, kwargs)
        except TypeError as error:
            ARGUMENTS.instead_of(error, error, loss_fn, given, kwargs)
        is_returned = _is_returned(result, has_aux) and not _are_gradients(result[1], params, state)
        MISRETURNED.unless(is_returned, result, has_aux, params)
        out, new_state = result
        warn_of_lost(calls, out, new_state)
        new_state = check_drift("value_and_grad(loss_fn)", "state", state, new_state)
        new_state = {**new_state, **{name: state[name] for name in overwritten}}  # the gradient is what comes next
        differ = (f"{path}: differs per device" for path in unsynced(state, new_state, axis_name))
        UNSYNCED.if_any(differ, axis=repr(axis_name))
        loss, aux = out if has_aux else (out, ())
        return loss, (aux, new_state)

    return objective


def _differentiated(objective: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """The objective, which `jax.value_and_grad` traces, with a word where no param reaches the loss."""

    def differentiated(learned: tuple[Any, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        loss, rest = objective(learned, *args, **kwargs)
        params = keyed_leaves(learned[0], "params")
        if params and not any(is_traced_with(loss, leaf) for leaf in params.values()):
            ZERO_GRADIENT.warn(params)
        return loss, rest

    return differentiated


def _check_call(params: Any, state: Any, batch: Any, axis_name: AxisName | None) -> None:
    halves = isinstance(state, Mapping) and not isinstance(params, Carry) and batch is not ABSENT
    HALVES.unless(halves, params=params, state=state)
    NOT_DIFFERENTIABLE.unless_all(is_inexact, params, "params", say=describe)
    if axis_name is not None:
        check_bound("value_and_grad(axis_name=...)", axis_name)


def _is_returned(result: Any, has_aux: bool) -> bool:
    if not isinstance(result, tuple) or len(result) != 2:
        return False
    out = result[0]
    if not has_aux:
        return _is_real_scalar(out)
    return isinstance(out, tuple) and len(out) == 2 and _is_real_scalar(out[0])


def _are_gradients(new_state: Any, params: Any, state: Any) -> bool:
    """Whether gradients came instead of the new state: `loss_fn` is differentiated already."""
    return bool(jax.tree.leaves(params)) and same_structure(new_state, params) and not same_structure(new_state, state)


def _is_real_scalar(loss: Any) -> bool:
    return is_array(loss) and loss.shape == () and bool(jnp.issubdtype(loss.dtype, jnp.floating))
