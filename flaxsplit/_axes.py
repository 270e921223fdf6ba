"""Named axes: of an enclosing `shard_map`, `vmap` or `pmap`, over which gradients are averaged and keys drawn."""

import math
from typing import Any, TypeVar, cast

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ._describe import keyed_leaves
from ._refusals.options import AXIS_NAME
from ._refusals.run import UNBOUND
from ._types import AxisName
from ._upstream import reshard

T = TypeVar("T")


def names_of(axis_name: AxisName | None) -> tuple[str, ...]:
    """The name of an axis, or names, as names."""
    return (axis_name,) if isinstance(axis_name, str) else axis_name or ()


def check_axis_name(where: str, option: str, axis_name: Any) -> None:
    """Fails where the name of an axis, or names, are due."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    fits = isinstance(names, tuple) and bool(names) and all(isinstance(name, str) for name in names)
    AXIS_NAME.unless(fits, where=where, **{option: axis_name}, option=option)


def check_bound(where: str, axis_name: AxisName) -> None:
    """Fails where an axis that is to be averaged or drawn over is none."""
    check_axis_name(where, "axis_name", axis_name)
    unbound = (name for name in names_of(axis_name) if not is_bound(name))
    UNBOUND.if_any((f"axis_name: {name!r} is not bound here" for name in unbound), where=where)


def is_bound(axis_name: AxisName | None) -> bool:
    """Looks a name up without an instruction: `psum` of a Python number is its count."""
    if axis_name is None:
        return False
    try:
        jax.lax.psum(1, axis_name)
    except (NameError, KeyError, AssertionError):  # which of them depends on the version, and on what encloses the call
        return False
    return True


def averaged(tree: T, axis_name: AxisName | None) -> T:
    """The mean over the axis, if there is one."""
    return tree if axis_name is None else cast(T, jax.lax.pmean(tree, axis_name))


def varying(tree: T, axis_name: AxisName | None) -> T:
    """Marks a tree as each device's own; else `shard_map` sums its gradients, and a mean would come too late.

    The axes of `vmap` and `pmap` have no such marks: there nothing is summed by itself.
    """
    names = names_of(axis_name)
    manual = getattr(jax.sharding.get_abstract_mesh(), "manual_axes", names)

    def mark(leaf: Any) -> Any:
        missing = tuple(name for name in names if name in manual and name not in _marks(leaf))
        return _pcast(leaf, missing) if missing else leaf

    return cast(T, jax.tree.map(mark, tree))


def unsynced(before: Any, after: Any, axis_name: AxisName | None) -> list[str]:
    """Lists the leaves that came in the same on every device of an axis and would come out different.

    JAX says only that an `out_specs` is wrong, and advises `check_vma=False`: each device would keep its own, unseen.
    """
    names = set(names_of(axis_name))
    if not names:
        return []
    old = keyed_leaves(before, "state")
    return [path for path, leaf in keyed_leaves(after, "state").items() if names & _marks(leaf) - _marks(old[path])]


def _marks(leaf: Any) -> frozenset[Any]:
    """The mesh axes along which `shard_map` has a leaf vary, by the older or the newer name of JAX."""
    kind: Any = jax.typeof(leaf)
    marks: frozenset[Any] = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    return marks


def _pcast(leaf: Any, names: tuple[str, ...]) -> Any:
    lax: Any = jax.lax
    return lax.pcast(leaf, names, to="varying") if hasattr(lax, "pcast") else lax.pvary(leaf, names)  # jax < 0.8


# Where mesh axes are Explicit, which is what `jax.make_mesh` gives, the type of an array says where it lies


def place_along(leaf: Any, axis: int) -> NamedSharding | None:
    """Where one axis of a leaf lies, if its type says so, as the place of an array with that axis alone."""
    sharding = place_in_type(leaf)
    entry = sharding.spec[axis] if len(sharding.spec) else None  # of every axis one, but for a scalar
    return None if entry is None else NamedSharding(sharding.mesh, PartitionSpec(entry))


def devices_along(leaf: Any) -> int:
    """Over how many devices a leaf's first axis is spread, as far as its type says so."""
    place = place_along(leaf, 0)
    return math.prod(place.mesh.shape[name] for name in names_of(place.spec[0])) if place else 1


def put_back(before: Any, after: Any) -> Any:
    """A leaf where the one before it lies, if their types say so and differ."""
    if after is before:
        return after
    old, new = place_in_type(before), place_in_type(after)
    if getattr(old, "spec", None) == getattr(new, "spec", None):
        return after
    return reshard(after, NamedSharding(new.mesh if old.mesh.empty else old.mesh, old.spec))


def place_in_type(leaf: Any) -> Any:
    """The sharding in a leaf's type."""
    return getattr(jax.typeof(leaf), "sharding", None)
