"""Compile a step, and keep its carry where it is."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, Sharding, SingleDeviceSharding

from ._axes import place_in_type
from ._checks import checked, is_function
from ._describe import describe, is_array, is_numeric, keyed_leaves, same_structure
from ._refusals.many import ELSEWHERE, JIT_STEP, LIKE, ON_ONE, PLACES, SECOND, UNDIVIDED, UNLIKE
from ._types import JittedStep
from ._unplaced import split_inside
from ._upstream import reshard
from ._wraps import name_of, wraps

P = ParamSpec("P")
R = TypeVar("R")


@checked
def jit_step(step: Callable[P, R], *, like: Any = None, batch: Any = None, donate: bool = True) -> JittedStep[P, R]:
    """Compiles a step and donates the carry.

    Law: equals `jax.jit(step, donate_argnums=0)`, and returns its object: `.lower`, `.trace` and the C++ fast path are
    there.

    >>> import jax.numpy as jnp, flaxsplit as fs
    >>> step = fs.jit_step(lambda carry, batch: (carry + batch, carry))
    >>> step(jnp.zeros(2), jnp.ones(2))[0]
    Array([1., 1.], dtype=float32)

    Args:
        step: a function of a carry and any further arguments. The carry is any pytree: a `Carry`, a `TrainState`. The
            step returns the new carry, alone or first in a tuple.
        like: a carry. The output carry gets its shardings, so that on a mesh the second call reuses the first call's
            executable. On one device all arguments are pinned to it, so it no longer matters whether they are
            committed, as after `jax.device_put`; without `like` JAX compiles once for each mixture. Pass arguments by
            position then, since `jax.jit` pins none by name; if the step takes some by name only, they are not
            pinned. A number, such as the `step` of a `TrainState`, may come out anywhere.
        batch: the sharding of the batch, the second argument: one sharding, or a tree prefix of shardings, with None
            where JAX may choose. A batch from a loader is then split over the mesh as it arrives. Without `batch`
            every device gets all of it and computes all of it.
        donate: whether the carry's buffers are reused. A carry can then be passed once. A second time JAX says in its
            own words that it was deleted, since nothing of ours runs at a dispatch.

    Returns:
        The compiled step.

    Raises:
        SignatureError: a leaf of `like` has no sharding, or lies on other devices than the step runs on; the step
            returns another kind of carry; or the mesh axes of `batch` do not divide a leaf of the batch.
    """
    JIT_STEP.unless(is_function(step), step=step)
    PLACES.unless_all(_is_sharding, batch, "batch")
    donated: Any = (0,) if donate else ()
    body: Callable[..., Any] = step if batch is None else _cut(step, batch)
    if like is None:
        return cast(JittedStep[P, R], jax.jit(body, donate_argnums=donated))
    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(like)]
    chosen = {place for place in places if place is not None}
    LIKE.unless_all(_is_placed_or_number if chosen else _is_placed, like, "like")
    only = chosen.pop() if len(chosen) == 1 else None
    pinned: Any = {"out_shardings": only} if isinstance(only, SingleDeviceSharding) else {}
    if pinned:
        body = _on_one(body, like)
    if pinned and not _takes_names(step):
        pinned["in_shardings"] = only
    return cast(JittedStep[P, R], jax.jit(_pinned(body, like, places), donate_argnums=donated, **pinned))


def _takes_names(step: Callable[..., Any]) -> bool:
    """Whether some arguments can come by name alone, which `jax.jit` refuses beside `in_shardings`."""
    try:
        kinds = {each.kind for each in inspect.signature(step).parameters.values()}
    except (TypeError, ValueError):  # some builtins have none
        return False
    return bool(kinds & {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD})


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
        carry = result if same_structure(result, like) else first
        UNLIKE.unless(same_structure(carry, like), result, like)
        leaves, treedef = jax.tree.flatten(result)
        ELSEWHERE.unless(all(map(_reaches, leaves, places)), carry, like)
        return jax.tree.unflatten(treedef, [*map(_constrained, leaves, places), *leaves[len(places) :]])

    return pinned


def _on_one(step: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """The step, which takes and gives nothing that is on several devices, since like is on one."""

    @wraps(step)
    def on_one(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        spread = [leaf for leaf in jax.tree.leaves((args, kwargs, result)) if _is_spread(leaf)]
        ON_ONE.unless(not spread, like, spread)
        return result

    return on_one


def _cut(step: Callable[..., Any], places: Any) -> Callable[..., Any]:
    """The step, its batch cut as `places` says; XLA then wants the argument itself so, whole on no device."""

    @wraps(step)
    def cut(*args: Any, **kwargs: Any) -> Any:
        SECOND.unless(len(args) > 1, f"positional arguments: {len(args)}", f"by name: {sorted(kwargs)}")
        carry, batch, *others = args
        leaves, treedef = jax.tree.flatten(batch)
        goals = _of_each_leaf(places, batch)
        UNDIVIDED.unless(all(map(_fits, leaves, goals)), batch, goals, _fits)
        split_inside(name_of(step))
        return step(carry, jax.tree.unflatten(treedef, map(_constrained, leaves, goals)), *others, **kwargs)

    return cut


def _of_each_leaf(places: Any, batch: Any) -> list[Any]:
    """A place for each leaf, of a tree of places that the batch begins with."""
    goals: list[Any] = []
    try:
        jax.tree.map(
            lambda place, part: goals.extend([place] * len(jax.tree.leaves(part))), places, batch, is_leaf=_is_none
        )
    except (TypeError, ValueError) as error:
        PLACES.instead_of(error, *(f"{path}: {describe(leaf)}" for path, leaf in keyed_leaves(batch, "batch").items()))
    return goals


def _fits(leaf: Any, place: Any) -> bool:
    """Whether the axes of the mesh divide those of the leaf. JAX says it too, without the leaf's name."""
    if not isinstance(place, NamedSharding):
        return True
    names = [(each,) if isinstance(each, str) else each or () for each in place.spec]
    parts = [math.prod(place.mesh.shape[name] for name in each) for each in names]
    shape = jnp.shape(leaf)
    return len(parts) <= len(shape) and not any(size % part for size, part in zip(shape, parts, strict=False))


def _reaches(leaf: Any, place: Any) -> bool:
    """Whether a leaf comes on as many devices as its place has; inside of a program JAX moves it to no others."""
    if not isinstance(place, NamedSharding):
        return True
    mesh = place_in_type(leaf).mesh
    return bool(mesh.empty or mesh.size == place.mesh.size)


def _is_spread(leaf: Any) -> bool:
    return is_array(leaf) and bool(place_in_type(leaf).mesh.size > 1)


def _is_sharding(place: Any) -> bool:
    return isinstance(place, Sharding)


def _is_none(place: Any) -> bool:
    return place is None


def _constrained(leaf: Any, place: Any) -> Any:
    """`with_sharding_constraint` speaks of Auto axes of a mesh only, `reshard` of Explicit ones."""
    if not isinstance(place, NamedSharding):
        return leaf
    explicit = AxisType.Explicit in place.mesh.axis_types
    return reshard(leaf, place) if explicit else jax.lax.with_sharding_constraint(leaf, place)
