"""Which axis of each part is that of the lanes, how many lanes there are, and the keys of each."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from ._axes import place_along
from ._refusals.lanes import AXES, IN_AXES, NO_COLLECTION, NO_STREAM, SIZES
from ._rngs import split_key
from ._types import Axes, Tree
from ._upstream import reshard


def axes_by_collection(state: Tree, state_axes: Mapping[str, Any] | None) -> dict[str, Any]:
    """The axes of each collection of the state; None for what all lanes share."""
    unknown = (name for name in state_axes or {} if name not in state)
    NO_COLLECTION.if_any(f"{name!r} is not one of {sorted(map(str, state))}" for name in unknown)
    return {name: (state_axes or {}).get(name) for name in state}


def axes_by_argument(in_axes: Axes, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The axes of each positional argument."""
    if not isinstance(in_axes, Sequence):
        return (in_axes,) * len(args)
    IN_AXES.unless(len(in_axes) == len(args), len(in_axes), len(args))
    return tuple(in_axes)


class Lanes(NamedTuple):
    """How many lanes there are, and where they lie, if the types of what is mapped say so."""

    number: int
    place: NamedSharding | None


def lanes_of(operands: Mapping[str, tuple[Any, Any]], count: int | None) -> Lanes:
    """The one size of all mapped axes, or that which is given. `operands` are trees and their axes, by name."""
    mapped = [leaf for name, (tree, prefix) in operands.items() for leaf in _mapped_leaves(name, tree, prefix)]
    sizes = {_size_along(leaf, axis) for _, leaf, axis in mapped} | ({count} if count else set())
    SIZES.unless(len(sizes) == 1 and None not in sizes, [(*each, _size_along(*each[1:])) for each in mapped], count)
    places = (place_along(leaf, axis) for _, leaf, axis in mapped)
    return Lanes(int(sizes.pop() or 0), next((place for place in places if place), None))


def lane_keys(rngs: tuple[Any, ...], split: bool | Mapping[str, bool], lanes: Lanes) -> tuple[Any, Any]:
    """Gives each lane its own key of every stream that is to be split, and says which have a lane axis.

    The keys lie as the lanes do: where axes are Explicit, `jax.vmap` maps no axis that is split beside one that is not.
    """

    def own(key: Any) -> Any:
        keys = split_key(key, lanes.number)
        return reshard(keys, lanes.place) if lanes.place else keys

    def wanted(name: str) -> bool:
        return split if isinstance(split, bool) else split.get(name, True)

    streams = sorted({name for each in rngs for name in each})
    unknown = [] if isinstance(split, bool) else [name for name in split if name not in streams]
    NO_STREAM.if_any(f"{name!r} is not one of {streams}" for name in unknown)
    keys = [{name: own(key) if wanted(name) else key for name, key in each.items()} for each in rngs]
    return tuple(keys), tuple({name: 0 if wanted(name) else None for name in each} for each in rngs)


def _mapped_leaves(name: str, tree: Any, prefix: Any) -> list[tuple[str, Any, int]]:
    """Each leaf that has an axis: `(key path, leaf, axis)`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
    pairs = zip(leaves, _axes_by_leaf(name, prefix, tree), strict=True)
    return [
        (name + jax.tree_util.keystr(path), leaf, axis)
        for (path, leaf), axis in pairs
        if axis is not None and leaf is not None
    ]


def _axes_by_leaf(name: str, prefix: Any, tree: Any) -> list[Any]:
    """Gives each leaf of a tree the axis that a prefix of the tree says for it."""
    try:
        axes = jax.tree.leaves(jax.tree.broadcast(prefix, tree, is_leaf=_is_none), is_leaf=_is_none)
    except ValueError:
        axes = [prefix]
    wrong = [axis for axis in axes if not _is_axis(axis)]
    AXES.unless(not wrong, name, wrong)
    return axes


def _size_along(leaf: Any, axis: int) -> int | None:
    shape: tuple[int, ...] = getattr(leaf, "shape", ())
    return shape[axis] if -len(shape) <= axis < len(shape) else None


def _is_axis(axis: Any) -> bool:
    return axis is None or (isinstance(axis, int) and not isinstance(axis, bool))


def _is_none(node: Any) -> bool:
    return node is None
