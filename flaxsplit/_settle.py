"""Bring a state to the fixed point of a function's shapes, so that the first step compiles the last time."""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, overload

import jax
import jax.numpy as jnp

from ._checks import check_function, check_leaves, checked, two_of
from ._describe import (
    Difference,
    describe,
    differences,
    is_array,
    is_numeric,
    keyed_leaves,
    plain,
    same_structure,
    strong,
)
from ._errors import StateDriftError
from ._split import check_halves
from ._types import Abstract, AnyParams, State, Tree

P = ParamSpec("P")
_MOST_ROUNDS = 8


@overload
def settle_state(
    fn: Callable[Concatenate[Any, Any, P], tuple[Any, Any]],
    params: AnyParams,
    state: Tree,
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> State: ...
@overload
def settle_state(  # type: ignore[overload-cannot-match]  # to mypy P is broader, until it is what fn takes
    fn: Callable[..., tuple[Any, Any]], params: AnyParams, state: Tree, abstract: Abstract, /, *args: Any, **kwargs: Any
) -> State: ...
def settle_state(
    fn: Callable[..., tuple[Any, Any]], params: AnyParams, state: Tree, /, *args: Any, **kwargs: Any
) -> State:
    """Gives the state whose structure, shapes and dtypes `fn` returns unchanged.

    Law: `jax.eval_shape(fn, params, settled, *args)[1]` has the shapes and dtypes of `settled`; a settled state is
    returned as it is. Found by `jax.eval_shape` alone: no FLOP is spent, and abstract values do.

    >>> import jax.numpy as jnp, flaxsplit as fs
    >>> fn = lambda params, state, x: (x, {"stats": {"mean": x.mean(0, keepdims=True)}})
    >>> fs.settle_state(fn, {}, {"stats": {"mean": jnp.zeros(5)}}, jnp.ones((8, 5)))["stats"]["mean"].shape
    (1, 5)

    Args:
        fn: a stateful function.
        params: its params; arrays or `jax.ShapeDtypeStruct`.
        state: the state to start from.
        args: the rest of a call; arrays are traced, everything else is static.
        kwargs: likewise.

    Returns:
        The state, its leaves broadcast or cast.

    Raises:
        SignatureError: `fn` is no function, or a leaf is no array.
        StateDriftError: structure changes, shapes grow for ever, or a leaf cannot be broadcast to what comes out.
    """
    return _settled(fn, params, state, args, kwargs)


@checked  # not on settle_state itself: seen through a decorator, positional-only parameters lose their names in mypy
def _settled(fn: Callable[..., Any], params: AnyParams, state: Tree, args: Any, kwargs: Any) -> State:
    where = "settle_state(fn, params, state, ...)"
    check_function(where, "fn", fn, "settle_state(with_mutable(model), params, state, x)")
    check_halves(where, params, state)
    check_leaves(
        where,
        "every leaf must be an array, a number, or a jax.ShapeDtypeStruct",
        keyed_leaves(params, "params") | keyed_leaves(state, "state"),
        _has_shape,
        "a function, a string or another object is in the tree",
        "params, state = split_params(module.init(key, x))",
    )
    start = plain(state)
    before = now = jax.tree.map(_shape_of, start)
    for _ in range(_MOST_ROUNDS):
        before, now = now, _after(fn, params, now, args, kwargs)
        if not same_structure(before, now):
            changed = differences(before, now, "state")
            raise _unsettled(changed, "the structure must stay", "leaves come or go: sown values, or a cache made late")
        if jax.tree.leaves(before) == jax.tree.leaves(now):
            return _reached(start, now)
    cause = f"they still change after {_MOST_ROUNDS} rounds: does each call append?"
    raise _unsettled(differences(before, now, "state"), "shapes must reach a fixed point", cause)


def _has_shape(leaf: Any) -> bool:
    return is_numeric(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _shape_of(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(getattr(leaf, "shape", ()), getattr(leaf, "dtype", None) or jnp.result_type(leaf))


def _after(fn: Any, params: Any, state: Any, args: Any, kwargs: Any) -> State:
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = [leaf if is_array(leaf) else None for leaf in leaves]

    def new_state(_params: Any, _state: Any, _arrays: Any) -> Any:
        filled = [leaf if array is None else array for leaf, array in zip(leaves, _arrays, strict=True)]
        _args, _kwargs = jax.tree.unflatten(treedef, filled)
        form = "fn(params, state, ...) -> (out, new_state)"
        return plain(two_of(fn(_params, _state, *_args, **_kwargs), "settle_state(fn, params, state, ...)", form)[1])

    settled: State = jax.tree.map(_shape_of, jax.eval_shape(new_state, params, state, arrays))
    return settled


def _reached(start: Any, end: Any) -> State:
    stuck = []
    for (path, leaf), new in zip(keyed_leaves(start, "state").items(), jax.tree.leaves(end), strict=True):
        old = _shape_of(leaf)
        if not _broadcastable(old.shape, new.shape) or not _castable(old.dtype, new.dtype):
            stuck.append(Difference(path, describe(old), describe(new)))
    if stuck:
        raise _unsettled(
            stuck,
            "the state must reach its fixed point by broadcasting or casting",
            "the state was made for other shapes, or for numbers of another kind",
        )
    reached: State = jax.tree.map(_brought, start, end)
    return reached


def _castable(old: Any, new: Any) -> bool:
    return bool(old == new or jnp.can_cast(old, new, "same_kind"))  # keys have a dtype that NumPy cannot compare


def _broadcastable(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(old, new) == new
    except ValueError:
        return False


def _brought(leaf: Any, to: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return to
    leaf = strong(leaf)
    return (
        leaf if (leaf.shape, leaf.dtype) == (to.shape, to.dtype) else jnp.broadcast_to(leaf, to.shape).astype(to.dtype)
    )


def _unsettled(changed: list[Difference], required: str, cause: str) -> StateDriftError:
    return StateDriftError(
        "settle_state(fn, params, state, ...)",
        required,
        [str(each) for each in changed],
        cause,
        "make fn return every state leaf in the shape and dtype that it was given",
    )
