"""Virtual devices of a CPU as meshes, of both kinds of axes."""

import functools
import importlib
from typing import Any

import jax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
"""Of a mesh's axes; JAX's default is Explicit."""

_SHARD = importlib.import_module("jax.sharding" if hasattr(jax.sharding, "reshard") else "jax.experimental.shard")
reshard: Any = _SHARD.reshard
auto_axes: Any = _SHARD.auto_axes


@functools.cache
def line(kind: AxisType, count: int = 8) -> Mesh:
    """So many devices along one axis. More than two wait long for each other's collectives on two cores."""
    return jax.make_mesh((count,), ("data",), axis_types=(kind,), devices=jax.devices()[:count])


@functools.cache
def grid(kind: AxisType) -> Mesh:
    """All devices along two axes."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def on(mesh: Mesh, *spec: str | None) -> NamedSharding:
    """A placement."""
    return NamedSharding(mesh, PartitionSpec(*spec))


def told(loss_fn: Any, mesh: Mesh) -> Any:
    """The loss, and where axes are Explicit the place of its results, which Linen says of none of its operations."""
    return auto_axes(loss_fn, out_sharding=on(mesh)) if EXPLICIT in mesh.axis_types else loss_fn


def placement(tree: Any) -> list[Any]:
    """Where every leaf lies; of Explicit axes JAX writes out that one is not split, `P(None)` for `P()`."""
    return [_short(leaf.sharding) for leaf in jax.tree.leaves(tree)]


def _short(place: Any) -> Any:
    if not isinstance(place, NamedSharding) or EXPLICIT not in place.mesh.axis_types:
        return place
    spec = [*place.spec]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(place.mesh, PartitionSpec(*spec))
