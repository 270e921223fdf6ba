"""Compile a step, and keep its carry where it is."""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import jax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

from ._checks import checked, is_function
from ._describe import is_array, is_numeric, same_structure, wraps
from ._refusals.improve import JIT_STEP, LIKE, UNLIKE
from ._types import JittedStep
from ._upstream import reshard

P = ParamSpec("P")
R = TypeVar("R")


@checked
def jit_step(step: Callable[P, R], *, like: Any = None, donate: bool = True) -> JittedStep[P, R]:
    """Compiles a step, the carry donated.

    Law: equals `jax.jit(step, donate_argnums=0)`, and is the object that it returns: `.lower`, `.trace` and the C++
    fast path are there.

    >>> import jax.numpy as jnp, flaxsplit as fs
    >>> step = fs.jit_step(lambda carry, batch: (carry + batch, carry))
    >>> step(jnp.zeros(2), jnp.ones(2))[0]
    Array([1., 1.], dtype=float32)

    Args:
        step: a function of a carry and any further arguments; the carry is any pytree: a `Carry`, a `TrainState`. It
            returns the new carry, alone or first in a tuple.
        like: a carry whose shardings the carry that comes out is to have, so that on a mesh the second call hits the
            first call's executable. On one device all arguments are pinned to it: whether they are committed, as after
            `jax.device_put`, no longer matters; without `like` JAX compiles once for each mixture of these. A number,
            such as the `step` of a `TrainState`, may come out anywhere.
        donate: whether the carry's buffers are reused. A carry can then be passed once: a second time JAX says
            in its own words that it was deleted, since nothing of ours runs at a dispatch.

    Returns:
        The compiled step.

    Raises:
        SignatureError: a leaf of `like` has no sharding, or the step returns no carry like it.
    """
    JIT_STEP.unless(is_function(step), step=step)
    donated: Any = (0,) if donate else ()
    if like is None:
        return cast(JittedStep[P, R], jax.jit(step, donate_argnums=donated))
    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(like)]
    chosen = {place for place in places if place is not None}
    LIKE.unless_all(_is_placed_or_number if chosen else _is_placed, like, "like")
    only = chosen.pop() if len(chosen) == 1 else None
    pinned: Any = {"in_shardings": only, "out_shardings": only} if isinstance(only, SingleDeviceSharding) else {}
    return cast(JittedStep[P, R], jax.jit(_pinned(step, like, places), donate_argnums=donated, **pinned))


def _is_placed(leaf: Any) -> bool:
    return getattr(leaf, "sharding", None) is not None


def _is_placed_or_number(leaf: Any) -> bool:
    return _is_placed(leaf) or (is_numeric(leaf) and not is_array(leaf))


def _pinned(step: Callable[..., Any], like: Any, places: Sequence[Any]) -> Callable[..., Any]:
    """The step, its carry put where `places` says. The carry is what the step returns, or comes first in it."""

    @wraps(step)
    def pinned(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) and result else result
        UNLIKE.unless(same_structure(result, like) or same_structure(first, like), result, like)
        leaves, treedef = jax.tree.flatten(result)
        return jax.tree.unflatten(treedef, [*map(_constrained, leaves, places), *leaves[len(places) :]])

    return pinned


def _constrained(leaf: Any, place: Any) -> Any:
    """`with_sharding_constraint` speaks of Auto axes of a mesh only, `reshard` of Explicit ones."""
    if not isinstance(place, NamedSharding):
        return leaf
    explicit = AxisType.Explicit in place.mesh.axis_types
    return reshard(leaf, place) if explicit else jax.lax.with_sharding_constraint(leaf, place)
