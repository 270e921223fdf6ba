"""Bring a state to the fixed point of a function's shapes, so that the first compile is the last."""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, overload

import jax
import jax.numpy as jnp

from ._checks import checked, is_function, survives, two_of
from ._describe import Difference, describe, is_array, is_numeric, keyed_leaves, kind_of, plain, same_structure, strong
from ._refusals.carry import TOO_WIDE, wide
from ._refusals.run import ENDLESS, FORM, NO_SHAPE, RESTRUCTURED, SETTLE, SETTLE_FN, UNREACHED
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
    """Finds the state whose structure, shapes and dtypes `fn` does not change.

    Law: `jax.eval_shape(fn, params, settled, *args)[1]` has the shapes and dtypes of `settled`; a settled state is
    returned as it is. It uses only `jax.eval_shape`: it runs nothing, and takes abstract values.

    >>> import jax.numpy as jnp, flaxsplit as fs
    >>> fn = lambda params, state, x: (x, {"stats": {"mean": x.mean(0, keepdims=True)}})
    >>> fs.settle_state(fn, {}, {"stats": {"mean": jnp.zeros(5)}}, jnp.ones((8, 5)))["stats"]["mean"].shape
    (1, 5)

    Args:
        fn: a stateful function.
        params: its params; arrays or `jax.ShapeDtypeStruct`.
        state: the state to start from.
        args: the other arguments of a call; arrays are traced, everything else is static.
        kwargs: the same, by name.

    Returns:
        The state, its leaves broadcast or cast.

    Raises:
        SignatureError: `fn` is not a function, a leaf is not an array, or an integer is too large for JAX's dtype.
        StateDriftError: the structure changes, shapes grow at each call, or a leaf cannot be broadcast to the output.
    """
    return _settled(fn, params, state, args, kwargs)


@checked  # not on settle_state itself: seen through a decorator, positional-only parameters lose their names in mypy
def _settled(fn: Callable[..., Any], params: AnyParams, state: Tree, args: Any, kwargs: Any) -> State:
    SETTLE_FN.unless(is_function(fn), fn=fn)
    check_halves(SETTLE, params, state)
    leaves = keyed_leaves(params, "params") | keyed_leaves(state, "state")
    NO_SHAPE.if_any(f"{path}: {kind_of(leaf)}" for path, leaf in leaves.items() if not _has_shape(leaf))
    TOO_WIDE.unless_all(survives, state, "state", say=wide, where=SETTLE)
    start = plain(state)
    end = _fixed_point(_one_call(fn, params, args, kwargs), jax.tree.map(_shape_of, start))
    return _brought_to(start, end)


def _has_shape(leaf: Any) -> bool:
    return is_numeric(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _shape_of(leaf: Any) -> Any:
    kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)  # of NumPy's i64 JAX makes i32
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype)


def _fixed_point(shapes_after: Callable[[State], State], shapes: State) -> State:
    """Calls until nothing changes any more."""
    before = shapes
    for _ in range(_MOST_ROUNDS):
        before, shapes = shapes, shapes_after(shapes)
        RESTRUCTURED.unless(same_structure(before, shapes), before, shapes)
        if jax.tree.leaves(before) == jax.tree.leaves(shapes):
            break
    ENDLESS.unless(jax.tree.leaves(before) == jax.tree.leaves(shapes), before, shapes, rounds=_MOST_ROUNDS)
    return shapes


def _one_call(fn: Any, params: Any, args: Any, kwargs: Any) -> Callable[[State], State]:
    """What one call of `fn` makes of the shapes of a state. Arrays are traced, other arguments are as they are."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = [leaf if is_array(leaf) else None for leaf in leaves]

    def new_state(_params: Any, _state: Any, _arrays: Any) -> Any:
        filled = [leaf if array is None else array for leaf, array in zip(leaves, _arrays, strict=True)]
        _args, _kwargs = jax.tree.unflatten(treedef, filled)
        return plain(two_of(fn(_params, _state, *_args, **_kwargs), SETTLE, FORM)[1])

    return lambda shapes: jax.tree.map(_shape_of, jax.eval_shape(new_state, params, shapes, arrays))


def _brought_to(start: State, end: State) -> State:
    """The state in the shapes of its fixed point, by broadcasting and casting alone."""
    pairs = zip(keyed_leaves(start, "state").items(), jax.tree.leaves(end), strict=True)
    changes = [(path, _shape_of(leaf), to) for (path, leaf), to in pairs]
    UNREACHED.if_any(
        str(Difference(path, describe(old), describe(new))) for path, old, new in changes if not _reaches(old, new)
    )
    brought: State = jax.tree.map(_brought, start, end)
    return brought


def _reaches(old: Any, new: Any) -> bool:
    return _broadcastable(old.shape, new.shape) and _castable(old.dtype, new.dtype)


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
    is_there = (leaf.shape, leaf.dtype) == (to.shape, to.dtype)
    return leaf if is_there else jnp.broadcast_to(leaf, to.shape).astype(to.dtype)
